"""What one simulated instance is made from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import structs

from disagg.base.config import SchedulerSettings
from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.base.message_fields import PROTOCOL_VERSION
from disagg.base.messages import InstanceFacts, Ready
from disagg.base.request import Role
from disagg.base.window_blocks import WindowBlocks
from disagg.costs.latency import LatencyModel, StepShape
from disagg.costs.links import LinkModel
from disagg.costs.platform import KvWindow
from disagg.costs.topology import Place
from disagg.scheduling.capacity import capacity_tokens, most_in_sight, step_limits
from disagg.scheduling.instance.header import InstanceHeader
from disagg.scheduling.instance.outputs import StartCopy
from disagg.scheduling.step.actions import Chunk, RunStep
from disagg.scheduling.step.threads import StepThreads
from disagg.simulator.held_requests import HeldRequests


@dataclass(frozen=True, kw_only=True)
class LendingCores:
    """The cores of an instance that lends them to its host's others, and theirs that it may borrow, the nearest first.

    ``latencies`` are its step times on so many borrowed cores besides its own. The next fewer stand for a number that
    is missing.
    """

    own: tuple[int, ...]
    others: tuple[int, ...] = ()
    latencies: Mapping[int, LatencyModel] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class InstanceSpec:
    """What one simulated instance is made from."""

    name: InstanceId
    role: Role
    scheduler: SchedulerSettings
    num_blocks: int
    block_size: int
    latency: LatencyModel
    kv_bytes_per_token: int = 0
    kv_window: KvWindow | None = None
    """None as well where there are tiers behind the pool, whose blocks hold all layers."""
    num_devices: int = 1
    num_threads: int = 1
    """Cores of its host on which it computes, where hosts matter."""
    cores: LendingCores | None = None
    """None lends and borrows none."""
    place: Place = ()
    """Its devices; none named: devices of its own on the first node. A pipeline over several nodes counts as on that
    of its first stage, where hosts matter."""
    prefix_caching: bool = True
    host_memory: LinkModel = field(default_factory=LinkModel)
    """How quick the memory of its host is, in each direction, and how many KV blocks it may keep there."""
    max_host_blocks: int = 0
    disk: LinkModel = field(default_factory=LinkModel)
    """The same of its disk."""
    max_disk_blocks: int = 0
    swap: LinkModel | None = None
    """Where the KV of preempted sequences waits; None computes it again."""
    shows_progress: bool = False
    """Others read the KV blocks of its steps while these write them."""
    digest_bytes_per_s: float = math.inf
    """How fast it makes digests of the KV blocks that it offers."""

    def __post_init__(self) -> None:
        if self.place and len(self.place) != self.num_devices:
            raise ConfigurationError(
                f"{self.name} has {self.num_devices} device(s) and a place of {len(self.place)}: name as many"
            )
        if self.cores is not None and (self.scheduler.max_steps_in_flight > 1 or self.latency.num_stages > 1):
            raise ConfigurationError(f"{self.name} has several steps in flight: only who has one lends cores")

    @property
    def threads(self) -> StepThreads:
        """What its steps are computed on."""
        return StepThreads() if self.cores is None else StepThreads(len(self.cores.own), len(self.cores.others))

    @property
    def paces(self) -> dict[int, LatencyModel]:
        """Step times by the number of borrowed cores, 0 included."""
        return {0: self.latency} | dict(self.cores.latencies if self.cores is not None else {})

    @property
    def window(self) -> WindowBlocks | None:
        """Which blocks hold the layers with a sliding window; None where one block holds all layers."""
        return None if self.kv_window is None else self.kv_window.blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block."""
        beside = 0 if self.kv_window is None else self.kv_window.bytes_per_token
        return self.block_size * (self.kv_bytes_per_token - beside)

    @property
    def digest_s(self) -> float:
        """Seconds for the digest of one KV block."""
        return self.block_bytes / self.digest_bytes_per_s

    @property
    def capacity(self) -> int:
        """Longest sequence that the KV pool holds, in tokens."""
        in_sight = most_in_sight(self.window, self.scheduler, self.block_size)
        return capacity_tokens(self.num_blocks, self.block_size, None, self.window, in_sight)

    def copied_bytes(self, copy: StartCopy) -> int:
        """Return what a pull carries: in each copy, a block of the smaller size of the two instances'."""
        return len(copy.copies) * self.block_bytes * min(copy.offer.block_size, self.block_size) // self.block_size

    def swap_in(self, chunk: Chunk, prompt_len: int) -> tuple[Chunk, float]:
        """Return what is computed of a chunk where the KV of preempted sequences waits, and the seconds to get that.

        Of several tokens that end past the prompt all but the last were computed before.
        """
        end = chunk.start + chunk.num_tokens
        if self.swap is None or chunk.num_tokens == 1 or end <= prompt_len:
            return chunk, 0.0
        swapped_s = self.swap.transfer_time_s((end - 1) * self.kv_bytes_per_token)
        return structs.replace(chunk, start=end - 1, num_tokens=1), swapped_s

    def price(self, step: RunStep, requests: HeldRequests) -> tuple[StepShape, float]:
        """Return what a step computes, and the seconds to swap in what it need not compute again."""
        if self.swap is None:
            return StepShape.of(step.chunks), 0.0
        swapped_s, known = 0.0, []
        for chunk in step.chunks:
            left, its_s = self.swap_in(chunk, requests[chunk.request_id].prompt_len)
            known.append(left)
            swapped_s += its_s
        return StepShape.of(known), swapped_s

    def header(self, incarnation: str) -> InstanceHeader:
        """Return what the core of one life of the instance is made from."""
        return InstanceHeader(
            instance=self.name,
            incarnation=incarnation,
            settings=self.scheduler,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            prefix_caching=self.prefix_caching,
            max_host_blocks=self.max_host_blocks,
            max_disk_blocks=self.max_disk_blocks,
            num_stages=self.latency.num_stages,
            window=self.window,
            shows_progress=self.shows_progress,
            threads=self.threads,
        )

    def ready(self, incarnation: str) -> Ready:
        """Return what it says when it takes requests."""
        return Ready(
            version=PROTOCOL_VERSION,
            instance=self.name,
            incarnation=incarnation,
            role=self.role,
            facts=InstanceFacts(
                pid=1,
                device="simulated",
                kernel_backend="simulated",
                num_blocks=self.num_blocks,
                block_size=self.block_size,
                max_model_len=self.capacity,
                vocab_size=1,
                weight_bytes=0,
                kv_bytes=int(self.num_blocks * self.block_size * self.kv_bytes_per_token),
                load_s=0.0,
                pool=b"simulated",
                limits=step_limits(self.scheduler, self.threads),
                max_host_blocks=self.max_host_blocks,
                max_disk_blocks=self.max_disk_blocks,
                window=self.window,
            ),
        )
