"""A run under way: what is sent, what has ended, and the watch over it."""

import asyncio
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from disagg.bench.client.answer_stream import StreamReader
from disagg.bench.client.attempt import Attempt
from disagg.bench.client.calls import Call, Chain, drive
from disagg.bench.client.connection import ConnectionPool
from disagg.bench.client.load_plan import Limits
from disagg.bench.client.progress import LoadProgress, Tally
from disagg.bench.client.stopping import reason_to_stop
from disagg.measure.record import Ending, RequestRecord

Watch = Callable[[LoadProgress], None]
"""Called about twice a second while a run goes on."""

INTERRUPTED: Final = "interrupted"
"""Why a run stopped that was ended by Ctrl-C."""
_CHECK_S: Final = 0.05
"""How often the rules that end a run are applied, and the event loop's lag is taken."""
_WATCH_S: Final = 0.5


class LoadRun:
    """One run: ``drive`` it, then take its ``records``. It is the clock and the sender of ``calls.drive``."""

    def __init__(self, attempts: Sequence[Attempt], limits: Limits, pool: ConnectionPool, watch: Watch | None) -> None:
        self._attempts = {attempt.call.index: attempt for attempt in attempts}
        self._limits = limits
        self._pool = pool
        self._watch = watch
        self._tally = Tally(len(attempts), limits.slo)
        self._running: dict[int, Attempt] = {}
        self._reader = StreamReader()
        self._records: dict[int, RequestRecord] = {}
        self._prompt_tokens: dict[int, int] = {}
        self._starts: dict[int, float] = {}
        self._driving: asyncio.Task[None] | None = None
        self._started_s = 0.0
        self.started_unix_s = 0.0
        self.wall_s = 0.0
        self.cpu_s = 0.0
        self.lags: list[float] = []
        """How late the event loop was for its own timer, in seconds."""
        self.stopped = ""
        """Why not everything was sent and awaited."""

    async def drive(self, chains: Sequence[Chain], num_users: int | None) -> None:
        """Send everything, or as much as the limits let; return when nothing is under way any more."""
        self._started_s, self.started_unix_s = time.perf_counter(), time.time()
        self._starts = {one.calls[0].index: one.start_s for one in chains if one.calls and not math.isnan(one.start_s)}
        cpu_s = time.process_time()
        self._driving = asyncio.create_task(drive(chains, num_users, self._send, self))
        watching = asyncio.create_task(self._keep_watch())
        with _interrupt_calls(lambda: self._stop(INTERRUPTED)):
            try:
                await self._driving
            except asyncio.CancelledError:
                if not self.stopped:  # not by the run's own limits: the caller is being cancelled
                    raise
            finally:
                watching.cancel()
        self.wall_s = self.now()
        self.cpu_s = time.process_time() - cpu_s

    def now(self) -> float:
        """Return seconds since the start of the run."""
        return time.perf_counter() - self._started_s

    async def sleep_until(self, moment_s: float) -> None:
        """Return at ``moment_s``; others get a turn in any case."""
        await asyncio.sleep(max(0.0, moment_s - self.now()))
        while (rest_s := moment_s - self.now()) > 0:  # a timer's resolution is 1 ms, and it may be early
            await asyncio.sleep(rest_s)

    async def _send(self, call: Call, due_s: float) -> None:
        attempt = self._attempts[call.index]
        attempt.due_s = due_s
        self._running[call.index] = attempt
        self._tally.num_sent += 1
        if self._tally.num_outstanding > self._limits.max_outstanding:
            self._apply_limits(num_overdue=0)
        await attempt.send(self._pool, self._limits.request_timeout_s)
        del self._running[call.index]
        self._tally.add(self._read(attempt))

    def _read(self, attempt: Attempt) -> RequestRecord:
        record, prompt_tokens = attempt.record(self._reader, self._started_s)
        self._records[record.index] = record
        if prompt_tokens is not None:
            self._prompt_tokens[record.index] = prompt_tokens
        attempt.answer.pieces.clear()
        return record

    async def _keep_watch(self) -> None:
        due_s = shown_s = self.now()
        while True:
            due_s += _CHECK_S
            await self.sleep_until(due_s)
            now_s = self.now()
            self.lags.append(now_s - due_s)
            due_s = max(due_s, now_s - _CHECK_S)
            self._apply_limits(num_overdue=self._count_overdue())
            if self._watch is not None and now_s >= shown_s + _WATCH_S:
                shown_s = now_s
                self._watch(self._tally.look(now_s))

    def _count_overdue(self) -> int:
        """Return how many requests under way wait for their first token longer than the objective."""
        if self._limits.target is None:
            return 0
        sent_before_s = time.perf_counter() - self._limits.slo.ttft_s
        return sum(one.sent_s < sent_before_s and not one.answer.pieces for one in self._running.values())

    def _apply_limits(self, num_overdue: int) -> None:
        reason = reason_to_stop(
            self._limits,
            elapsed_s=self.now(),
            num_requests=self._tally.num_requests,
            num_outstanding=self._tally.num_outstanding,
            num_missed=self._tally.num_missed + num_overdue,
        )
        if reason is not None:
            self._stop(reason)

    def _stop(self, reason: str) -> None:
        """Cancel everything under way: it stays unfinished."""
        self.stopped = self.stopped or reason
        assert self._driving is not None, "a run that has not begun"
        self._driving.cancel()

    def records(self) -> tuple[RequestRecord, ...]:
        """Return a record for each request, sent or not, in the order of the load."""
        return tuple(self._records.get(index) or self._unfinished(index) for index in sorted(self._attempts))

    def notes(self) -> list[str]:
        """Return what is wrong with the lengths, in words."""
        return length_notes(self.records(), self._prompt_tokens)

    def _unfinished(self, index: int) -> RequestRecord:
        attempt = self._attempts[index]
        if math.isnan(attempt.due_s):
            # Never sent: it was due later, or when the call before it had ended.
            attempt.due_s = self._starts.get(index, self.wall_s)
        return attempt.record(self._reader, self._started_s)[0]


def length_notes(records: Sequence[RequestRecord], prompt_tokens: Mapping[int, int]) -> list[str]:
    """Return in words where prompts, as the server counted them, or answers have other lengths, or no TPOT."""
    notes = []
    finished = [record for record in records if record.ending is Ending.FINISHED]
    wrong = [record for record in finished if prompt_tokens.get(record.index, record.prompt_len) != record.prompt_len]
    if wrong:
        notes.append(
            f"the server counted other lengths for {len(wrong)} of {len(finished)} prompts (for the first, "
            f"{prompt_tokens[wrong[0].index]} tokens instead of {wrong[0].prompt_len}): name its tokenizer"
        )
    short = [record for record in finished if record.num_output_tokens < record.max_output_len]
    if short:
        notes.append(
            f"{len(short)} of {len(finished)} answers are shorter than asked (the first, {short[0].num_output_tokens} "
            f"of {short[0].max_output_len} tokens): the server may not know ignore_eos, or its limit is lower"
        )
    unknown = sum(record.is_tpot_unknown for record in finished)
    if unknown:
        notes.append(
            f"{unknown} of {len(finished)} answers came in one event: their TPOT is unknown, and an objective for it "
            "counts as missed; is something between that collects streams?"
        )
    return notes


@contextmanager
def _interrupt_calls(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C call ``stop``; a second one ends the program as always. Only the main thread may do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)
