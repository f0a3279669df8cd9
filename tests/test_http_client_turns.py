"""A large read is received in parts, in turns of their own, and the socket rests meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from powerband.http_client.connection import MAX_TURN_BYTES, CollectedResponse, ConnectionPool, OutboundConnection

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
SIZE = 10 * MAX_TURN_BYTES


class Transport:
    def __init__(self) -> None:
        self.is_reading, self.is_aborted = True, False

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def abort(self) -> None:
        self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_aborted

    def writelines(self, request: Any) -> None:
        pass


class Parts(CollectedResponse):
    """Notes the size of each part."""

    __slots__ = ("sizes",)

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def receive(self, data: bytes) -> None:
        self.sizes.append(len(data))
        super().receive(data)


async def begun() -> tuple[OutboundConnection, Transport, Parts]:
    connection, transport, response = OutboundConnection(ConnectionPool("http://localhost:1")), Transport(), Parts()
    connection.connection_made(transport)  # type: ignore[arg-type]
    connection.send((b"",), response)
    return connection, transport, response


def test_others_have_turns_between_the_parts_of_a_large_read() -> None:
    async def act() -> None:
        connection, transport, response = await begun()
        connection.data_received(HEAD % SIZE + b"x" * (SIZE - 1))
        turns = 0
        while not transport.is_reading:
            turns += 1
            await asyncio.sleep(0)
        assert turns >= 10
        assert max(response.sizes) == MAX_TURN_BYTES
        connection.data_received(b"y")
        assert response.done.done()
        assert response.body() == b"x" * (SIZE - 1) + b"y"
        assert transport.is_reading
        assert connection.is_open

    asyncio.run(act())


def test_a_reader_that_is_behind_gets_the_next_part_when_it_goes_on() -> None:
    async def act() -> None:
        connection, transport, response = await begun()
        connection.data_received(HEAD % SIZE + b"x" * SIZE)
        connection.pause()
        for _ in range(20):
            await asyncio.sleep(0)
        assert sum(response.sizes) == MAX_TURN_BYTES
        connection.resume_reading()
        async with asyncio.timeout(10):
            await response.done
        assert len(response.body()) == SIZE
        assert transport.is_reading

    asyncio.run(act())


@pytest.mark.parametrize("problem", [None, ConnectionResetError()])
def test_what_came_before_the_end_of_a_connection_is_received(problem: Exception | None) -> None:
    async def act() -> None:
        connection, _, response = await begun()
        connection.data_received(HEAD % SIZE + b"x" * SIZE)
        connection.connection_lost(problem)
        assert (response.code, len(response.body())) == ("", SIZE)

    asyncio.run(act())


def test_more_than_the_response_ends_the_connection() -> None:
    async def act() -> None:
        connection, transport, response = await begun()
        connection.data_received(HEAD % 1 + b"x" + b"HTTP/1.1 200 OK\r\nX: " + b"y" * SIZE)
        await asyncio.sleep(0)
        assert response.body() == b"x"
        assert transport.is_aborted
        assert not connection.is_open

    asyncio.run(act())
