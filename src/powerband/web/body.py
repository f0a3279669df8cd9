"""Decodes a request's body into a typed value: size-limited before it is read; errors name field, value and limit."""

from __future__ import annotations

import asyncio
import difflib
import re
from typing import Any, TypeVar

import msgspec
import numpy as np
from starlette.requests import ClientDisconnect, Request

from powerband.errors import InvalidRequest
from powerband.web.errors import HttpError

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
_SHOWN_BODY_BYTES = 256 << 10  # errors about larger bodies show no value, because that takes decoding the body again
_SECONDS_TO_SEND = 60

Body = TypeVar("Body")


async def read_json(request: Request, kind: type[Body], max_bytes: int) -> Body:
    """The body as `kind`. Raises as `read_body` and `decode` do."""
    return decode(await read_body(request, max_bytes), kind)


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


def decode(data: bytes, kind: type[Body]) -> Body:
    """Decode JSON as `kind`. Raises InvalidRequest.

    `kind.not_supported`, if present, names API fields that are not supported yet.
    """
    check_size(data)
    try:
        data.decode()  # checks UTF-8: msgspec skips unknown fields, but replicas may decode them
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _complaint(str(error), data, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None


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
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(_SECONDS_TO_SEND):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise HttpError(408, "request_timeout", f"The body took longer than {_SECONDS_TO_SEND} s.") from None
    except ClientDisconnect:
        raise HttpError(400, "client_disconnected", "The client left before its request was complete.") from None
    return b"".join(chunks)


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


def _complaint(text: str, data: bytes, kind: type[Any]) -> InvalidRequest:
    """Convert msgspec's error: add the field's name, the value that was sent, and the nearest known field."""
    what, key, path = _parts_of(text)
    path = path.partition("[...]")[0]  # of an object with arbitrary keys, only the object itself has a name
    param = re.sub(r"\[(\d+)\]", r".\1", path).lstrip(".")
    if what.startswith(_UNKNOWN):
        return _unknown_field(what.removeprefix(_UNKNOWN).rstrip("`"), param, kind)
    if what.startswith("Object missing required field"):
        name = what.partition("`")[2].rstrip("`")
        param = f"{param}.{name}".lstrip(".")
        return InvalidRequest(f"'{param}' is missing.", param=param)
    expected = what[:1].lower() + what[1:]
    if key:
        return InvalidRequest(f"A key of '{param}' is wrong: {expected}.", param=param)
    if len(data) > _SHOWN_BODY_BYTES:
        return InvalidRequest(f"'{param or 'body'}' is wrong: {expected}.", param=param or None)
    try:
        found = f"is {_shown(_value_at(msgspec.json.decode(data), path))}"
    except (msgspec.DecodeError, RecursionError):  # such as 1e999, which is no value at all
        found = "cannot be read"
    return InvalidRequest(f"'{param or 'body'}' {found}: {expected}.", param=param or None)


def _parts_of(text: str) -> tuple[str, bool, str]:
    """Split msgspec's 'what - at `$.path`' or '… - at `key` in `$.path`': what, whether it is about a key, the path.

    Message and path may quote long input, so both are cut.
    """
    what, _, where = text.rpartition(" - at ")
    match = _WHERE.fullmatch(where)
    if match is None:
        return text[:_MAX_WHAT], False, ""
    return what[:_MAX_WHAT], match[1] is not None, match[2][:_MAX_PATH]


def _unknown_field(name: str, parent: str, kind: type[Any]) -> InvalidRequest:
    param = f"{parent}.{name}".lstrip(".")[:_SHOWN_CHARS]
    if name in getattr(kind, "not_supported", ()):
        return InvalidRequest(f"'{param}' is not supported yet.", param=param, code="unsupported_parameter")
    near = difflib.get_close_matches(name[:_SHOWN_CHARS], _field_names(kind, nested=bool(parent)), n=1)
    hint = f"Did you mean '{near[0]}'?" if near else "The fields are listed in /openapi.json."
    return InvalidRequest(f"Unknown field '{param}'.", hint=hint, param=param, code="unknown_parameter")


def _field_names(kind: type[Any], nested: bool) -> tuple[str, ...]:
    _, components = msgspec.json.schema_components([kind])
    names = {name: tuple(schema.get("properties", ())) for name, schema in components.items()}
    own = names.pop(kind.__name__, ())
    return tuple(field for fields in names.values() for field in fields) if nested else own


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
