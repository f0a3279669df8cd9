"""What a client can send, leave open or not read is bounded, and never keeps a connection or a request alive."""

from __future__ import annotations

import asyncio
import gc
import socket
from typing import Any

import h11
import pytest
from connections_for_tests import PATIENCE_S, Recorder, answer, connect, ends, exchange, request, run, serving, until
from starlette.types import Receive, Scope, Send

from powerband.web.body_budget import BODIES_AT_ONCE, SMALL_BYTES, BodyBudget
from powerband.web.client_connection import ClientDisconnected, client_connection, while_connected
from powerband.web.errors import HttpError
from powerband.web.http1 import connection
from powerband.web.http1.framing import MAX_CHUNKS_AT_ONCE, ChunkedFraming
from powerband.web.http1.head import MAX_HEADERS, MAX_REQUEST_LINE_BYTES, parse_head

CLOSE = "Connection: close"


def statuses(answers: bytes) -> list[int]:
    return [int(one[:3]) for one in answers.split(b"HTTP/1.1 ")[1:]]


def test_pipelined_requests_are_answered_in_their_order() -> None:
    async def scenario() -> None:
        app = Recorder()
        async with serving(app) as port:
            paths = [f"/{i}" for i in range(3000)]  # more than may wait at once
            answers = await exchange(port, b"".join(map(request, paths)) + request("/end", CLOSE))
        assert [path for path, _ in app.seen] == [*paths, "/end"]
        bodies = [one.partition(b"\r\n\r\n")[2] for one in answers.split(b"HTTP/1.1 ")[1:]]
        assert bodies == [path.encode() for path in (*paths, "/end")]

    run(scenario)


def test_requests_sent_ahead_wait_as_bytes_and_one_at_a_time() -> None:
    async def scenario() -> None:
        app = Recorder()
        async with serving(app) as port:
            _, writer = await connect(port)
            writer.write(request("/hold") + request("/next") * 1000)
            await until(lambda: app.seen)
            await asyncio.sleep(0.05)
            assert (app.seen, app.running) == ([("/hold", b"")], 1)
            app.release.set()
            await until(lambda: len(app.seen) == 1001)
            writer.close()

    run(scenario)


@pytest.mark.parametrize("ahead", [b"", request("/next"), request("/next") * 100, b"\r\n", b"POST /half"])
def test_a_client_that_leaves_is_noticed_whatever_it_has_sent_ahead(ahead: bytes) -> None:
    async def scenario() -> None:
        app = Recorder()
        async with serving(app) as port:
            _, writer = await connect(port)
            writer.write(request("/hold") + ahead)
            await until(lambda: app.seen)
            writer.transport.abort()
            await until(lambda: app.left == ["/hold"])
            assert app.seen == [("/hold", b"")]

    run(scenario)


@pytest.mark.parametrize("size", [0, 100, 200_000, 4 << 20])
def test_a_client_that_leaves_is_noticed_by_who_asks_for_nothing_more(size: int) -> None:
    """As a gateway does, whose requests wait for a replica; the room of their bodies is free again."""
    left = 0

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal left
        while (await receive())["more_body"]:
            pass
        lost = asyncio.Event()
        client_connection(scope).when_lost(lost.set)
        await lost.wait()
        left += 1

    async def scenario() -> None:
        async with serving(waiting) as port:
            data = request("/", f"Content-Length: {size}", method="POST", body=b"x" * size)
            for _ in range(2 * BODIES_AT_ONCE):  # one after the other: each has room
                _, writer = await connect(port)
                writer.write(data)
                await writer.drain()
                before = left
                writer.close()
                await until(lambda before=before: left == before + 1)  # type: ignore[misc]

    run(scenario)


def test_what_runs_while_its_client_is_connected_ends_with_the_connection() -> None:
    outcomes: list[str] = []

    async def working(scope: Scope, receive: Receive, _: Send) -> None:
        await receive()
        try:
            with while_connected(scope):
                outcomes.append("begun")
                await asyncio.sleep(PATIENCE_S)
        except ClientDisconnected:
            outcomes.append("left")

    async def scenario() -> None:
        async with serving(working) as port:
            _, writer = await connect(port)
            writer.write(request("/"))
            await until(lambda: outcomes == ["begun"])
            writer.transport.abort()
            await until(lambda: outcomes == ["begun", "left"])

    run(scenario)


