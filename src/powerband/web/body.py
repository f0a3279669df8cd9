"""Decodes a request's body into a typed value: size-limited before it is read; errors name field, value and limit."""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec
import numpy as np
from starlette.requests import ClientDisconnect, Request

from powerband.errors import InvalidRequest
from powerband.web.errors import HttpError
from powerband.web.field_types import allowed_values, field_names

MAX_DEPTH = 64
MAX_ITEMS = 100_000  # strings, lists and objects: decoded, each takes many times the bytes it was sent with
_SLICE_BYTES = 64 << 10
_QUOTE = ord('"')
_AS_STEPS = bytes(0x01 if byte in b"[{" else 0xFF if byte in b"]}" else 0x00 for byte in range(256))  # as int8
_WHERE = re.compile(r"(`key` in )?`\$([^`]*)`")
_UNKNOWN = "Object contains unknown field `"
_SHOWN_CHARS = 60
_MAX_WHAT = 500
_MAX_PATH = 1000
_SHOWN_BODY_BYTES = 256 << 10  # errors about larger bodies may show no value, which takes decoding the body again
_MAX_AMENDED_VALUES = 300_000  # numbers of a larger body that is decoded again; 10 ms
_SECONDS_TO_SEND = 60

Body = TypeVar("Body")
Amend = Callable[[dict[str, Any]], dict[str, Any]]


async def read_json(request: Request, kind: type[Body], max_bytes: int, amend: Amend | None = None) -> Body:
    """The body as `kind`. Raises as `read_body` and `decode` do."""
    return decode(await read_body(request, max_bytes), kind, amend)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request whose content type is JSON. Raises HttpError 400, 408, 413 and 415."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":  # a small compressed body may expand to any size
        raise HttpError(
            415, "unsupported_encoding", f"The content encoding is {_shown(coding)}.", hint="Send it plain."
        )
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise HttpError(
            415, "unsupported_media_type", f"The content type is {_shown(media)}.", hint="Send application/json."
        )
    return await _read(request, max_bytes)


