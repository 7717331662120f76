"""Which sequences a step computes, and how many tokens of each: the modes of ``SchedulingMode``.

With several steps in flight, a sequence whose next token is not known yet may take part in the next step all the same:
the executor runs steps in order and knows the token by then (asynchronous scheduling). Not so in a pipeline, where a
token is known when it leaves the last stage: there each step in flight takes its share of the decodes, or one would
hold all of them and leave stages idle. With ``fixed_batches`` that is so, as in DistServe.
"""

from collections.abc import Callable
from functools import partial

from disagg.base.config import SchedulingMode
from disagg.costs.step_times import StepTimes
from disagg.scheduling.by_objectives import scheduling_mode
from disagg.scheduling.step.actions import Chunk
from disagg.scheduling.step.books import Books
from disagg.scheduling.step.builder import StepBuilder
from disagg.scheduling.step.sequence import Sequence, SequenceState
from disagg.scheduling.step.slack import Slack


class Batching:
    """Plans steps from the waiting and running sequences of the books. Only mode SLACK needs ``times``.

    ``make_room`` lets go of blocks that are kept for sequences to come; False when there are none.
    """

    def __init__(
        self, books: Books, num_stages: int, times: StepTimes | None, make_room: Callable[[], bool] = lambda: False
    ) -> None:
        self._make_room = make_room
        self._books = books
        self._start_s = 0.0
        self._last_batch = -1
        self._num_stages = num_stages
        fills: dict[SchedulingMode, Callable[[StepBuilder], None]] = {
            SchedulingMode.CHUNKED: self._fill_chunked,
            SchedulingMode.PREFILL_FIRST: self._fill_prefill_first,
            SchedulingMode.DECODE_FIRST: self._fill_decode_first,
        }
        if times is not None:
            fills[SchedulingMode.SLACK] = partial(self._fill_slack, Slack(times, books.settings.max_batch_tokens))
        self._fill = fills[scheduling_mode(books.settings)]

    def plan(self, start_s: float) -> tuple[tuple[Sequence, Chunk], ...]:
        """Return the next step, empty when there is nothing to compute; its tokens are in flight from now on.

        It is expected to start at ``start_s``, when those in flight have ended.
        """
        self._start_s = start_s
        settings = self._books.settings
        builder = StepBuilder(settings.max_batch_tokens, settings.max_batch_size)
        self._fill(builder)
        return builder.build()

    def _fill_chunked(self, builder: StepBuilder) -> None:
        decoding, prefilling = self._ready()
        self._plan_decodes(builder, decoding)
        self._plan_prompts(builder, prefilling, builder.chunk_size)

    def _fill_prefill_first(self, builder: StepBuilder) -> None:
        decoding, prefilling = self._ready()
        self._plan_prompts(builder, prefilling, builder.whole_size)
        if not len(builder):
            self._plan_decodes(builder, decoding)

    def _fill_decode_first(self, builder: StepBuilder) -> None:
        decoding, _ = self._ready()
        self._plan_decodes(builder, decoding)
        if not self._books.running:
            self._admit(builder, builder.whole_size)

    def _fill_slack(self, slack: Slack, builder: StepBuilder) -> None:
        decoding, prefilling = self._ready()
        self._plan_decodes(builder, decoding)
        slack.begin(builder, self._start_s)
        self._plan_prompts(builder, prefilling, slack.size)

    def _ready(self) -> tuple[list[Sequence], list[Sequence]]:
        """Return the running sequences that may take part: those with one token to compute, and those with more."""
        decoding, prefilling = [], []
        for sequence in self._books.running:
            if sequence.num_in_flight and not self._may_run_on(sequence):
                continue
            # ``num_remaining``, which is looked at for every sequence in every step
            num_remaining = sequence.num_tokens + sequence.num_coming - sequence.num_computed - sequence.num_in_flight
            if num_remaining == 1:
                decoding.append(sequence)
            elif num_remaining > 1:
                prefilling.append(sequence)
        return decoding, prefilling

    def _plan_prompts(self, builder: StepBuilder, prefilling: list[Sequence], size: Callable[[Sequence], int]) -> None:
        """Plan the prompts that have begun, and let in those that wait, in the order of both together.

        What was read ahead from disk has its blocks before others that are served before it.
        """
        for sequence in prefilling:
            self._admit(builder, size, before=sequence)
            self._plan(builder, sequence, size(sequence))
        self._admit(builder, size)

    def _plan_decodes(self, builder: StepBuilder, decoding: list[Sequence]) -> None:
        settings = self._books.settings
        if self._num_stages > 1 and settings.fixed_batches:
            decoding = self._next_fixed_batch(decoding)
        elif self._num_stages > 1:
            decoding = decoding[: -(-len(self._books.running) // settings.max_steps_in_flight)]
        if builder.has_places(len(decoding)) and self._hold_one_more(decoding):
            builder.add_decodes(decoding)
            return
        for sequence in decoding:
            if not builder.has_place:
                return
            self._plan(builder, sequence, 1)

    def _hold_one_more(self, sequences: list[Sequence]) -> bool:
        """Return whether sequences neither take nor let go of a block for one token more of each."""
        ledger = self._books.ledger
        size = 0 if ledger.has_windows else ledger.block_size
        return not [one for one in sequences if one.num_computed + one.num_in_flight >= len(one.block_ids) * size]

    def _next_fixed_batch(self, decoding: list[Sequence]) -> list[Sequence]:
        """Return the next batch in turn that has sequences to decode; those that are in none yet join it.

        So the batches take turns and grow apart: one that is larger takes longer, and more of what comes joins it
        (DistServe, ``decoding_stage_scheduler.py``: ``batch_queues``, ``get_next_batch``).
        """
        num_batches = self._books.settings.max_steps_in_flight
        for _ in range(num_batches):
            self._last_batch = (self._last_batch + 1) % num_batches
            batch = [sequence for sequence in decoding if sequence.batch in (None, self._last_batch)]
            if batch:
                for sequence in batch:
                    sequence.batch = self._last_batch
                return batch
        return []

    def _may_run_on(self, sequence: Sequence) -> bool:
        """True unless a sequence has to wait for its step in flight: see the module's words."""
        return self._num_stages == 1 and not sequence.ends_with_step_in_flight

    def _plan(self, builder: StepBuilder, sequence: Sequence, num_tokens: int) -> None:
        """Plan a running sequence's next tokens, preempting later ones when blocks are short."""
        if not num_tokens or sequence.state is not SequenceState.RUNNING:
            return
        books = self._books
        planned = sequence.num_computed + sequence.num_in_flight
        while not books.ledger.grow(sequence, planned + num_tokens):
            if self._make_room():
                continue
            # What another instance may be reading stays: it ends with the prompt.
            victim = next((s for s in reversed(books.running) if not s.num_in_flight and not s.num_offered), sequence)
            if victim.order <= sequence.order:
                return  # leases and steps in flight hold the rest; their end will wake this sequence
            builder.drop(victim)
            self._preempt(victim)
        builder.add(sequence, num_tokens)

    def _admit(self, builder: StepBuilder, size: Callable[[Sequence], int], before: Sequence | None = None) -> None:
        """Let waiting sequences in, in order and without skipping, while places, tokens and blocks last.

        Only those that are served before the one that is given, if one is.
        """
        books = self._books
        while books.waiting and books.has_room and builder.has_place:
            sequence = books.waiting[0]
            if before is not None and sequence.order > before.order:
                return
            # A handed-over sequence does not grow, so it needs no headroom.
            if not size(sequence) or not books.ledger.admit(sequence, books.is_busy and not sequence.hand_over):
                return
            del books.waiting[0]
            books.run(sequence)
            # A cached prefix has made what is left another chunk, which may no longer fit.
            if num_tokens := size(sequence):
                builder.add(sequence, num_tokens)

    def _preempt(self, sequence: Sequence) -> None:
        books = self._books
        books.statistics.num_preemptions += 1
        books.running.remove(sequence)
        books.ledger.free(sequence)
        sequence.batch = None
        sequence.move(SequenceState.WAITING, books.now)
        books.wait(sequence)
