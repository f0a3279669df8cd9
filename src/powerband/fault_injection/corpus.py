"""Requests that are wrong, each in one way: what a server must refuse, and must not die of."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from powerband.bench.client.messages import ServerAddress

_DEPTH = 100_000


def malformed_requests(target: ServerAddress) -> dict[str, bytes]:
    """Whole requests as they go to the socket, by what is wrong with them. Some announce more than they send."""
    made = {name: http_request(target, body) for name, body in _bodies(target)}
    good = _body(target)
    made |= {f"HTTP: {name}": request for name, request in _messages(target, good)}
    return made


def http_request(
    target: ServerAddress,
    body: bytes,
    *,
    length: str | None = None,
    more: str = "",
    method: str = "POST",
    path: str = "",
) -> bytes:
    """length: what Content-Length says; None: the truth; '': no such header. more: headers, with line ends."""
    authority, _, prefix = target.base.partition("://")[2].partition("/")
    whole = path or (f"/{prefix.rstrip('/')}" if prefix else "") + target.path
    content = str(len(body)) if length is None else length
    headers = {"Host": authority, "Content-Type": "application/json"} | target.headers
    if content:
        headers["Content-Length"] = content
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{method} {whole} HTTP/1.1\r\n{lines}{more}\r\n".encode() + body


def generation_body(target: ServerAddress, tokens: int, *, stream: bool = True) -> bytes:
    """A right one, of a short prompt."""
    return _body(target, max_tokens=tokens, stream=stream)


def _body(target: ServerAddress, **changed: object) -> bytes:
    if target.endpoint == "chat":
        content: dict[str, object] = {"messages": [{"role": "user", "content": "Say something."}]}
    else:
        content = {"prompt": "Say something."}
    return msgspec.json.encode({"model": target.model, **content, "max_tokens": 4, **changed} | target.extra)


def _bodies(target: ServerAddress) -> Iterator[tuple[str, bytes]]:
    good, prompt = _body(target), "messages" if target.endpoint == "chat" else "prompt"
    yield "nothing", b""
    yield "no JSON", b"prompt=hello&max_tokens=4"
    yield "JSON that ends early", good[: len(good) // 2]
    yield "something after the JSON", good + b"}"
    yield "a list", b"[" + good + b"]"
    yield "null", b"null"
    yield "a number", b"1"
    yield "no prompt", msgspec.json.encode({"model": target.model, "max_tokens": 4})
    prompts: dict[str, object] = {"a number": 7, "an object": {"a": 1}, "null": None, "a list of lists": [[[]]]}
    for name, value in prompts.items():
        yield f"the prompt is {name}", _body(target, **{prompt: value})
    for asked in ("many", -1, 0, 1.5, [4], True, 1 << 40):
        yield f"max_tokens is {asked!r}", _body(target, max_tokens=asked)
    yield "max_tokens has 1,000 digits", good.replace(b'"max_tokens":4', b'"max_tokens":' + b"9" * 1000)
    for text in (b"1e999", b"-1e999", b"NaN", b"Infinity"):
        yield f"temperature is {text.decode()}", good[:-1] + b',"temperature":' + text + b"}"
    yield "temperature is an object", _body(target, temperature={})
    yield "n is huge", _body(target, n=1 << 31)
    yield "stop is 100,000 strings", _body(target, stop=["x"] * 100_000)
    yield "stream is a string", _body(target, stream="yes")
    yield "model is a number", _body(target, model=7)
    yield "model is a path", _body(target, model="../../etc/passwd")
    yield "lists, 100,000 deep", good[:-1] + b',"stop":' + b"[" * _DEPTH + b"]" * _DEPTH + b"}"
    yield "objects, 100,000 deep", good[:-1] + b',"metadata":' + b'{"a":' * _DEPTH + b"1" + b"}" * _DEPTH + b"}"
    yield "no UTF-8", good.replace(b"Say", b"\xff\xfe\xc3\x28")
    yield "UTF-8 of a surrogate", good.replace(b"Say", b"\xed\xa0\x80")
    yield "half a surrogate pair", good.replace(b"Say", b"\\ud800")
    yield "a zero byte", good.replace(b"Say", b"S\x00y")
    yield "UTF-16", good.decode().encode("utf-16")


def _messages(target: ServerAddress, good: bytes) -> Iterator[tuple[str, bytes]]:
    yield "announces more than it sends", http_request(target, good, length=str(len(good) + 100))
    yield "announces less than it sends", http_request(target, good, length=str(len(good) - 5))
    yield "a negative length", http_request(target, good, length="-5")
    yield "a length that is no number", http_request(target, good, length="many")
    yield "a length of 30 digits", http_request(target, good, length="9" * 30)
    yield "two lengths", http_request(target, good, more="Content-Length: 3\r\n")
    yield "a length, and in chunks", http_request(target, good, more="Transfer-Encoding: chunked\r\n")
    chunked = "Transfer-Encoding: chunked\r\n"
    yield "a chunk's size that is no number", http_request(target, b"zz\r\n" + good, length="", more=chunked)
    yield "a chunk's size of 20 digits", http_request(target, b"f" * 20 + b"\r\n", length="", more=chunked)
    yield "10,000 headers", http_request(target, good, more="".join(f"X-{i}: {i}\r\n" for i in range(10_000)))
    yield "a header of 1 MiB", http_request(target, good, more=f"X-Long: {'x' * (1 << 20)}\r\n")
    yield "a header without a colon", http_request(target, good, more="nonsense\r\n")
    yield "a folded header", http_request(target, good, more="X-Folded: a\r\n b\r\n")
    yield "a path of 64 KiB", http_request(target, good, path="/" + "v" * (64 << 10))
    yield "a path that climbs", http_request(target, good, path="/v1/../../../etc/passwd")
    yield "a method that does not exist", http_request(target, good, method="BREW")
    yield "HTTP/0.9", b"GET /\r\n"
    yield "HTTP/9.9", http_request(target, good).replace(b"HTTP/1.1", b"HTTP/9.9", 1)
    yield "a TLS greeting", bytes.fromhex("160301020001000001fc0303") + b"\x5a" * 500
    yield "bytes without sense", bytes((i * 167 + 13) % 256 for i in range(4096))
