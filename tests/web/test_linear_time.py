"""Whatever reads what others send takes time in proportion to its length: no text makes it quadratic.

Each reader gets texts that are hard for a scanner of its kind, and then the same, eight times as long. Time is the
processor's, and what takes too long is tried again, so that a busy machine does not matter; eight times the text may
take 24 times as long, where something quadratic takes 64 times as long.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable

import msgspec
import pytest

from powerband.errors import PowerbandError
from powerband.gateway.accounts.redaction import redact
from powerband.gateway.proxy.client_request import ClientRequest, RequestFields
from powerband.gateway.routes import ModelRoute, Routes
from powerband.gateway.trace_context import continue_trace
from powerband.server.protocol import ChatRequest, CompletionRequest
from powerband.spec.settings import memory_bytes
from powerband.spec.slo import SLO
from powerband.spec.workload.lengths import parse_lengths
from powerband.web.body import check_size, decode
from powerband.web.http1.framing import ChunkedFraming
from powerband.web.http1.head import parse_head

MAX_GROWTH = 24.0  # of the time, from a text to one that is eight times as long
LARGE_ENOUGH_S = 0.002

UNITS = [
    "a",
    " ",
    "\n",
    "\t",
    '"',
    "\\",
    '\\"',
    '"\\\n',
    '"",',
    "[",
    "[]",
    "{",
    '{"a":',
    "1",
    "1.",
    "1-",
    "- ",
    ",",
    ":",
]
UNITS += [
    " - at `$",
    "`",
    "a@",
    "a@b.",
    "@",
    "a.",
    "+",
    "(1) ",
    "1 1 ",
    "1.1.1.1.",
    "::",
    "a:",
    "eyJa.",
    "eyJ",
    "sk-a",
    "%",
]
UNITS += [
    "-----BEGIN PRIVATE KEY-----",
    "-----BEGIN ",
    "bearer ",
    "DE12 ",
    "DE12345678",
    "4111 ",
    "\\u0061",
    "é",
    "\ud83d\ude00",
]
TRIES = 3


def took_s(call: Callable[[], object]) -> float:
    start_s = time.thread_time()
    with contextlib.suppress(PowerbandError, ValueError):
        call()
    return time.thread_time() - start_s


def check_growth(read: Callable[[str], object], make: Callable[[int], str], size: int) -> None:
    """size: of the smallest text, in characters."""
    small, large = make(size), make(8 * size)
    large_s = took_s(lambda: read(large))
    if large_s < LARGE_ENOUGH_S:
        return
    small_s = min(took_s(lambda: read(small)) for _ in range(TRIES))
    for _ in range(TRIES):
        if large_s < MAX_GROWTH * max(small_s, LARGE_ENOUGH_S / 8):
            return
        large_s = min(large_s, took_s(lambda: read(large)))
    pytest.fail(f"{small_s:.4f} s, then {large_s:.4f} s")


def chunks(text: str) -> None:
    data = bytearray(text.encode("utf-8", "replace"))
    framing = ChunkedFraming()
    while data and not framing.is_complete:
        framing.take(data)
        if not framing.has_more:
            break


def body(text: str, kind: type[object]) -> None:
    decode(text.encode("utf-8", "replace"), kind)


TRACEPARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
READERS: dict[str, Callable[[str], object]] = {
    "JSON's depth": lambda text: check_size(text.encode("utf-8", "replace")),
    "JSON's depth, after brackets": lambda text: check_size(("[" * 65 + text).encode("utf-8", "replace")),
    "JSON's depth, in a string": lambda text: check_size(('["' + "[" * 65 + text).encode("utf-8", "replace")),
    "a text completion": lambda text: body(
        msgspec.json.encode({"prompt": "a", "x": text[:0]}).decode() + text, CompletionRequest
    ),
    "an unknown field": lambda text: body(
        msgspec.json.encode({"prompt": "a", printable(text): 1}).decode(), CompletionRequest
    ),
    "a wrong value": lambda text: body(
        msgspec.json.encode({"messages": [{"role": printable(text)}]}).decode(), ChatRequest
    ),
    "a key of an object": lambda text: body(
        msgspec.json.encode({"prompt": "", "logit_bias": {printable(text): 1}}).decode(), CompletionRequest
    ),
    "the gateway's intake": lambda text: ClientRequest(
        msgspec.json.encode({"prompt": printable(text), "x": printable(text)}), "completions"
    ),
    "the gateway's fields": lambda text: body('{"prompt": ' + text, RequestFields),
    "redaction": lambda text: redact(printable(text)),
    "redaction, in words": lambda text: redact("a@" + printable(text) + "!"),
    "amounts of memory": lambda text: memory_bytes(f"1{text}!"),
    "lengths": lambda text: parse_lengths(f"1{text}!", param="lengths"),
    "an SLO": lambda text: SLO.parse(f"ttft{text}"),
    "a trace's header": lambda text: continue_trace({"traceparent": TRACEPARENT + text, "tracestate": text}, share=1.0),
    "a head": lambda text: parse_head(
        f"GET /{text} HTTP/1.1\r\nHost: a\r\nX: {text}\r\n\r\n".encode("latin-1", "replace")
    ),
    "chunks": chunks,
    "chunks' extensions": lambda text: chunks("5;" + text),
    "trailers": lambda text: chunks("0\r\n" + text),
}
LIMITED = {"a head": 4096}  # by what a connection lets through


def printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


@pytest.mark.parametrize("name", READERS)
def test_time_grows_with_the_length_and_not_faster(name: str) -> None:
    read, size = READERS[name], LIMITED.get(name, 16_000)
    for unit in UNITS:
        check_growth(read, lambda length, unit=unit: unit * (length // len(unit)), size)  # type: ignore[misc]


def test_what_is_quadratic_is_found() -> None:
    quadratic = re.compile(rb'"(?:[^"\\]|\\.)*+"')  # begins again at every quote when there is no last one
    with pytest.raises(pytest.fail.Exception):
        check_growth(lambda text: quadratic.sub(b"", text.encode()), lambda length: '\\"' * (length // 2), 1000)


def test_time_to_check_routes_grows_with_their_number_and_not_faster() -> None:
    def check(text: str) -> None:
        Routes(models=tuple(ModelRoute(name=f"m{number}") for number in range(len(text))))

    check_growth(check, lambda length: "m" * length, 2_000)
