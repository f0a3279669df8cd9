"""Connections are accepted as fast as clients open them, however long a turn of the event loop takes."""

from __future__ import annotations

import asyncio
import errno
import socket

import pytest
import uvloop

from powerband.web import listening
from powerband.web.listening import MAX_ACCEPTS_OF_A_TURN, Acceptor, listen


class Counted(asyncio.Protocol):
    num_made = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert transport.get_extra_info("peername")[0] == "127.0.0.1"
        type(self).num_made += 1
        self.transport = transport


def open_connections(listener: socket.socket, count: int) -> list[socket.socket]:
    return [socket.create_connection(listener.getsockname()) for _ in range(count)]


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_all_connections_that_wait_are_accepted_in_a_few_turns() -> None:
    async def test() -> None:
        Counted.num_made = 0
        with listen("127.0.0.1", 0) as listener:
            acceptor = Acceptor(listener, Counted)
            clients = open_connections(listener, MAX_ACCEPTS_OF_A_TURN + 72)
            await turns(10)  # a server of uvloop accepts five
            assert Counted.num_made == len(clients)
            acceptor.close()
            await acceptor.wait_closed()
            late = open_connections(listener, 1)
            await turns(10)
            assert Counted.num_made == len(clients)
            for client in (*clients, *late):
                client.close()

    uvloop.run(test())


class FullListener:
    """A listening socket of a process that has no file descriptor left at first."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener, self.num_refused = listener, 0

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self) -> tuple[socket.socket, object]:
        if self.num_refused == 0:
            self.num_refused += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self._listener.accept()


def test_without_file_descriptors_accepting_goes_on_after_a_pause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listening, "_PAUSE_S", 0.01)

    async def test() -> None:
        Counted.num_made = 0
        with listen("127.0.0.1", 0) as listener:
            acceptor = Acceptor(FullListener(listener), Counted)  # type: ignore[arg-type]  # all that is used
            clients = open_connections(listener, 3)
            async with asyncio.timeout(10):
                while Counted.num_made < 3:
                    await asyncio.sleep(0.01)
            acceptor.close()
            for client in clients:
                client.close()

    uvloop.run(test())
    assert "Too many open files" in caplog.text
