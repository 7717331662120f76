"""An exception in a step ends the sequence that raises it, and the instance only when nothing else works."""

from collections.abc import Callable, Sequence

import pytest
import torch
from cluster import request

from disagg.base.errors import InternalError
from disagg.base.ids import BlockId, RequestId
from disagg.engine.executor import ChunkResult
from disagg.engine.isolation import MAX_FAILURES, IsolatingExecutor
from disagg.engine.sequences import LiveSequence, Work
from disagg.scheduling.step.actions import Chunk


class Raising:
    """Raises ``error`` for a step with a sequence named bad."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self, step: Sequence[Work]) -> list[ChunkResult]:
        if any(work.sequence.request_id.startswith("bad") for work in step):
            raise self.error
        return [ChunkResult(token_id=len(work.sequence.request_id)) for work in step]

    def publish_blocks(self, blocks: Sequence[BlockId]) -> None:
        raise NotImplementedError

    def receive_blocks(self, blocks: Sequence[BlockId]) -> None:
        raise NotImplementedError


def step(*names: str) -> list[Work]:
    return [Work(LiveSequence(request(name, 3)), Chunk(RequestId(name), 0, 3, (BlockId(0),), True)) for name in names]


def test_only_the_sequence_that_raises_fails() -> None:
    executor = IsolatingExecutor(Raising(InternalError("it overflows")))
    first, second, third = executor.run(step("a", "bad", "ccc"))
    assert (first.token_id, third.token_id) == (1, 3)
    assert second.failure is not None
    assert "it overflows" in second.failure.message


def test_what_an_unforeseen_exception_says_stays_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    (result,) = IsolatingExecutor(Raising(ValueError("secret"))).run(step("bad"))
    assert result.failure is not None
    assert "secret" not in result.failure.message
    assert "secret" in caplog.text


def test_failures_between_which_others_succeed_never_end_the_instance() -> None:
    executor = IsolatingExecutor(Raising(InternalError("it overflows")))
    for _ in range(3 * MAX_FAILURES):
        executor.run(step("bad"))
        executor.run(step("good"))


def test_an_instance_that_computes_nothing_any_more_ends() -> None:
    executor = IsolatingExecutor(Raising(InternalError("it overflows")))
    for _ in range(MAX_FAILURES - 1):
        executor.run(step("bad"))
    with pytest.raises(InternalError, match="overflows"):
        executor.run(step("bad"))


def no_memory_for_a_tensor() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize("make", [MemoryError, no_memory_for_a_tensor, torch.OutOfMemoryError])
def test_want_of_memory_is_the_instances_own(make: Callable[[], Exception]) -> None:
    error = make()
    with pytest.raises(type(error)) as caught:
        IsolatingExecutor(Raising(error)).run(step("good", "bad", "good too"))
    assert caught.value is error


def test_a_step_that_finds_no_memory_is_computed_again_one_sequence_at_a_time() -> None:
    class Small(Raising):
        def run(self, step: Sequence[Work]) -> list[ChunkResult]:
            if len(step) > 1:
                raise self.error
            return super().run(step)

    results = IsolatingExecutor(Small(MemoryError())).run(step("a", "bb"))
    assert [result.token_id for result in results] == [1, 2]
