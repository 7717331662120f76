"""The tiers of a live instance in virtual time: no byte is moved, each read and write takes what its link takes."""

from collections import Counter, defaultdict
from collections.abc import Callable

from disagg.base.kv_events import Medium
from disagg.costs.links import LinkModel
from disagg.engine.kv_tiers import TierResult
from disagg.scheduling.instance.inputs import LoadEnded
from disagg.scheduling.step.actions import DropSaved, LoadBlocks, SaveBlock
from disagg.scheduling.step.events import BlockSaved, TierRead
from disagg.simulator.event_queue import EventQueue
from disagg.simulator.instance_spec import InstanceSpec


class VirtualTiers:
    """What an engine's loop asks of its tiers."""

    def __init__(self, spec: InstanceSpec, queue: EventQueue, wake: Callable[[], None]) -> None:
        self._links: dict[Medium, LinkModel] = {Medium.CPU: spec.host_memory, Medium.DISK: spec.disk}
        self._block_bytes = spec.block_size * spec.kv_bytes_per_token
        self._queue = queue
        self._wake = wake
        self._free_at_s: defaultdict[tuple[str, Medium], float] = defaultdict(float)
        self._running: list[tuple[float, TierResult]] = []

    def load(self, load: LoadBlocks) -> None:
        counts = Counter(block.medium for block in load.blocks)
        reads = tuple(TierRead(one, count, self._time_s(one, count)) for one, count in counts.items())
        end_s = max(self._use("read", read.medium, read.duration_s) for read in reads)
        ended = LoadEnded(request_id=load.request_id, epoch=load.epoch, reads=reads)
        self._end_at(end_s, TierResult(ended, tuple(block.target for block in load.blocks)))

    def save(self, save: SaveBlock) -> None:
        end_s = self._use("write", save.medium, self._time_s(save.medium, 1))
        self._end_at(end_s, TierResult(BlockSaved(name=save.name, medium=save.medium)))

    def drop(self, drop: DropSaved) -> None:
        """Removing takes no time."""

    def take_ended(self) -> list[TierResult]:
        now = self._queue.now()
        ended = [one for one in self._running if one[0] <= now]
        self._running = [one for one in self._running if one[0] > now]
        return [result for _, result in sorted(ended, key=lambda one: one[0])]

    def _time_s(self, medium: Medium, num_blocks: int) -> float:
        return self._links[medium].transfer_time_s(num_blocks * self._block_bytes)

    def _use(self, how: str, medium: Medium, duration_s: float) -> float:
        self._free_at_s[how, medium] = max(self._queue.now(), self._free_at_s[how, medium]) + duration_s
        return self._free_at_s[how, medium]

    def _end_at(self, end_s: float, result: TierResult) -> None:
        self._running.append((end_s, result))
        self._queue.push(end_s, self._wake)
