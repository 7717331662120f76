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

from disagg.base.clock import Clock
from disagg.base.ids import RequestId
from disagg.base.messages import SequenceOutput
from disagg.base.sampling import PositionLogprobs
from disagg.engine.executor import Executor
from disagg.engine.lent_cores import OWN_CORES, Cores
from disagg.engine.sequences import LiveSequence, Work
from disagg.scheduling.step.events import StepDone, StepFailure, StepResult
from disagg.transfer.step_progress import StepProgress


@dataclass(frozen=True, slots=True)
class CompletedStep:
    """What a step brought: the core's event, and the values that it is about.

    ``outputs`` are what the router is told of those that have a new token, in the order of the step.
    """

    done: StepDone
    step: Sequence[Work]
    outputs: dict[RequestId, SequenceOutput]

    def take_prompt_logprobs(self, request_id: RequestId) -> tuple[PositionLogprobs, ...]:
        """Return those of a sequence of the step, which go with its first output of this instance."""
        sequence = next(work.sequence for work in self.step if work.sequence.request_id == request_id)
        return sequence.take_prompt_logprobs()


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
    results = executor.run(wanted) if wanted else ()
    if progress is not None:
        progress.end()
    outputs: dict[RequestId, SequenceOutput] = {}
    news: list[StepResult] = []
    failed: list[StepFailure] = []
    for work, result in zip(wanted, results, strict=True):
        sequence, token_id, failure = work.sequence, result.token_id, result.failure
        request_id = sequence.request_id
        if failure is not None:
            sequence.failure = failure
            failed.append(StepFailure(request_id, failure.kind, failure.message))
            continue
        if result.prompt_logprobs:
            sequence.add_prompt_logprobs(work.chunk.start + 1, result.prompt_logprobs)
        if token_id is None:
            continue
        names = sequence.append(token_id)
        if sequence.finished is None and result.logprobs is None:
            outputs[request_id] = SequenceOutput(request_id, sequence.epoch, (token_id,))
        else:
            outputs[request_id] = _output(sequence, token_id, result.logprobs)
        if names or sequence.finished is not None:
            news.append(StepResult(request_id, sequence.finished, names))
    done = StepDone(
        step_id=step_id,
        results=tuple(news),
        failed=tuple(failed),
        duration_s=clock.now() - started_s,
        borrowed_s=cores.take_borrowed_s(),
    )
    return CompletedStep(done, step, outputs)


def _output(sequence: LiveSequence, token_id: int, logprobs: PositionLogprobs | None) -> SequenceOutput:
    return SequenceOutput(
        request_id=sequence.request_id,
        epoch=sequence.epoch,
        token_ids=(token_id,),
        finish_reason=sequence.finished,
        stop_token_id=sequence.stop_token_id,
        logprobs=() if logprobs is None else (logprobs,),
    )
