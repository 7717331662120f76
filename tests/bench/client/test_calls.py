"""When calls are sent: at their times whatever the answers do, or when the user before has an answer. No clock runs."""

import asyncio
import heapq
import math
from collections.abc import Awaitable, Callable

import pytest

from disagg.base.errors import ConfigurationError
from disagg.bench.client.calls import Call, chains_of, drive, num_users_of
from disagg.bench.client.load_plan import ClosedLoad, Load, OpenLoad, SessionLoad
from disagg.measure.workload import RequestSpec, Session, SessionCall


class FakeClock:
    """Time that stands still until nothing else is left to do."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []
        self._num_sleepers = 0

    def now(self) -> float:
        return self.now_s

    async def sleep_until(self, moment_s: float) -> None:
        await asyncio.sleep(0)
        if moment_s > self.now_s:
            woken = asyncio.Event()
            self._num_sleepers += 1
            heapq.heappush(self._sleepers, (moment_s, self._num_sleepers, woken))
            await woken.wait()

    async def run(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        while not task.done():
            for _ in range(20):
                await asyncio.sleep(0)
            if self._sleepers and not task.done():
                self.now_s, _, woken = heapq.heappop(self._sleepers)
                woken.set()
        await task


async def sent_times(load: Load, answer_s: Callable[[Call], float]) -> list[tuple[float, int]]:
    """Drive a load whose answers take ``answer_s``; return when each call was sent, in order."""
    clock, sent = FakeClock(), list[tuple[float, int]]()

    async def send(call: Call, due_s: float) -> None:
        assert due_s <= clock.now()
        sent.append((clock.now(), call.index))
        await clock.sleep_until(clock.now() + answer_s(call))

    await clock.run(drive(chains_of(load), num_users_of(load), send, clock))
    return sent


def requests(*arrivals: float) -> list[RequestSpec]:
    return [RequestSpec(prompt_len=1, output_len=1, arrival_s=arrival_s) for arrival_s in arrivals]


async def test_an_open_loop_sends_at_its_times_however_slow_the_answers_are() -> None:
    sent = await sent_times(OpenLoad(requests(0.0, 1.0, 1.0, 2.5)), lambda call: 1000.0)
    assert sent == [(0.0, 0), (1.0, 1), (1.0, 2), (2.5, 3)]


async def test_a_closed_loop_sends_when_a_user_has_an_answer_and_has_thought() -> None:
    load = ClosedLoad(requests(*[math.nan] * 5), num_users=2, think_s=1.0)
    sent = await sent_times(load, lambda call: {0: 10.0}.get(call.index, 2.0))
    assert sent == [(0.0, 0), (0.0, 1), (3.0, 2), (6.0, 3), (9.0, 4)]


async def test_more_users_than_requests_are_no_harm() -> None:
    assert len(await sent_times(ClosedLoad(requests(math.nan, math.nan), num_users=9), lambda call: 1.0)) == 2


def session(name: str, start_s: float, *thinks_s: float) -> Session:
    return Session(name, tuple(SessionCall(1, 1, think_s) for think_s in thinks_s), start_s)


async def test_the_calls_of_a_session_wait_for_the_answer_before_them() -> None:
    load = SessionLoad([session("a", 0.0, 0.0, 3.0, 1.0), session("b", 1.0, 0.0, 0.5)])
    assert await sent_times(load, lambda call: 2.0) == [(0.0, 0), (1.0, 3), (3.5, 4), (5.0, 1), (8.0, 2)]


async def test_users_take_one_session_after_the_other() -> None:
    sessions = [session(name, math.nan, 0.0, 1.0) for name in "abc"]
    sent = await sent_times(SessionLoad(sessions, num_users=1), lambda call: 2.0)
    assert sent == [(0.0, 0), (3.0, 1), (5.0, 2), (8.0, 3), (10.0, 4), (13.0, 5)]


def test_calls_know_their_session_and_turn() -> None:
    chains = chains_of(SessionLoad([session("late", 5.0, 0.0), session("early", 1.0, 0.0, 0.0)]))
    assert [(call.index, call.session, call.turn) for chain in chains for call in chain.calls] == [
        (1, "early", 0),
        (2, "early", 1),
        (0, "late", 0),
    ]


async def test_cancelling_ends_what_is_under_way() -> None:
    clock, ended = FakeClock(), list[int]()

    async def send(call: Call, due_s: float) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(call.index)

    load = OpenLoad(requests(0.0, 0.0, 99.0))
    driving = asyncio.ensure_future(drive(chains_of(load), None, send, clock))
    for _ in range(20):
        await asyncio.sleep(0)
    driving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await driving
    assert sorted(ended) == [0, 1]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: chains_of(OpenLoad(())), "no requests"),
        (lambda: chains_of(OpenLoad(requests(math.nan))), "no arrival time"),
        (lambda: ClosedLoad(requests(0.0), num_users=0), "at least one"),
        (lambda: SessionLoad([session("a", math.nan, 0.0)]), "no start"),
    ],
)
def test_a_load_that_cannot_be_sent_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()
