"""Telling a client that has closed its sending side from one that has gone: TCP shows both as the same FIN.

Only data tells: the system of a client that has gone answers it with a reset. Some bytes can be sent ahead without
knowing what comes after them: every answer begins with ``HTTP/1.1``, and the length of a chunk may begin with zeros.
"""

from typing import Any, Final, Self

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_BEGINNING: Final = b"HTTP/1.1 "
_FIRST_DELAY_S: Final = 0.05
_GROWTH: Final = 4.0
"""The reset that one byte brings is noticed with the next; the ninth goes out after a quarter of an hour."""


class BegunTransport:
    """The transport of one answer to a client that sends no more; it can be probed while nothing else is written."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._transport = cycle.transport
        self._num_ahead = 0
        self._num_probes = 0

    @classmethod
    def begin(cls, cycle: RequestResponseCycle | None) -> Self:
        """Put one in the place of an answer's transport."""
        assert cycle is not None, "there is something to answer"
        begun = cls(cycle)
        cycle.transport = begun  # type: ignore[assignment]
        return begun

    def is_needed(self) -> bool:
        """False once the answer is complete, the connection is at its end, or all was sent that can be."""
        cycle = self._cycle
        is_over = cycle.response_complete or cycle.disconnected or self._transport.is_closing()
        return self._num_probes < len(_BEGINNING) and not is_over

    def probe(self) -> float:
        """Send one more byte ahead, where there is one; return the seconds until the next."""
        if not self._cycle.response_started:
            self._transport.write(_BEGINNING[self._num_ahead : self._num_ahead + 1])
            self._num_ahead += 1
        elif self._cycle.chunked_encoding:
            self._transport.write(b"0")
        self._num_probes += 1
        return float(_FIRST_DELAY_S * _GROWTH ** (self._num_probes - 1))

    def write(self, data: bytes) -> None:
        """Write what of ``data`` is not out yet."""
        self._transport.write(data[self._num_ahead :])
        self._num_ahead = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
