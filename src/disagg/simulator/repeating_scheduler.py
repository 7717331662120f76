"""The step scheduler with one more ability: to repeat its last step without being asked each time.

Between two changes of a decode batch every call of the scheduler would do the same: book one token for each sequence,
take a block here and there, and order the same step again. ``repeat`` does that many times over in one go, so that a
simulation costs by changes, not by tokens. Every decision is still the base class's: a repetition is allowed only
while there is none to take.
"""

from disagg.base.errors import InternalError
from disagg.scheduling.step.scheduler import StepScheduler


class RepeatingScheduler(StepScheduler):
    """A ``StepScheduler`` whose decode steps can be repeated."""

    @property
    def num_held_blocks(self) -> int:
        """Blocks that are neither free nor merely cached."""
        pool = self._ledger.pool
        return pool.num_blocks - pool.num_available

    def num_repeats(self) -> int:
        """Return how often at least the step in flight would come again if nothing happened but its end; 0 if never.

        That holds when the step is the only one and decodes every running sequence, and while blocks last, so that
        none is preempted. What waits then goes on waiting: it was left out of this step for want of a place or of
        blocks, and neither becomes more by decoding.
        """
        if len(self._steps) != 1 or self._settings.max_steps_in_flight != 1:
            return 0
        (step,) = self._steps.values()
        if len(step) != len(self._running):
            return 0
        if any(chunk.num_tokens != 1 or sequence.hand_over or sequence.cancelled for sequence, chunk in step):
            return 0
        # Each sequence takes a block for every block_size tokens, and one more at most.
        num_blocks_each = self._ledger.pool.num_available // len(step)
        return max(0, num_blocks_each - 1) * self._ledger.block_size

    def repeat(self, count: int) -> int:
        """Do what ``count`` ends of the step in flight, none of which ends a sequence, would have done.

        Returns the number of the step in flight, which is now the last repetition. Its chunks still name the
        positions of the first.
        """
        ((step_id, step),) = self._steps.items()
        ledger = self._ledger
        for sequence, _ in step:
            sequence.num_tokens += count
            sequence.num_computed += count
            if not ledger.grow(sequence, sequence.num_tokens):
                raise InternalError(f"{count} repetitions of step {step_id} need more blocks than there are")
        self._statistics.num_steps += count
        self._statistics.num_decode_tokens += count * len(step)
        self._steps = {step_id + count: step}
        return step_id + count
