"""How many connections there may be, and which of them make room for others."""

from typing import Protocol


class Droppable(Protocol):
    """A connection."""

    def drop(self) -> None:
        """End at once."""


class IdleConnections:
    """The connections that are owed no answer: silent ones, half requests, and those kept for a next request.

    Once there are ``max_connections``, a new one takes the place of that which has been idle for longest: clients that
    send nothing cannot keep others out.
    """

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        self._connections: dict[Droppable, None] = {}

    def add(self, connection: Droppable) -> None:
        """Note that a connection is owed nothing from now on."""
        self._connections.pop(connection, None)
        self._connections[connection] = None

    def discard(self, connection: Droppable) -> None:
        """Note that it is owed an answer, or has ended."""
        self._connections.pop(connection, None)

    def drop_oldest(self) -> bool:
        """End the one that has been idle for longest; False when there is none."""
        oldest = next(iter(self._connections), None)
        if oldest is None:
            return False
        del self._connections[oldest]
        oldest.drop()
        return True
