"""What a load consists of: requests with their arrival times, and sessions whose calls wait for one another."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class PrefixBlocks:
    """Names of a prompt's leading blocks of ``block_tokens`` tokens; the last one may be partly filled.

    Two prompts share a prefix as far as their ``ids`` are equal from the start (Mooncake's ``hash_ids``).
    """

    ids: tuple[int, ...] = ()
    block_tokens: int = 512


NO_PREFIX = PrefixBlocks()
"""A prompt that shares nothing with any other."""


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One request to send: lengths in tokens, arrival in seconds from the start (NaN where nothing says when)."""

    prompt_len: int
    output_len: int
    arrival_s: float = math.nan
    prefix: PrefixBlocks = NO_PREFIX
    line: int = 0
    """Line of the file it came from, for messages; 0 where it came from none."""
    service_class: str = ""
    """Name of its class of service; "": none."""


@dataclass(frozen=True, slots=True)
class SessionCall:
    """One call of a session: it is sent ``think_s`` after the answer to the call before it."""

    prompt_len: int
    output_len: int
    think_s: float = 0.0
    prefix: PrefixBlocks = NO_PREFIX


@dataclass(frozen=True, slots=True)
class Session:
    """Calls of one user or agent, in order. ``start_s`` is NaN where nothing says when it starts."""

    name: str
    calls: tuple[SessionCall, ...]
    start_s: float = math.nan


class Workload(Protocol):
    """Requests that arrive whatever becomes of those before them: an open loop."""

    @property
    def name(self) -> str:
        """For reports: file or standard workload, and what was changed."""

    @property
    def rate(self) -> float:
        """Mean arrival rate in requests/s."""

    def __len__(self) -> int: ...

    def draw(self, seed: int) -> Iterator[RequestSpec]:
        """Yield the requests in order of arrival; equal seeds give equal requests."""
