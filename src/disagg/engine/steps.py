"""Steps launched and collected: in the loop's own thread, or in one beside it that computes while the loop plans.

``InlineSteps`` computes a step when it is asked for: the way of a CPU instance, whose cores compute anyway.
``ThreadedSteps`` keeps a device busy: step n + 1 is planned and launched while step n runs (asynchronous scheduling).
A sequence's token of step n is appended before step n + 1 begins, in whatever thread, and a sequence that ended with it
takes no part any more.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from disagg.base.clock import Clock
from disagg.base.ids import BlockHash, RequestId
from disagg.base.messages import SequenceOutput, StageStamps
from disagg.base.sampling import FinishReason, PositionLogprobs
from disagg.engine.executor import ChunkResult, Executor, Work
from disagg.engine.lent_cores import OWN_CORES, Cores
from disagg.engine.sequences import LiveSequence
from disagg.scheduling.step.events import StepDone, StepFailure, StepResult
from disagg.transfer.step_progress import StepProgress


class NewToken(msgspec.Struct, frozen=True, gc=False):
    """A token that a step brought for a sequence, and why it is the last, if it is."""

    sequence: LiveSequence
    token_id: int
    logprobs: PositionLogprobs | None
    finished: FinishReason | None
    block_hashes: tuple[BlockHash, ...] = ()
    """Names of the KV blocks that it fills."""

    def output(self, stamps: StageStamps | None = None, num_cached_tokens: int = 0) -> SequenceOutput:
        """Return what the router is told; ``stamps`` come with the first token of this instance."""
        sequence, finished = self.sequence, self.finished
        return SequenceOutput(
            request_id=sequence.request_id,
            epoch=sequence.epoch,
            token_ids=(self.token_id,),
            finish_reason=finished,
            stop_token_id=sequence.stop_token_id,
            logprobs=(self.logprobs,) if self.logprobs is not None else (),
            prompt_logprobs=sequence.take_prompt_logprobs() if stamps is not None else (),
            num_cached_tokens=num_cached_tokens,
            stamps=stamps,
        )


@dataclass(frozen=True, slots=True)
class CompletedStep:
    """What a step brought: the core's event, and the values that it is about."""

    done: StepDone
    tokens: dict[RequestId, NewToken]


class Steps(Protocol):
    """Runs steps, in the order in which they were launched. Its methods belong to the loop's thread."""

    def launch(self, step_id: int, step: Sequence[Work], num_borrowed: int) -> None:
        """Queue a step, which may use so many cores of others."""

    def poll(self) -> CompletedStep | None:
        """Return the next step that has ended; None when none has. Raises what the executor raised."""

    def close(self) -> None:
        """Let what runs end, and drop what waits."""


class InlineSteps:
    """Computes in the loop's thread. See ``Steps``; ``progress`` takes what others see of a step that runs."""

    def __init__(
        self, executor: Executor, clock: Clock, progress: StepProgress | None = None, cores: Cores = OWN_CORES
    ) -> None:
        self._executor = executor
        self._progress = progress
        self._clock = clock
        self._cores = cores
        self._launched: deque[tuple[int, Sequence[Work], int]] = deque()

    def launch(self, step_id: int, step: Sequence[Work], num_borrowed: int) -> None:
        """See ``Steps``."""
        self._cores.need()
        self._launched.append((step_id, step, num_borrowed))

    def poll(self) -> CompletedStep | None:
        """Compute the next step launched; without one, lend the cores."""
        if not self._launched:
            self._cores.lend()
            return None
        step_id, step, num_borrowed = self._launched.popleft()
        self._cores.borrow(num_borrowed)
        return run_step(self._executor, self._clock, step_id, step, self._progress, self._cores)

    def close(self) -> None:
        """See ``Steps``."""
        self._launched.clear()


class ThreadedSteps:
    """Computes in a thread of its own, which calls ``wake`` when a step has ended. See ``InlineSteps``."""

    def __init__(
        self,
        executor: Executor,
        clock: Clock,
        wake: Callable[[], None],
        prepare: Callable[[], None],
        progress: StepProgress | None = None,
    ) -> None:
        """Start the thread; it calls ``prepare`` first."""
        self._progress = progress
        self._executor = executor
        self._clock = clock
        self._wake = wake
        self._launched: queue.SimpleQueue[tuple[int, Sequence[Work]] | None] = queue.SimpleQueue()
        self._ended: deque[CompletedStep | Exception] = deque()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, args=(prepare,), name="steps", daemon=True)
        self._thread.start()

    def launch(self, step_id: int, step: Sequence[Work], num_borrowed: int) -> None:
        """See ``Steps``."""
        self._launched.put((step_id, step))

    def poll(self) -> CompletedStep | None:
        """See ``Steps``."""
        if not self._ended:
            return None
        ended = self._ended.popleft()
        if isinstance(ended, Exception):
            raise ended
        return ended

    def close(self) -> None:
        """See ``Steps``."""
        self._is_closing = True
        self._launched.put(None)
        self._thread.join()

    def _run(self, prepare: Callable[[], None]) -> None:
        prepare()
        while (launched := self._launched.get()) is not None and not self._is_closing:
            try:
                self._ended.append(run_step(self._executor, self._clock, *launched, self._progress))
            except Exception as error:
                self._ended.append(error)
            self._wake()


def run_step(
    executor: Executor,
    clock: Clock,
    step_id: int,
    step: Sequence[Work],
    progress: StepProgress | None = None,
    cores: Cores = OWN_CORES,
) -> CompletedStep:
    """Compute a step and append its tokens. Sequences that ended in an earlier step are left out."""
    started_s = clock.now()
    if progress is not None:
        progress.begin(step_id)
    wanted = [work for work in step if work.sequence.finished is None and work.sequence.failure is None]
    results = iter(executor.run(wanted) if wanted else ())
    if progress is not None:
        progress.end()
    tokens: dict[RequestId, NewToken] = {}
    sampled: list[StepResult] = []
    failed: list[StepFailure] = []
    for work in step:
        sequence = work.sequence
        is_wanted = sequence.finished is None and sequence.failure is None
        token = _accept(work, next(results)) if is_wanted else None
        if sequence.failure is not None:
            failed.append(StepFailure(work.chunk.request_id, sequence.failure.kind, sequence.failure.message))
        elif work.chunk.samples:
            names = () if token is None else token.block_hashes
            sampled.append(StepResult(work.chunk.request_id, sequence.finished, names))
        if token is not None:
            tokens[work.chunk.request_id] = token
    done = StepDone(
        step_id=step_id,
        results=tuple(sampled),
        failed=tuple(failed),
        duration_s=clock.now() - started_s,
        borrowed_s=cores.take_borrowed_s(),
    )
    return CompletedStep(done, tokens)


def _accept(work: Work, result: ChunkResult) -> NewToken | None:
    sequence = work.sequence
    if result.failure is not None:
        sequence.failure = result.failure
        return None
    if result.prompt_logprobs:
        sequence.add_prompt_logprobs(work.chunk.start + 1, result.prompt_logprobs)
    if result.token_id is None:
        return None
    names = sequence.append(result.token_id)
    return NewToken(sequence, result.token_id, result.logprobs, sequence.finished, names)