def test_a_client_that_fills_what_may_be_sent_ahead_cannot_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SECONDS_AHEAD", 0.1)

    async def scenario() -> None:
        app = Recorder()
        async with serving(app) as port:
            _, writer = await connect(port)
            writer.write(request("/hold") + request("/next") * 20_000)
            await until(lambda: app.left == ["/hold"])

    run(scenario)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (b"", b""),
        (b"", b"G"),
        (b"", b"\r\n\r\n\r\n"),
        (request("/"), b""),
        (request("/"), b"\r\n"),
        (request("/"), b"\r"),
        (request("/"), b"GET /half HTTP/1.1\r\n"),
        (request("/early", "Content-Length: 1000000", method="POST"), b"x"),
        (request("/early", "Transfer-Encoding: chunked", method="POST"), b"5\r\nhello\r\n0\r\n"),
    ],
)
def test_nothing_keeps_an_idle_connection_open(first: bytes, then: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECONDS_FOR_HEAD", "SECONDS_IDLE", "SECONDS_TO_DISCARD", "SECONDS_TO_CLOSE"):
        monkeypatch.setattr(connection, name, 0.3)

    async def scenario() -> None:
        async with serving(Recorder()) as port:
            reader, writer = await connect(port)
            if first:
                writer.write(first)
                await reader.readuntil(b"\r\n\r\n")
            writer.write(then)
            await ends(reader)  # times out where it stays open

    run(scenario)


def test_stray_bytes_do_not_put_off_the_end_of_an_idle_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SECONDS_IDLE", 0.3)
    monkeypatch.setattr(connection, "SECONDS_FOR_HEAD", 0.3)

    async def drip(writer: asyncio.StreamWriter, piece: bytes) -> None:
        while True:
            writer.write(piece)
            await asyncio.sleep(0.05)

    async def scenario() -> None:
        async with serving(Recorder()) as port:
            for begun, piece in ((request("/"), b"\r\n"), (b"GET / HTTP/1.1\r\n", b"X: y\r\n")):
                reader, writer = await connect(port)
                writer.write(begun)
                dripping = asyncio.create_task(drip(writer, piece))
                await ends(reader)
                dripping.cancel()

    run(scenario)


def test_a_connection_that_ends_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        async with serving(Recorder()) as port:
            for _ in range(5):
                client = socket.create_connection(("127.0.0.1", port))
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # ends with a reset
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(client, request("/"))
                await loop.sock_recv(client, 1 << 16)
                client.close()
            await until(lambda: not _live(connection.HttpConnection))

    run(scenario)


def _live(kind: type) -> list[Any]:
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is kind]


TRAILERS = [b"a: b\r\n" * 100_000, b"a: " + b"x" * 600_000, b"x" * 600_000, b"a: b\r\n" * 1300 + b"c: " + b"d" * 1000]


@pytest.mark.parametrize("trailers", TRAILERS, ids=range(len(TRAILERS)))
@pytest.mark.parametrize("path", ["/", "/early"])
def test_trailers_are_bounded_whether_the_body_is_read_or_not(path: str, trailers: bytes) -> None:
    async def scenario() -> None:
        app = Recorder()
        async with serving(app) as port:
            head = request(path, "Transfer-Encoding: chunked", method="POST")
            answers = await exchange(port, head + b"0\r\n" + trailers + b"\r\n\r\n" + request("/next"))
        assert statuses(answers) in ([[400]] if path == "/" else [[200], [400]])  # one answer to one request
        assert "/next" not in dict(app.seen)

    run(scenario)


def test_small_trailers_and_extensions_are_taken_and_dropped() -> None:
    async def scenario() -> None:
        app = Recorder()
        async with serving(app) as port:
            body = b"5;a=b\r\nhello\r\n0\r\nExpires: never\r\nX: y\r\n\r\n"
            data = request("/", "Transfer-Encoding: chunked", method="POST", body=body) + request("/next", CLOSE)
            assert statuses(await exchange(port, data)) == [200, 200]
        assert app.seen == [("/", b"hello"), ("/next", b"")]

    run(scenario)


