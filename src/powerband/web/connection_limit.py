"""How many connections of clients a server holds at once."""

from __future__ import annotations

from typing import Protocol


class LimitedConnection(Protocol):
    """A client's connection."""

    def drop(self) -> None:
        """Close it at once; with the reason, if its client has begun a request."""


class ConnectionLimit:
    """Knows which connections wait for their clients: without a request, or in the middle of one.

    Beyond `max_connections` the one that has waited for longest is closed. Honest clients send a request in moments, so
    connections that are only held go first. When none waits but the new one, it is the new one.
    """

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        self._open: set[LimitedConnection] = set()
        self._waiting: dict[LimitedConnection, None] = {}  # the one that began first is first

    def opened(self, connection: LimitedConnection) -> None:
        """Counts until `closed`. It waits for its first request."""
        self._open.add(connection)
        self.waits(connection)
        while len(self._open) > self.max_connections:
            oldest = next(iter(self._waiting))
            self.closed(oldest)
            oldest.drop()

    def waits(self, connection: LimitedConnection) -> None:
        """From now on for its client."""
        self._waiting.pop(connection, None)
        if connection in self._open:
            self._waiting[connection] = None

    def works(self, connection: LimitedConnection) -> None:
        """Its request is whole."""
        self._waiting.pop(connection, None)

    def closed(self, connection: LimitedConnection) -> None:
        self._open.discard(connection)
        self._waiting.pop(connection, None)
