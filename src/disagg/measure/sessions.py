"""Sessions of agents: calls that wait for the answer before them, and for the tool or person between.

Two formats are read, both JSON lines, gzipped where the name ends in ``.gz``: that of kv-cache-tester, flattened, one
call a line, and that of Azure's GitHub Copilot traces, one session a line (``copilot_sessions``).
"""

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from disagg.base.errors import ConfigurationError
from disagg.measure.copilot_sessions import CopilotSession, sessions_of
from disagg.measure.trace_rows import (
    UNREADABLE,
    Milliseconds,
    PromptTokens,
    TokenCount,
    numbered_lines,
    open_text,
)
from disagg.measure.workload import NO_PREFIX, PrefixBlocks, Session, SessionCall

AGENT_BLOCK_TOKENS: Final = 64
_LOCAL_IDS: Final = 1 << 32
"""Ids are local to a session; those of session n start at (n + 1) times this."""


class _Call(msgspec.Struct, frozen=True):
    """A line of a session trace (kv-cache-tester, flattened)."""

    session_id: str
    input_length: PromptTokens
    output_length: TokenCount
    agent: str = "main"
    t: Milliseconds = 0.0
    think_ms: Milliseconds = 0.0
    hash_runs: tuple[tuple[Annotated[int, Meta(ge=0, lt=_LOCAL_IDS)], Annotated[int, Meta(ge=1)]], ...] = ()

    def __post_init__(self) -> None:
        num_ids, num_blocks = sum(count for _, count in self.hash_runs), self.input_length // AGENT_BLOCK_TOKENS
        # A last block that is not full may be named as well.
        if self.hash_runs and not num_blocks <= num_ids <= num_blocks + 1:
            raise ValueError(
                f"hash_runs of {num_ids} blocks for {self.input_length} tokens: one for each full block of "
                f"{AGENT_BLOCK_TOKENS} tokens, that is {num_blocks}"
            )


class _Either(msgspec.Struct, frozen=True):
    """What tells the formats apart."""

    turns: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class SessionWorkload:
    """Sessions of a file that start by a Poisson process of ``rate`` sessions/s, shortened to fit a model."""

    path: Path
    rate: float
    num_sessions: int | None = None
    longest_think_s: float = 30.0
    length_factor: float = 1.0
    max_total_len: int = 2**31

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def is_drawn(self) -> bool:
        """True: another seed gives other starts."""
        return True

    def at_rate(self, rate: float) -> "SessionWorkload":
        """Return the same sessions at another rate."""
        return replace(self, rate=rate)

    def draw(self, seed: int) -> Iterator[Session]:
        """Yield the sessions in order of their starts, those with a call that fits; equal seeds give equal starts."""
        sessions = read_sessions(self.path, longest_think_s=self.longest_think_s, num_sessions=self.num_sessions)
        short = (shorten(session, self.length_factor, self.max_total_len) for session in sessions)
        started = start_sessions((session for session in short if session.calls), self.rate, seed)
        yield from sorted(started, key=attrgetter("start_s"))


def read_sessions(path: Path, *, longest_think_s: float = 30.0, num_sessions: int | None = None) -> Iterator[Session]:
    """Yield the sessions of a file in its order, each agent of a session as a session of its own.

    A sub-agent starts at its recorded time after the session's start. Thinking is cut to ``longest_think_s``: people
    who come back after lunch. Raises ConfigurationError, with the line, when the file is no session trace.
    """
    try:
        with open_text(path) as text:
            lines = numbered_lines(text)
            first = next(lines, None)
            if first is None:
                raise ConfigurationError(f"{path} holds no sessions")
            read = _copilot_sessions if _is_copilot(first[1]) else _agent_sessions
            yield from read(path, chain([first], lines), longest_think_s, num_sessions)
    except UNREADABLE as error:
        raise ConfigurationError(f"cannot read the sessions {path}: {error}") from error


