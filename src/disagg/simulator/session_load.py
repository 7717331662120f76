"""Sessions as a closed loop: a call is sent when the answer to the one before it has ended and been thought about."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from disagg.base.ids import BlockHash, RequestId
from disagg.measure.workload import Session, SessionCall
from disagg.simulator.request import Outcome, SimulatedRequest
from disagg.simulator.simulated_requests import block_hashes


@dataclass(frozen=True, slots=True)
class _Turn:
    session: Session
    index: int
    following: tuple[BlockHash, ...]
    """Names of the next prompt's full KV blocks."""


class SimulatedSessions:
    """Gives the first call of each session, and after a call the next. A session ends with a call that fails."""

    def __init__(self, sessions: Iterable[Session], block_size: int) -> None:
        self._sessions = sessions
        self._block_size = block_size
        self._turns: dict[RequestId, _Turn] = {}

    def first_calls(self) -> Iterator[SimulatedRequest]:
        """Yield the sessions' first calls, in order of their starts."""
        for session in self._sessions:
            if session.calls:
                start_s = 0.0 if math.isnan(session.start_s) else session.start_s
                yield self._request(session, 0, self._names(session.calls[0]), start_s)

    def next_call(self, ended: SimulatedRequest) -> SimulatedRequest | None:
        """Return the call that follows one that ended now; None at the end of its session."""
        turn = self._turns.pop(ended.request_id)
        index = turn.index + 1
        if ended.outcome is not Outcome.FINISHED or index == len(turn.session.calls):
            return None
        arrival_s = ended.timeline.finished_s + turn.session.calls[index].think_s
        return self._request(turn.session, index, turn.following, arrival_s)

    def _request(
        self, session: Session, index: int, names: tuple[BlockHash, ...], arrival_s: float
    ) -> SimulatedRequest:
        """Return a call, given the names of its prompt's full KV blocks."""
        call = session.calls[index]
        following = self._names(session.calls[index + 1]) if index + 1 < len(session.calls) else ()
        # The next call brings this one's answer along, unless its prompt is not this one's, gone on with.
        if following[: len(names)] == names:
            names = following[: (call.prompt_len + call.output_len) // self._block_size]
        request = SimulatedRequest(
            request_id=RequestId(f"{session.name}:{index}"),
            arrival_s=arrival_s,
            prompt_len=call.prompt_len,
            output_len=call.output_len,
            block_hashes=names,
            hash_block_size=self._block_size,
        )
        self._turns[request.request_id] = _Turn(session, index, following)
        return request

    def _names(self, call: SessionCall) -> tuple[BlockHash, ...]:
        return block_hashes(call.prefix, call.prompt_len, self._block_size)
