"""Limits the number of client connections of a server."""

from __future__ import annotations

from typing import Protocol


class LimitedConnection(Protocol):
    """A client's connection."""

    def drop(self) -> None:
        """Close the connection at once; with an error response if its client has begun a request."""


class ConnectionLimit:
    """Tracks the connections that wait for their client: idle ones, those whose request is incomplete, and those whose
    client is behind in reading the response.

    Beyond `max_connections`, the connection that has waited for longest is closed. Honest clients send a request
    quickly, so connections that are only held open go first. If only the new connection waits, it is closed.
    """

    def __init__(self, max_connections: int) -> None:
        self.max_connections = max_connections
        self._open: set[LimitedConnection] = set()
        self._waiting: dict[LimitedConnection, None] = {}  # oldest first

    def opened(self, connection: LimitedConnection) -> None:
        """Count a new connection until `closed`. It waits for its first request."""
        self._open.add(connection)
        self.waits(connection)
        while len(self._open) > self.max_connections:
            oldest = next(iter(self._waiting))
            self.closed(oldest)
            oldest.drop()

    def waits(self, connection: LimitedConnection) -> None:
        """The connection waits for its client from now on."""
        self._waiting.pop(connection, None)
        if connection in self._open:
            self._waiting[connection] = None

    def works(self, connection: LimitedConnection) -> None:
        """The connection's request is complete."""
        self._waiting.pop(connection, None)

    def closed(self, connection: LimitedConnection) -> None:
        self._open.discard(connection)
        self._waiting.pop(connection, None)
