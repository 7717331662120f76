"""How long the tiers behind a simulated instance's pool take: each reads one thing after the other, and writes so."""

from collections import Counter

from disagg.base.kv_events import Medium
from disagg.scheduling.instance.inputs import LoadEnded
from disagg.scheduling.step.actions import LoadBlocks, SaveBlock
from disagg.scheduling.step.events import BlockSaved, TierRead
from disagg.simulator.instance_spec import InstanceSpec


class TierClock:
    """Host memory and disk of one life of an instance. Times are of the deployment's clock."""

    def __init__(self, spec: InstanceSpec) -> None:
        self._spec = spec
        self._reading_until_s = dict.fromkeys(Medium, 0.0)
        self._writing_until_s = dict.fromkeys(Medium, 0.0)

    def read(self, load: LoadBlocks, now: float) -> tuple[float, LoadEnded]:
        """Read blocks, the tiers side by side; return when that has ended, and what there is to be said of it then."""
        reads, end_s = [], now
        for medium, num_blocks in Counter(block.medium for block in load.blocks).items():
            duration_s = self._time_s(medium, num_blocks)
            self._reading_until_s[medium] = max(now, self._reading_until_s[medium]) + duration_s
            end_s = max(end_s, self._reading_until_s[medium])
            reads.append(TierRead(medium, num_blocks, duration_s))
        return end_s, LoadEnded(request_id=load.request_id, epoch=load.epoch, reads=tuple(reads))

    def write(self, save: SaveBlock, now: float) -> tuple[float, BlockSaved]:
        """Write a block; see ``read``."""
        end_s = max(now, self._writing_until_s[save.medium]) + self._time_s(save.medium, 1)
        self._writing_until_s[save.medium] = end_s
        return end_s, BlockSaved(name=save.name, medium=save.medium)

    def _time_s(self, medium: Medium, num_blocks: int) -> float:
        spec = self._spec
        link = spec.disk if medium is Medium.DISK else spec.host_memory
        return link.transfer_time_s(num_blocks * spec.block_size * spec.kv_bytes_per_token)
