"""GitHub Copilot's coding agents, June 2026: the sessions that Azure publishes, one a line.

Source: Azure/AzurePublicDataset, ``GitHubCopilotCodingAgentDataset2026.md`` and its ``schema.json`` (CC-BY-4.0; Liu et
al., arXiv 2608.00101). A session has ``turns`` of a user, a turn has ``llm_calls``; of these the start, the duration
and the tokens of prompt, answer and cached prompt are used. The data says how much of a prompt was cached, not what
was equal: that is put together here (``_Prefixes``).
"""

import zlib
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from disagg.measure.trace_rows import LATEST_S, Milliseconds, TokenCount, iso_seconds
from disagg.measure.workload import NO_PREFIX, PrefixBlocks, Session, SessionCall

COPILOT_BLOCK_TOKENS: Final = 64
"""Blocks in which the cached part of a prompt is told."""
_COMMON_IDS: Final = 1 << 62
"""Ids of blocks that sessions have in common are from here on, above all that are a session's own."""


class _Tokens(msgspec.Struct, frozen=True):
    prompt: TokenCount | None = None
    completion: TokenCount | None = None
    cached: TokenCount | None = None


class _LlmCall(msgspec.Struct, frozen=True):
    """A call of the model; fields of other names are ignored. Calls that failed early have no tokens."""

    timestamp: str
    duration_ms: Milliseconds | None = None
    model: str | None = None
    tokens: _Tokens | None = None


class _Turn(msgspec.Struct, frozen=True):
    llm_calls: tuple[_LlmCall, ...] | None = None


class CopilotSession(msgspec.Struct, frozen=True):
    """A line of the data set: one session."""

    session_id: Annotated[str, Meta(min_length=1)]
    turns: tuple[_Turn, ...] | None


def sessions_of(recorded: CopilotSession, longest_think_s: float, first_id: int) -> list[Session]:
    """Return a recorded session as chains of calls that wait for one another; block ids are from ``first_id`` on.

    Calls that overlapped in time are in chains of their own, which start at their recorded time after the first call;
    a call follows the one that ended last before it. What was between them, tools and the user, is thought, cut to
    ``longest_think_s``. Calls without a prompt, which never reached a model, are left out. Raises ValueError for a time
    that is none.
    """
    calls = sorted((_Call.of(call) for turn in recorded.turns or () for call in turn.llm_calls or ()), key=_start)
    prefixes = _Prefixes(first_id)
    chains: list[_Chain] = []
    for call in calls:
        if not call.tokens.prompt:
            continue
        ended = [chain for chain in chains if chain.end_s <= call.start_s]
        if ended:
            chain = max(ended, key=lambda one: one.end_s)
            think_s = call.start_s - chain.end_s
        else:
            chain, think_s = _Chain(call.start_s), 0.0
            chains.append(chain)
        chain.end_s = call.start_s + call.duration_s
        chain.calls.append(
            SessionCall(
                prompt_len=call.tokens.prompt,
                output_len=max(1, call.tokens.completion or 0),
                think_s=min(think_s, longest_think_s),
                prefix=prefixes.of(call.model, call.tokens.prompt, call.tokens.cached or 0),
            )
        )
    name = recorded.session_id.replace("/", "_")
    return [
        Session(
            name=f"{name}/{number}" if number else name,
            calls=tuple(chain.calls),
            start_s=chain.start_s - chains[0].start_s,
        )
        for number, chain in enumerate(chains)
    ]


@dataclass(frozen=True, slots=True)
class _Call:
    start_s: float
    duration_s: float
    model: str
    tokens: _Tokens

    @classmethod
    def of(cls, call: _LlmCall) -> "_Call":
        start_s = iso_seconds(call.timestamp)
        if not 0 <= start_s <= LATEST_S:
            raise ValueError(f"a call at {call.timestamp!r} cannot be")
        return cls(start_s, (call.duration_ms or 0.0) * 1e-3, call.model or "", call.tokens or _Tokens())


def _start(call: _Call) -> float:
    return call.start_s


@dataclass(slots=True)
class _Chain:
    start_s: float
    end_s: float = 0.0
    calls: list[SessionCall] = field(default_factory=list)


class _Prefixes:
    """Names the blocks of a session's prompts so that what was cached is equal to a prompt before it.

    That is the prompt of the call before, to the same model: an agent's history grows at its end. The first prompt of a
    session to a model can only have found what other sessions to that model brought: the system prompt and the tools.
    """

    def __init__(self, first_id: int) -> None:
        self._next_id = first_id
        self._latest: dict[str, tuple[int, ...]] = {}

    def of(self, model: str, prompt_len: int, cached: int) -> PrefixBlocks:
        """Return the blocks of the next prompt, of which ``cached`` tokens were there already."""
        num_blocks = prompt_len // COPILOT_BLOCK_TOKENS
        num_cached = min(num_blocks, cached // COPILOT_BLOCK_TOKENS)
        before = self._latest.get(model)
        if before is None:
            common = _COMMON_IDS + (zlib.crc32(model.encode()) << 24)
            before = tuple(range(common, common + num_cached))
        shared = before[:num_cached]
        own = range(self._next_id, self._next_id + num_blocks - len(shared))
        self._next_id += len(own)
        self._latest[model] = ids = (*shared, *own)
        return PrefixBlocks(ids, COPILOT_BLOCK_TOKENS) if ids else NO_PREFIX
