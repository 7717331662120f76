"""In which order calls are sent, and what each waits for. Time and sending are handed in."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from disagg.base.errors import ConfigurationError
from disagg.bench.client.load_plan import ClosedLoad, Load, OpenLoad, SessionLoad
from disagg.measure.workload import PrefixBlocks


@dataclass(frozen=True, slots=True)
class Call:
    """One request to send. ``think_s`` is waited after the end of the call before it."""

    index: int
    prompt_len: int
    output_len: int
    prefix: PrefixBlocks
    think_s: float = 0.0
    session: str = ""
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Chain:
    """Calls that wait for one another. ``start_s`` is NaN where the first one waits for a free user."""

    calls: tuple[Call, ...]
    start_s: float


class RunClock(Protocol):
    """Time since the start of the run, in seconds."""

    def now(self) -> float:
        """Return the time."""

    async def sleep_until(self, moment_s: float) -> None:
        """Return at ``moment_s``, or at once when it has passed."""


Send = Callable[[Call, float], Awaitable[None]]
"""Sends a call that was due at a time, and returns when it has ended, however it did."""


def chains_of(load: Load) -> list[Chain]:
    """Return what is sent, in order; calls are numbered from 0. Raises ConfigurationError for an empty load."""
    chains = _session_chains(load) if isinstance(load, SessionLoad) else _single_chains(load)
    if not any(chain.calls for chain in chains):
        raise ConfigurationError("the workload holds no requests")
    return chains


def _single_chains(load: OpenLoad | ClosedLoad) -> list[Chain]:
    think_s = load.think_s if isinstance(load, ClosedLoad) else 0.0
    chains = []
    for index, spec in enumerate(load.requests):
        start_s = spec.arrival_s if isinstance(load, OpenLoad) else math.nan
        if isinstance(load, OpenLoad) and math.isnan(start_s):
            raise ConfigurationError(f"request {index} has no arrival time: give a rate, or a number of users")
        chains.append(Chain((Call(index, spec.prompt_len, spec.output_len, spec.prefix, think_s),), start_s))
    return chains


def _session_chains(load: SessionLoad) -> list[Chain]:
    chains = []
    first = 0
    for session in load.sessions:
        calls = tuple(
            Call(first + turn, call.prompt_len, call.output_len, call.prefix, call.think_s, session.name, turn)
            for turn, call in enumerate(session.calls)
        )
        first += len(calls)
        chains.append(Chain(calls, session.start_s if load.num_users is None else math.nan))
    # By start, as users send them; the numbers stay those of the file.
    return sorted(chains, key=lambda chain: chain.start_s) if load.num_users is None else chains


def num_users_of(load: Load) -> int | None:
    """Return how many send at once; None for a load with times of its own."""
    return None if isinstance(load, OpenLoad) else load.num_users


async def drive(chains: Sequence[Chain], num_users: int | None, send: Send, clock: RunClock) -> None:
    """Send all chains, each at its start or, with ``num_users``, whenever a user is free. Cancelling ends all sends."""
    async with asyncio.TaskGroup() as group:
        if num_users is not None:
            waiting = iter(chains)
            for _ in range(min(num_users, len(chains))):
                group.create_task(_work(waiting, send, clock))
            return
        for chain in chains:
            await clock.sleep_until(chain.start_s)
            group.create_task(_follow(chain, chain.start_s, send, clock))


async def _work(chains: Iterator[Chain], send: Send, clock: RunClock) -> None:
    """Be one user: take chain after chain, thinking before each but the first."""
    ended_s: float | None = None
    for chain in chains:
        if not chain.calls:
            continue
        due_s = clock.now() if ended_s is None else ended_s + chain.calls[0].think_s
        ended_s = await _follow(chain, due_s, send, clock)


async def _follow(chain: Chain, due_s: float, send: Send, clock: RunClock) -> float:
    """Send the calls of a chain, the first at ``due_s``; return when the last one ended."""
    for turn, call in enumerate(chain.calls):
        if turn > 0:
            due_s = clock.now() + call.think_s
        await clock.sleep_until(due_s)
        await send(call, due_s)
    return clock.now()