def decode(data: bytes, kind: type[Body], amend: Amend | None = None) -> Body:
    """Decode JSON as `kind`. Raises InvalidRequest naming the field, its value, and what it may be.

    amend: called with a body that is not of this kind; what it returns is tried instead.
    """
    check_size(data)
    try:
        data.decode()  # checks UTF-8: msgspec skips unknown fields, but replicas may decode them
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        problem = str(error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_json(error) from None
    if len(data) > _SHOWN_BODY_BYTES and (amend is None or _num_commas(data) > _MAX_AMENDED_VALUES):
        raise _complaint(problem, kind, "is wrong")
    try:
        value = msgspec.json.decode(data)
    except msgspec.ValidationError:  # a number such as 1e999, which is no value at all
        raise _complaint(problem, kind, "cannot be read") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise _not_json(error) from None
    if amend is not None and isinstance(value, dict):
        value = amend(value)
        try:
            return msgspec.convert(value, kind, str_keys=True)
        except msgspec.ValidationError as error:
            problem = str(error)
    raise _complaint(problem, kind, "is", value)


def unknown_field(name: str, parent: str, known: Iterable[str], hint: str) -> InvalidRequest:
    """hint: used where no known name is close."""
    param = f"{parent}.{name}".lstrip(".")[:_SHOWN_CHARS]
    near = difflib.get_close_matches(name[:_SHOWN_CHARS], list(known), n=1)
    hint = f"Did you mean '{near[0]}'?" if near else hint
    return InvalidRequest(f"Unknown field '{param}'.", hint=hint, param=param, code="unknown_parameter")


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = HttpError(
        413,
        "request_too_large",
        f"The body is larger than {max_bytes} bytes.",
        hint="Send less, or raise --max-body-bytes.",
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    data = bytearray()  # not a list, in which a body that comes in pieces of two bytes would take thirty times its size
    try:
        async with asyncio.timeout(_SECONDS_TO_SEND):
            async for chunk in request.stream():
                data += chunk
                if len(data) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise HttpError(408, "request_timeout", f"The body took longer than {_SECONDS_TO_SEND} s.") from None
    except ClientDisconnect:
        raise HttpError(400, "client_disconnected", "The client left before its request was complete.") from None
    return bytes(data)


def check_size(data: bytes) -> None:
    """Raise InvalidRequest if JSON is nested too deeply, or has so many parts that decoding would take long.

    Takes a few milliseconds per MiB whatever the content: every step is linear in the bytes.
    """
    strings = (data.count(b'"') - data.count(b'\\"')) // 2
    brackets = data.count(b"[") + data.count(b"{")
    if brackets > MAX_DEPTH:
        brackets = _containers(data)
    if strings + brackets > MAX_ITEMS:
        raise InvalidRequest(f"The JSON has more than {MAX_ITEMS} strings, lists and objects.", code="invalid_json")


def _containers(data: bytes) -> int:
    """The number of lists and objects in JSON. Raises InvalidRequest if they are nested too deeply.

    Without escapes, the parity of the preceding quotes shows whether a byte is in a string. If that is wrong, the data
    is invalid JSON from there on, and the decoder rejects it.
    """
    plain = data.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in data else data
    codes = np.frombuffer(plain, dtype=np.uint8)
    steps = np.frombuffer(plain.translate(_AS_STEPS), dtype=np.int8)
    depth = containers = 0
    in_string = False
    for start in range(0, len(codes), _SLICE_BYTES):
        inside = np.logical_xor.accumulate(codes[start : start + _SLICE_BYTES] == _QUOTE) ^ in_string
        outside = steps[start : start + _SLICE_BYTES][~inside]
        depths = np.cumsum(outside[outside != 0], dtype=np.int32) + depth
        if depths.max(initial=0) > MAX_DEPTH:
            raise InvalidRequest(f"The JSON is nested deeper than {MAX_DEPTH} levels.", code="invalid_json")
        in_string, depth = bool(inside[-1]), int(depths[-1]) if len(depths) else depth
        containers += int(np.count_nonzero(outside > 0))
    return containers


def _num_commas(data: bytes) -> int:
    """Commas outside of strings: about as many as a body has values. Only of valid JSON."""
    plain = data.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in data else data
    return sum(part.count(b",") for part in plain.split(b'"')[::2])


def _not_json(error: Exception) -> InvalidRequest:
    if isinstance(error, UnicodeDecodeError):
        what = f"it is not UTF-8 (byte {error.start})"
    elif isinstance(error, RecursionError):
        what = "it is nested too deeply"
    else:
        what = str(error).removeprefix("JSON is malformed: ").replace("Input data was truncated", "it ends too early")
    return InvalidRequest(f"The body is not valid JSON: {what}.", code="invalid_json")


def _complaint(problem: str, kind: type[Any], found: str, value: Any = None) -> InvalidRequest:
    """Replace msgspec's message: name the field, the value that was sent, and what it may be.

    found: what is said of the field; with "is", its value in the body `value` follows.
    """
    what, is_key, path = _parts_of(problem)
    place = path.partition("[...]")[0]  # of an object with arbitrary keys, only the object itself has a name
    param = re.sub(r"\[(\d+)\]", r".\1", place).lstrip(".")
    if what.startswith(_UNKNOWN):
        name = what.removeprefix(_UNKNOWN).rstrip("`")
        return unknown_field(name, param, field_names(kind, path), "The fields are listed in docs/api.md.")
    if what.startswith("Object missing required field"):
        name = what.partition("`")[2].rstrip("`")
        param = f"{param}.{name}".lstrip(".")
        return InvalidRequest(f"'{param}' is missing.", param=param)
    allowed = allowed_values(kind, path, of_key=is_key)
    if is_key:
        return InvalidRequest(f"A key of '{param}' is wrong: it must be {allowed}.", param=param)
    if found == "is":
        found = f"is {_shown(_value_at(value, place))}"
    if path != place:
        return InvalidRequest(f"'{param}' {found}: each value must be {allowed}.", param=param or None)
    return InvalidRequest(f"'{param or 'body'}' {found}: it must be {allowed}.", param=param or None)


def _parts_of(text: str) -> tuple[str, bool, str]:
    """Split msgspec's 'what - at `$.path`' or '… - at `key` in `$.path`': what, whether it is about a key, the path.

    Message and path may quote long input, so both are cut.
    """
    what, _, where = text.rpartition(" - at ")
    match = _WHERE.fullmatch(where)
    if match is None:
        return text[:_MAX_WHAT], False, ""
    return what[:_MAX_WHAT], match[1] is not None, match[2][:_MAX_PATH]


def _value_at(value: Any, path: str) -> Any:
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        try:
            value = value[name] if name else value[int(index)]
        except (KeyError, IndexError, TypeError):
            return value
    return value


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
