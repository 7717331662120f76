"""Counters of one step scheduler, and the load report made of them."""

from dataclasses import dataclass
from typing import NamedTuple

from disagg.base.kv_events import Medium
from disagg.base.messages import InstanceLoad
from disagg.costs.step_times import StepTimes
from disagg.scheduling.step.actions import Chunk
from disagg.scheduling.step.kv_ledger import KvLedger
from disagg.scheduling.step.sequence import Sequence


class Occupancy(NamedTuple):
    """How many sequences an instance computes, lets wait, and keeps for others."""

    num_running: int
    num_waiting: int
    num_leases: int


@dataclass(slots=True)
class SchedulerStatistics:
    """Totals since the instance started."""

    num_arrivals: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_leases_expired: int = 0
    borrowed_s: float = 0.0

    def count_tokens(self, sequence: Sequence, chunk: Chunk) -> None:
        """Book a chunk's tokens as prefill up to the prompt's end and as decode after it."""
        if chunk.start >= sequence.num_prefill_tokens:
            self.num_decode_tokens += chunk.num_tokens
            return
        num_prefill = min(chunk.num_tokens, sequence.num_prefill_tokens - chunk.start)
        self.num_prefill_tokens += num_prefill
        self.num_decode_tokens += chunk.num_tokens - num_prefill

    def load(self, ledger: KvLedger, times: StepTimes | None, occupancy: Occupancy) -> InstanceLoad:
        """Return the report that the router and the metrics read."""
        audit = ledger.pool.audit()
        return InstanceLoad(
            num_running=occupancy.num_running,
            num_waiting=occupancy.num_waiting,
            num_leases=occupancy.num_leases,
            blocks_total=audit.total,
            blocks_free=audit.free,
            blocks_active=audit.active,
            blocks_leased=audit.leased,
            blocks_filling=audit.filling,
            blocks_cached=audit.cached,
            blocks_quarantined=audit.quarantined,
            num_preemptions_total=self.num_preemptions,
            num_steps_total=self.num_steps,
            num_prefill_tokens_total=self.num_prefill_tokens,
            num_decode_tokens_total=self.num_decode_tokens,
            num_prefix_queries_total=ledger.num_prefix_queries,
            num_prefix_hits_total=ledger.num_prefix_hits,
            num_prefix_pulled_total=ledger.num_prefix_pulled,
            num_prefix_from_host_total=ledger.num_prefix_loaded[Medium.CPU],
            num_prefix_loaded_total=ledger.num_prefix_loaded[Medium.DISK],
            blocks_on_host=ledger.num_in_tier(Medium.CPU),
            blocks_on_disk=ledger.num_in_tier(Medium.DISK),
            num_leases_expired_total=self.num_leases_expired,
            borrowed_core_seconds_total=self.borrowed_s,
            num_steps_timed_total=times.num_steps if times else 0,
            step_seconds_total=times.measured_s if times else 0.0,
            step_predicted_seconds_total=times.predicted_s if times else 0.0,
            step_error=times.error if times and times.num_steps else 0.0,
        )
