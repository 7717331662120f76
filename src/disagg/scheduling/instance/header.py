"""Everything that the core of an instance is made from: the head of its log."""

import msgspec

from disagg.base.config import SchedulerSettings
from disagg.base.ids import BlockHash, InstanceId
from disagg.base.kv_events import Medium
from disagg.base.window_blocks import WindowBlocks
from disagg.cache.block_tier import BlockTier
from disagg.costs.measured_steps import FittedLatency
from disagg.scheduling.step.threads import StepThreads


class InstanceHeader(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag=True
):
    """Everything that the core of an instance is made from.

    ``pool`` is the address at which others read its KV blocks; ``num_stages`` are those of the executor's pipeline.
    """

    instance: InstanceId
    settings: SchedulerSettings
    num_blocks: int
    block_size: int
    prefix_caching: bool = True
    max_model_len: int | None = None
    num_stages: int = 1
    incarnation: str = ""
    pool: bytes = b""
    medium: Medium = Medium.GPU
    """Where its pool is."""
    max_host_blocks: int = 0
    """KV blocks that may be in host memory behind the pool of a device."""
    max_disk_blocks: int = 0
    """KV blocks that may be on its disk, and the names of those that are there, least recently used first."""
    saved_blocks: tuple[BlockHash, ...] = ()
    window: WindowBlocks | None = None
    """Which blocks hold the layers with a sliding window; None where no layer has blocks of its own."""
    shows_progress: bool = False
    """Others can read the KV blocks of its steps while these write them, layer by layer."""
    tells_tokens: bool = False
    """News of cached blocks say whose they are, so that their tokens can go with them."""
    threads: StepThreads = StepThreads()
    latency: FittedLatency | None = None
    """Predicts its steps; None learns from those that run."""

    def tiers(self) -> tuple[BlockTier, ...]:
        """Return what is kept behind the pool when the instance starts, the quickest first."""
        host = BlockTier(Medium.CPU, self.max_host_blocks)
        disk = BlockTier(Medium.DISK, self.max_disk_blocks, self.saved_blocks)
        return tuple(tier for tier in (host, disk) if tier.max_blocks)
