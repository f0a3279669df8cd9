"""The client byte by byte: how it reads HTTP and events, however they are cut, and what it says of wrong ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from powerband.bench.client.messages import Sample, ServerAddress
from powerband.bench.client.responses import ParsedResponse, parse_response, spread
from powerband.bench.load import LoadOptions, run_load
from powerband.errors import UsageError
from powerband.http_client.connection import CollectedResponse, ConnectionPool, OutboundConnection
from powerband.metrics.record import Outcome
from powerband.spec.workload.arrivals import ClosedLoop
from powerband.spec.workload.lengths import Fixed
from powerband.spec.workload.workload import RequestMix, Workload

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Wire:
    """A transport that goes nowhere."""

    def __init__(self) -> None:
        self.sent = b""
        self.is_aborted = False

    def writelines(self, data: Iterable[bytes]) -> None:
        self.sent += b"".join(data)

    def abort(self) -> None:
        self.is_aborted = True


def received(pieces: Iterable[bytes], *, closes: bool = False) -> tuple[CollectedResponse, OutboundConnection, bool]:
    """What becomes of an answer that arrives in these pieces: it, its connection, and whether it ended."""

    async def feed() -> tuple[CollectedResponse, OutboundConnection, bool]:
        connection: Any = OutboundConnection(ConnectionPool("http://localhost"))
        connection.connection_made(Wire())
        answer = CollectedResponse()
        connection.send((b"GET / HTTP/1.1\r\n\r\n",), answer)
        for piece in pieces:
            connection.data_received(piece)
        if closes:
            connection.connection_lost(None)
        return answer, connection, answer.done.done()

    return asyncio.run(feed())


def chunked(*parts: bytes) -> bytes:
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def event(text: str = "", finish: str = "null", usage: int | None = None) -> bytes:
    told = "" if usage is None else f',"usage":{{"prompt_tokens":3,"completion_tokens":{usage}}}'
    return f'data: {{"choices":[{{"index":0,"text":"{text}","finish_reason":{finish}}}]{told}}}\n\n'.encode()


STREAM = (event("Grüße "), event("aus "), event("Köln 🎉", '"stop"'), b"data: [DONE]\n\n")
LAST_USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7}}\n\n'


def read(*pieces: bytes, closes: bool = False) -> ParsedResponse:
    return parse_response(received(pieces, closes=closes)[0])


def test_an_answer_cut_anywhere_reads_the_same() -> None:
    raw = chunked(*STREAM)
    for cut in range(1, len(raw)):
        answer, connection, is_done = received([raw[:cut], raw[cut:]])
        reading = parse_response(answer)
        assert (reading.text, len(reading.times_s), reading.problem) == ("Grüße aus Köln 🎉", 3, ""), f"cut at {cut}"
        assert is_done
        assert connection.is_open


def test_an_answer_byte_by_byte_reads_the_same() -> None:
    raw = chunked(*STREAM)
    reading = read(*(raw[i : i + 1] for i in range(len(raw))))
    assert (reading.text, len(reading.times_s), reading.problem) == ("Grüße aus Köln 🎉", 3, "")
    assert reading.finish_reason == "stop"


def test_events_cut_by_the_chunks_of_http_read_the_same() -> None:
    stream = b"".join(STREAM)
    for cut in range(1, len(stream)):
        reading = read(chunked(stream[:cut], stream[cut:]))
        assert (reading.text, len(reading.times_s), reading.problem) == ("Grüße aus Köln 🎉", 3, ""), f"cut at {cut}"


@pytest.mark.parametrize("cut", [None, *range(0, 300, 7)])
def test_lines_may_end_in_crlf(cut: int | None) -> None:
    stream = b"".join(STREAM).replace(b"\n", b"\r\n")
    parts = (stream,) if not cut else (stream[:cut], stream[cut:])
    reading = read(chunked(*(part for part in parts if part)))
    assert (reading.text, len(reading.times_s), reading.problem) == ("Grüße aus Köln 🎉", 3, "")


def test_lines_may_end_in_cr_behind_a_byte_order_mark() -> None:
    stream = b"\xef\xbb\xbf" + b"".join(STREAM).replace(b"\n", b"\r")
    reading = read(chunked(stream[:9], stream[9:]))
    assert (reading.text, len(reading.times_s), reading.problem) == ("Grüße aus Köln 🎉", 3, "")


def test_content_in_parts_is_a_token() -> None:
    """As Mistral sends thoughts."""
    part = b'data: {"choices":[{"delta":{"content":[{"type":"thinking","thinking":[]}]}}]}\n\n'
    reading = read(chunked(part, STREAM[2], STREAM[3]))
    assert (reading.tokens, reading.problem) == ([1, 1], "")


def test_several_events_in_one_packet_are_several_chunks() -> None:
    reading = read(chunked(b"".join(STREAM)))
    assert len(reading.times_s) == 3
    assert len(set(reading.times_s)) == 1


def test_comments_names_and_data_on_several_lines() -> None:
    stream = b': ping\n\nevent: message\nid: 7\ndata: {"choices":[{"text":"a",\ndata: "finish_reason":null}]}\n\n'
    reading = read(chunked(stream, event("b", '"stop"')))
    assert (reading.text, reading.problem) == ("ab", "")


def test_usage_in_every_chunk_says_how_many_tokens_each_carries() -> None:
    reading = read(chunked(event("a", usage=2), event("", usage=2), event("b", usage=5), event("", '"stop"', usage=5)))
    assert (reading.tokens, reading.output_tokens, reading.prompt_tokens) == ([2, 3], 5, 3)
    assert reading.counted_by_usage


def test_half_a_character_is_a_token_where_usage_says_so() -> None:
    """A chunk whose text is empty, because its token is the first half of a character."""
    reading = read(chunked(event("", usage=1), event("é", usage=2), event("", '"length"', usage=2)))
    assert reading.tokens == [1, 1]


def test_usage_at_the_end_is_spread_over_the_chunks() -> None:
    reading = read(chunked(*STREAM[:3], LAST_USAGE, STREAM[3]))
    assert (sum(reading.tokens), reading.output_tokens, len(reading.tokens)) == (7, 7, 3)
    assert reading.counted_by_usage


def test_without_usage_a_chunk_is_a_token() -> None:
    reading = read(chunked(*STREAM))
    assert (reading.tokens, reading.output_tokens, reading.counted_by_usage) == ([1, 1, 1], 3, False)


def test_usage_of_zeros_counts_nothing() -> None:
    """LocalAI sends it with every chunk, and an empty finish_reason until the end."""
    zeros = [event("a", '""', usage=0), event("b", '""', usage=0)]
    reading = read(chunked(*zeros, event("", '"stop"', usage=0)))
    assert (reading.tokens, reading.output_tokens, reading.counted_by_usage) == ([1, 1], 2, False)
    assert read(chunked(*zeros, event("", '"stop"', usage=0), LAST_USAGE)).output_tokens == 7
    assert read(chunked(*zeros)).problem == "the stream ended before its answer did"


def test_the_role_and_the_end_of_a_chat_are_no_tokens() -> None:
    def delta(fields: str, finish: str = "null") -> bytes:
        return f'data: {{"choices":[{{"delta":{{{fields}}},"finish_reason":{finish}}}]}}\n\n'.encode()

    opening, ending = delta('"role":"assistant","content":""'), delta("", '"stop"')
    reading = read(chunked(opening, delta('"reasoning_content":"hm "'), delta('"content":"yes"'), ending))
    assert (reading.text, reading.tokens, reading.finish_reason) == ("hm yes", [1, 1], "stop")


@pytest.mark.parametrize(
    ("stream", "problem"),
    [
        ((event("a"),), "the stream ended before its answer did"),
        ((event("a"), b'data: {"error":{"message":"out of memory"}}\n\n'), "out of memory"),
        ((event("a"), b"data: {broken\n\n", STREAM[3]), "an invalid chunk"),
        ((b"data: 7\n\n", STREAM[3]), "an invalid chunk"),
        ((b'data: {"choices":[{"text":"\xff"}]}\n\n', STREAM[3]), "an invalid chunk"),
        ((b'data: {"error":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n\n", STREAM[3]), "an invalid chunk"),
    ],
)
def test_a_stream_that_goes_wrong_is_an_error_that_says_why(stream: tuple[bytes, ...], problem: str) -> None:
    assert problem in read(chunked(*stream)).problem


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"SSH-2.0-OpenSSH_9.9\r\n", "not HTTP"),
        (b"\x16\x03\x01\x02\x00\x01", "not HTTP"),
        (HEAD + b"zz\r\n", "not HTTP"),
        (
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
            "changes the protocol",
        ),
        (HEAD + b"5\r\nda", "the server closed the connection"),
        (b"", "the server closed the connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", "the server closed the connection"),
    ],
)
def test_wrong_or_unfinished_http_says_what_it_is(raw: bytes, problem: str) -> None:
    answer, connection, is_done = received([raw] if raw else [], closes=True)
    assert problem in answer.problem
    assert is_done
    assert answer.code
    assert not connection.is_open


def test_an_error_is_told_in_the_servers_words() -> None:
    body = b'{"error":{"message":"max_tokens is too large","type":"x"}}'
    reading = read(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    assert reading.problem == "max_tokens is too large"
    reading = read(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
    assert reading.problem == "HTTP 502"


@pytest.mark.parametrize("body", [b"[" * 100_000, b"\xff\xfe", b"{}", b"7", b'{"error":[]}', b""])
def test_an_error_in_no_words_is_an_error_all_the_same(body: bytes) -> None:
    reading = read(b"HTTP/1.1 500 Oh\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    assert reading.problem
    assert len(reading.problem) <= 300


def test_a_status_without_a_reason_is_read() -> None:
    answer, _, _ = received([b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n"])
    assert answer.status == 200


def test_continue_is_not_the_answer() -> None:
    answer, _, is_done = received([b"HTTP/1.1 100 Continue\r\n\r\n", chunked(*STREAM)])
    assert (answer.status, parse_response(answer).text, is_done) == (200, "Grüße aus Köln 🎉", True)


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    answer, connection, _ = received([b"HTTP/1.0 200 OK\r\n\r\n", *STREAM], closes=True)
    assert (parse_response(answer).problem, answer.is_over, connection.is_open) == ("", True, False)


def test_a_connection_that_the_server_will_close_is_not_kept() -> None:
    _, connection, _ = received([b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"])
    assert not connection.is_open


def test_an_answer_that_nobody_asked_for_ends_the_connection() -> None:
    async def feed() -> bool:
        connection, wire = OutboundConnection(), Wire()
        connection.connection_made(wire)  # type: ignore[arg-type]  # goes nowhere
        connection.data_received(HEAD)
        return wire.is_aborted

    assert asyncio.run(feed())


@pytest.mark.parametrize(
    ("total", "lengths", "tokens"),
    [
        (3, [1, 1, 1], [1, 1, 1]),
        (5, [1, 1], [2, 3]),
        (10, [4, 2], [6, 4]),
        (2, [1, 1, 1], [1, 1, 1]),
        (4, [0, 0], [2, 2]),
    ],
)
def test_tokens_are_spread_by_the_lengths_of_texts(total: int, lengths: list[int], tokens: list[int]) -> None:
    assert spread(total, lengths) == tokens


def samples_from(serve: Any, *, users: int = 1, requests: int = 4) -> tuple[Sample, ...]:
    """A load on a server that is a function of (reader, writer)."""

    async def run() -> tuple[Sample, ...]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        target = ServerAddress(base=f"http://127.0.0.1:{port}", endpoint="completions", model="m")
        workload = Workload(name="test", arrivals=ClosedLoop(users), requests=RequestMix(Fixed(3), Fixed(3)))
        schedule = workload.draw(0, num_requests=requests)
        result = await run_load(target, schedule, LoadOptions(metrics_url=None))
        server.close()
        return result.samples

    return asyncio.run(run())


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
    return await reader.readexactly(length)


def test_a_kept_connection_that_was_closed_is_no_error() -> None:
    """The server closes every connection after its first answer, without having said so."""
    connections = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(await read_request(reader))
        writer.write(chunked(*STREAM))
        writer.close()

    samples = samples_from(serve)
    assert [sample.outcome for sample in samples] == [Outcome.OK] * 4
    assert len(connections) == 4


def test_a_new_connection_that_breaks_is_an_error() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.close()

    samples = samples_from(serve)
    assert [sample.outcome for sample in samples] == [Outcome.ERROR] * 4
    assert {sample.error for sample in samples} == {"the server closed the connection"}


def test_no_server_at_all_is_an_error_of_each_request() -> None:
    async def run() -> tuple[Sample, ...]:
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        target = ServerAddress(base=f"http://127.0.0.1:{port}", endpoint="completions", model="m")
        workload = Workload(name="test", arrivals=ClosedLoop(2), requests=RequestMix(Fixed(3), Fixed(3)))
        return (await run_load(target, workload.draw(0, num_requests=6), LoadOptions(metrics_url=None))).samples

    samples = asyncio.run(run())
    assert len(samples) == 6
    assert all(sample.error.startswith("no connection") for sample in samples)


@pytest.mark.parametrize(
    "base", ["http://localhost:0", "http://localhost:http", "http://:80", "http://localhost:99999"]
)
def test_an_address_that_is_none_is_named(base: str) -> None:
    with pytest.raises(UsageError, match="is no host and port"):
        ConnectionPool(base)