def test_a_body_of_tiny_chunks_is_read_in_turns() -> None:
    framing, data = ChunkedFraming(), bytearray(b"1\r\nx\r\n" * 3000 + b"0\r\n\r\nGET /")
    turns = content = 0
    while not framing.is_complete:
        content += len(framing.take(data))
        turns += 1
        assert framing.has_more != framing.is_complete
    assert (content, turns, bytes(data)) == (3000, -(-3001 // MAX_CHUNKS_AT_ONCE), b"GET /")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_body_is_the_same_however_it_is_cut(size: int) -> None:
    body = b"5;x=y\r\nhello\r\n10\r\n0123456789abcdef\r\n0\r\nA: b\r\n\r\n"
    oracle = h11.Connection(h11.SERVER)
    oracle.receive_data(request("/", "Transfer-Encoding: chunked", method="POST", body=body))
    expected = b""
    while not isinstance(event := oracle.next_event(), h11.EndOfMessage):
        expected += bytes(event.data) if isinstance(event, h11.Data) else b""
    framing, data, found = ChunkedFraming(), bytearray(), b""
    for start in range(0, len(body), size):
        data += body[start : start + size]
        found += framing.take(data)
    assert framing.is_complete
    assert (found, bytes(data)) == (expected, b"")


def test_the_rest_of_a_body_is_discarded_and_the_connection_goes_on() -> None:
    async def scenario() -> None:
        app = Recorder()
        async with serving(app) as port:
            first = request("/early", "Content-Length: 3000000", method="POST", body=b"x" * 3_000_000)
            assert statuses(await exchange(port, first + request("/next", CLOSE))) == [200, 200]
        assert app.seen == [("/early", b""), ("/next", b"")]

    run(scenario)


def test_a_body_that_was_not_asked_for_ends_the_connection() -> None:
    """Whether a client that waits for 100 sends its body after another answer cannot be known (RFC 9110, 10.1.1)."""

    async def scenario() -> None:
        async with serving(Recorder()) as port:
            head = request("/early", "Content-Length: 5", "Expect: 100-continue", method="POST")
            assert b"connection: close" in await exchange(port, head)

            reader, writer = await connect(port)
            writer.write(request("/", "Content-Length: 5", "Expect: 100-continue", CLOSE, method="POST"))
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"hello")
            assert statuses(await ends(reader)) == [200]

    run(scenario)


def test_heads_are_bounded() -> None:
    async def scenario() -> None:
        async with serving(Recorder()) as port:
            for lines in (["X: " + "x" * 70_000], [f"X-{i}: y" for i in range(300)]):
                assert statuses(await exchange(port, request("/", *lines))) == [431]
            most = request("/", *(f"X-{i}: y" for i in range(MAX_HEADERS - 2)), CLOSE)  # and Host
            assert statuses(await exchange(port, most)) == [200]
            for size, status in ((MAX_REQUEST_LINE_BYTES - len("GET / HTTP/1.1"), 200), (MAX_REQUEST_LINE_BYTES, 414)):
                assert statuses(await exchange(port, request("/" + "x" * size, CLOSE))) == [status]


@pytest.mark.parametrize(
    "head",
    [request("/", *["a:"] * 15_500), request("/" + "%41a" * 15_500), request("/" + "%ff" * 20_000)],
    ids=["headers", "escapes", "no UTF-8"],
)
def test_what_is_too_much_of_a_head_is_not_parsed(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("httptools.HttpRequestParser", None)
    with pytest.raises(HttpError) as refusal:
        parse_head(head)
    assert refusal.value.http_status in (414, 431)


@pytest.mark.parametrize("number", [0, 1, connection.MAX_BLANK_LINES])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_few_empty_lines_before_a_request_mean_nothing(number: int, is_first: bool) -> None:
    async def scenario() -> None:
        async with serving(Recorder()) as port:
            before = b"" if is_first else request("/")
            answers = await exchange(port, before + b"\r\n" * number + request("/next", CLOSE))
            assert statuses(answers) == [200] * (1 if is_first else 2)

    run(scenario)


@pytest.mark.parametrize("number", [connection.MAX_BLANK_LINES + 1, 10_000_000])
@pytest.mark.parametrize("is_first", [True, False])
def test_empty_lines_without_end_are_refused(number: int, is_first: bool) -> None:
    async def scenario() -> None:
        async with serving(Recorder()) as port:
            before = b"" if is_first else request("/")
            answers = await exchange(port, before + b"\r\n" * number + request("/next", CLOSE))
            assert statuses(answers) == [400] if is_first else [200, 400]

    run(scenario)


def test_empty_lines_are_counted_however_they_are_cut() -> None:
    async def scenario() -> None:
        async with serving(Recorder()) as port:
            reader, writer = await connect(port)
            for _ in range(connection.MAX_BLANK_LINES + 1):
                for byte in (b"\r", b"\n"):
                    writer.write(byte)
                    await asyncio.sleep(0)
            assert statuses(await ends(reader)) == [400]

    run(scenario)

    run(scenario)


def test_a_refusal_reaches_a_client_that_still_sends() -> None:
    async def scenario() -> None:
        async with serving(Recorder()) as port:
            assert statuses(await exchange(port, request("/", "X: " + "x" * (16 << 20)))) == [431]

    run(scenario)


@pytest.mark.parametrize("status", [299, 420, 499, 529, 599])
def test_a_status_that_is_not_registered_is_passed_on(status: int) -> None:
    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def scenario() -> None:
        async with serving(application) as port:
            found = await exchange(port, request("/", CLOSE))
            client = h11.Connection(h11.CLIENT)
            client.send(h11.Request(method="GET", target="/", headers=[("Host", "localhost")]))
            client.receive_data(found)
            head, body = client.next_event(), client.next_event()
            assert isinstance(head, h11.Response)
            assert isinstance(body, h11.Data)
            assert (head.status_code, bytes(body.data)) == (status, b"ok")

    run(scenario)


def test_clients_of_http_1_0_get_no_chunks() -> None:
    async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"one ", b"two"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def scenario() -> None:
        async with serving(streaming) as port:
            answers = await exchange(port, b"GET / HTTP/1.0\r\n\r\n")
            assert answers.endswith(b"\r\n\r\none two")
            assert b"transfer-encoding" not in answers
            assert (await exchange(port, request("/", CLOSE))).endswith(b"4\r\none \r\n3\r\ntwo\r\n0\r\n\r\n")

    run(scenario)


def test_an_answer_that_breaks_off_does_not_look_whole() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/begun":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"some", "more_body": True})
        elif scope["path"] == "/short":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
            await send({"type": "http.response.body", "body": b"some"})
        elif scope["path"] == "/split":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y\nset-cookie: z")]})
        raise ValueError("a fault")

    async def scenario() -> None:
        async with serving(failing) as port:
            assert statuses(await exchange(port, request("/"))) == [500]
            assert statuses(await exchange(port, request("/split"))) == [500]
            assert (await exchange(port, request("/begun"))).endswith(b"4\r\nsome\r\n")
            assert b"some" not in await exchange(port, request("/short"))

    run(scenario)


def test_bodies_are_bounded_together_and_those_sent_by_halves_go_first() -> None:
    async def scenario() -> None:
        app, largest = Recorder(), SMALL_BYTES
        async with serving(app, max_body_bytes=largest) as port:
            halves = [await connect(port) for _ in range(2 * BODIES_AT_ONCE)]
            for _, writer in halves:
                writer.write(request("/half", "Content-Length: 1000000", method="POST", body=b"x" * largest))
                await writer.drain()
            async with asyncio.timeout(20):
                refused = await halves[0][0].read(1000)
            assert statuses(refused) == [503]
            assert b"retry-after: 1" in refused
            assert b"too_many_bytes" in refused
            honest = request("/", f"Content-Length: {largest}", CLOSE, method="POST", body=b"y" * largest)
            assert statuses(await exchange(port, honest)) == [200]
            await until(lambda: len(app.left) >= BODIES_AT_ONCE)
            for _, writer in halves:
                writer.close()
            await until(lambda: not app.running)

    run(scenario)


class Body:
    def __init__(self) -> None:
        self.refusal: HttpError | None = None

    def refuse(self, error: HttpError) -> None:
        self.refusal = error


def test_a_large_body_waits_for_room_and_a_small_one_does_not() -> None:
    budget = BodyBudget(10 * SMALL_BYTES)
    whole, other, large, small = Body(), Body(), Body(), Body()
    for one, owner in ((whole, "a"), (other, "b")):
        budget.add(one, 5 * SMALL_BYTES, owner)
        budget.complete(one)
    budget.add(small, 100)
    budget.add(large, SMALL_BYTES + 1)
    assert small.refusal is not None  # it was being sent; whole, it would have stayed
    assert large.refusal is not None
    assert large.refusal.http_status == 503
    assert whole.refusal is None
    last = Body()
    budget.add(last, 100)
    assert last.refusal is None
    budget.release(whole)
    budget.release(other)
    budget.release(last)
    assert budget.held_bytes == 0


def test_one_client_holds_half_of_the_bodies_and_the_largest_holder_gives_way() -> None:
    budget = BodyBudget(8 * SMALL_BYTES)
    mine, half, honest = Body(), Body(), Body()
    budget.add(mine, 3 * SMALL_BYTES, "a")
    budget.complete(mine)
    budget.add(half, SMALL_BYTES, "a")
    budget.add(honest, SMALL_BYTES, "b")  # slow, and as old as any
    renewed = [Body() for _ in range(20)]
    for one in renewed:
        budget.add(one, 2 * SMALL_BYTES, "a")
    assert half.refusal is not None
    assert all(one.refusal is not None for one in renewed)
    budget.add(honest, 3 * SMALL_BYTES, "b")
    assert (mine.refusal, honest.refusal) == (None, None)
    assert budget.held_bytes == 7 * SMALL_BYTES


def test_what_is_not_kept_of_a_body_makes_room_and_belongs_to_its_key() -> None:
    budget = BodyBudget(8 * SMALL_BYTES)
    bodies = [Body() for _ in range(20)]
    for one in bodies:
        budget.add(one, 3 * SMALL_BYTES, "127.0.0.1")
        budget.complete(one)
        budget.keep(one, 100, "key")
    assert budget.held_bytes == 20 * 100
    large = Body()
    budget.add(large, 4 * SMALL_BYTES, "127.0.0.1")
    budget.complete(large)
    with pytest.raises(HttpError, match="those of one client"):
        budget.keep(large, 4 * SMALL_BYTES, "key")
    for one in (*bodies, large):
        budget.release(one)
    assert budget.held_bytes == 0


def test_what_is_kept_in_the_place_of_a_body_counts_with_its_own_size() -> None:
    """As a conversation that is found by the id of its last response."""
    budget = BodyBudget(8 * SMALL_BYTES)
    body, others = Body(), [Body() for _ in range(3)]
    budget.add(body, 100, "127.0.0.1")
    budget.complete(body)
    budget.keep(body, 3 * SMALL_BYTES, "key")
    assert budget.held_bytes == 3 * SMALL_BYTES
    for one in others:
        budget.add(one, 100, "127.0.0.1")
        budget.complete(one)
    with pytest.raises(HttpError, match="those of one client"):
        budget.keep(others[0], 3 * SMALL_BYTES, "key")
    budget.keep(others[1], 4 * SMALL_BYTES, "second")
    with pytest.raises(HttpError, match="all requests together"):
        budget.keep(others[2], 2 * SMALL_BYTES, "third")


def test_a_client_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SECONDS_TO_READ", 0.2)
    ended = asyncio.Event()

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"x" * (32 << 20))
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.set()

    async def scenario() -> None:
        async with serving(large) as port:
            _, writer = await connect(port)
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # the one of asyncio can
            writer.write(request("/"))
            async with asyncio.timeout(20):
                await ended.wait()

    run(scenario)