def start_sessions(sessions: Iterable[Session], rate: float, seed: int) -> Iterator[Session]:
    """Yield the sessions with starts drawn from a Poisson process of ``rate`` sessions/s; sub-agents keep their lag."""
    if not 0 < rate < math.inf:
        raise ConfigurationError(f"{rate} sessions/s cannot be: give a rate above 0")
    rng = random.Random(seed)
    started_s = 0.0
    for session in sessions:
        lag_s = 0.0
        if "/" in session.name:
            lag_s = session.start_s
        else:
            started_s += rng.expovariate(rate)
        yield replace(session, start_s=started_s + lag_s)


def shorten(session: Session, factor: float, max_total_len: int) -> Session:
    """Return the session with all lengths times ``factor``, ended before the first call that would be too long."""
    calls = []
    for call in session.calls:
        short = SessionCall(
            prompt_len=max(1, round(call.prompt_len * factor)),
            output_len=max(1, round(call.output_len * factor)),
            think_s=call.think_s,
            prefix=replace(call.prefix, block_tokens=max(1, round(call.prefix.block_tokens * factor))),
        )
        if short.prompt_len + short.output_len > max_total_len:
            break
        calls.append(short)
    return replace(session, calls=tuple(calls))


Lines = Iterable[tuple[int, str]]


def _is_copilot(line: str) -> bool:
    try:
        return msgspec.json.decode(line, type=_Either).turns is not msgspec.UNSET
    except msgspec.MsgspecError:
        return False


def _copilot_sessions(path: Path, lines: Lines, longest_think_s: float, num_sessions: int | None) -> Iterator[Session]:
    decoder = msgspec.json.Decoder(CopilotSession)
    names: set[str] = set()
    for number, (line_number, line) in enumerate(lines):
        if number == num_sessions:
            return
        try:
            recorded = decoder.decode(line)
            sessions = sessions_of(recorded, longest_think_s, (number + 1) * _LOCAL_IDS)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ConfigurationError(f"{path}, line {line_number} is no session of GitHub Copilot: {error}") from error
        if recorded.session_id in names:
            raise ConfigurationError(f"{path}, line {line_number}: the session {recorded.session_id} is there twice")
        names.add(recorded.session_id)
        yield from sessions


def _agent_sessions(path: Path, lines: Lines, longest_think_s: float, num_sessions: int | None) -> Iterator[Session]:
    for number, (name, calls) in enumerate(groupby(_calls(path, lines), key=attrgetter("session_id"))):
        if number == num_sessions:
            return
        by_agent: dict[str, list[_Call]] = {}
        for call in calls:
            by_agent.setdefault(call.agent, []).append(call)
        for agent, own in by_agent.items():
            yield Session(
                name=name.replace("/", "_") if agent == "main" else f"{name.replace('/', '_')}/{agent}",
                calls=tuple(_call(one, number, longest_think_s) for one in own),
                start_s=own[0].t * 1e-3,
            )


def _calls(path: Path, lines: Lines) -> Iterator[_Call]:
    decoder = msgspec.json.Decoder(_Call)
    names: set[str] = set()
    latest = None
    for number, line in lines:
        try:
            call = decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise ConfigurationError(f"{path}, line {number} is no call of a session: {error}") from error
        if call.session_id != latest and call.session_id in names:
            raise ConfigurationError(
                f"{path}, line {number}: other sessions are between calls of {call.session_id}: sort the file by "
                "session"
            )
        latest = call.session_id
        names.add(latest)
        yield call


def _call(call: _Call, session: int, longest_think_s: float) -> SessionCall:
    base = (session + 1) * _LOCAL_IDS
    ids = tuple(base + first + offset for first, count in call.hash_runs for offset in range(count))
    return SessionCall(
        prompt_len=call.input_length,
        output_len=max(1, call.output_length),
        think_s=min(call.think_ms * 1e-3, longest_think_s),
        prefix=PrefixBlocks(ids, AGENT_BLOCK_TOKENS) if ids else NO_PREFIX,
    )
