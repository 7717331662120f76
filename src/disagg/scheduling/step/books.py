"""What the parts of a step scheduler share: sequences in their queues, their KV blocks, the decisions so far."""

import bisect
import math

from disagg.base.config import SchedulerSettings
from disagg.base.errors import InternalError
from disagg.base.ids import Epoch, RequestId
from disagg.base.sampling import FinishReason
from disagg.scheduling.by_objectives import queue_order
from disagg.scheduling.capacity import capacity_tokens, most_in_sight
from disagg.scheduling.epoch_memory import EpochMemory
from disagg.scheduling.queue_order import rank_of
from disagg.scheduling.step.actions import AnyAction, Forget, Reject, RejectReason, WakeAt
from disagg.scheduling.step.events import Arrived, KvOffered
from disagg.scheduling.step.kv_ledger import KvLedger, KvMemory
from disagg.scheduling.step.sequence import Sequence, SequenceState
from disagg.scheduling.step.statistics import SchedulerStatistics


def order_of(sequence: Sequence) -> tuple[int, float, int]:
    """Return the sort key of every queue."""
    return sequence.order


class Books:
    """One instance's sequences and blocks. It records; what to do is decided elsewhere.

    ``waiting`` and ``running`` are sorted by order and hold exactly the sequences of that state.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        num_blocks: int,
        block_size: int,
        prefix_caching: bool,
        max_model_len: int | None,
        memory: KvMemory | None = None,
    ) -> None:
        self.settings = settings
        self._order = queue_order(settings.queue, settings.objectives)
        window = None if memory is None else memory.window
        in_sight = most_in_sight(window, settings, block_size)
        self.ledger = KvLedger(num_blocks, block_size, prefix_caching, memory, in_sight)
        self.capacity = capacity_tokens(num_blocks, block_size, max_model_len, window, in_sight)
        self.sequences: dict[RequestId, Sequence] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_pulling = 0
        self.statistics = SchedulerStatistics()
        self.ended = EpochMemory()
        self.now = -math.inf
        self.alarm = math.inf
        self.actions: list[AnyAction] = []

    @property
    def has_room(self) -> bool:
        """True while one more sequence has a place in the batch."""
        return len(self.running) + self.num_pulling < self.settings.max_batch_size

    @property
    def is_busy(self) -> bool:
        """True when some sequence holds blocks that it will let go of."""
        return bool(self.running) or self.num_pulling > 0

    def is_news(self, request_id: RequestId, epoch: Epoch) -> bool:
        """Return False for a repeated, ended or old attempt of a sequence."""
        known = self.sequences.get(request_id)
        return (known is None or known.epoch < epoch) and not self.ended.has_ended(request_id, epoch)

    def find(self, request_id: RequestId, epoch: Epoch, state: SequenceState) -> Sequence | None:
        """Return the sequence if this is its attempt and its state."""
        sequence = self.sequences.get(request_id)
        if sequence is None or sequence.epoch != epoch or sequence.state is not state:
            return None
        return sequence

    def rejects(self, event: Arrived | KvOffered, most_tokens: int) -> bool:
        """Reject a sequence that could outgrow what the instance holds; return whether it was."""
        if most_tokens <= self.capacity:
            return False
        self.actions.append(
            Reject(
                request_id=event.request_id,
                epoch=event.epoch,
                reason=RejectReason.TOO_LONG,
                detail=f"the sequence can grow to {most_tokens} tokens, the instance's limit is {self.capacity}",
            )
        )
        return True

    def enter(self, event: Arrived | KvOffered, state: SequenceState) -> Sequence:
        """Open the record of a sequence."""
        self.statistics.num_arrivals += 1
        objectives = event.objectives.or_else(self.settings.objectives)
        priority, rank_s = rank_of(
            self._order,
            priority=event.priority,
            arrival_s=event.arrival_s,
            num_tokens=event.num_tokens,
            ttft_s=objectives.ttft_s,
        )
        sequence = Sequence(
            request_id=event.request_id,
            epoch=event.epoch,
            num_tokens=event.num_tokens,
            max_total_tokens=event.max_total_tokens,
            order=(priority, rank_s, self.statistics.num_arrivals),
            objectives=objectives,
            state=state,
            block_hashes=event.block_hashes,
        )
        sequence.story.append((self.now, state))
        self.sequences[event.request_id] = sequence
        return sequence

    def wait(self, sequence: Sequence) -> None:
        """Put a sequence into the waiting queue; its state says WAITING already."""
        bisect.insort(self.waiting, sequence, key=order_of)

    def run(self, sequence: Sequence) -> None:
        """Put a sequence that holds its blocks into the running batch."""
        sequence.move(SequenceState.RUNNING, self.now)
        bisect.insort(self.running, sequence, key=order_of)

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Close the record of a sequence that holds nothing any more, and say so."""
        self.actions.append(Forget(request_id=sequence.request_id, epoch=sequence.epoch, reason=reason))
        self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Close the record of a sequence."""
        sequence.move(SequenceState.ENDED, self.now)
        self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Let no message find the sequence any more, though its record is still open."""
        self.ended.remember(sequence.request_id, sequence.epoch)
        if self.sequences.get(sequence.request_id) is sequence:
            del self.sequences[sequence.request_id]

    def wake_at(self, time_s: float) -> None:
        """Ask for a Tick, unless an earlier one is asked for already."""
        if time_s < self.alarm:
            self.alarm = time_s
            self.actions.append(WakeAt(time_s=time_s))

    def validate_queue(self, queue: list[Sequence], state: SequenceState) -> None:
        """Raise InternalError unless the queue holds exactly the sequences of this state, in order."""
        expected = {id(sequence) for sequence in self.sequences.values() if sequence.state is state}
        if {id(sequence) for sequence in queue} != expected or queue != sorted(queue, key=order_of):
            raise InternalError(f"the {state.value} queue does not hold the {state.value} sequences in order")
