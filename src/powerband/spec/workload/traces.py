"""Traces of requests from files: Azure's CSV, Mooncake's JSON lines, ShareGPT's JSON, and the records of our own runs.

    azure      TIMESTAMP,ContextTokens,GeneratedTokens         lengths only: no two prompts share anything
    mooncake   timestamp (ms), input_length, output_length, hash_ids (of blocks of 512 tokens; equal ids, equal text)
    sharegpt   a list of {"conversations": [{"from", "value"}]}  the text itself; no times
    records    requests.jsonl of `powerband bench`: one load

Times count from the first request on. Nothing in a file is executed; a line that is wrong is an error that names it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from powerband.documents import parse_json
from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.config_reader import shown
from powerband.spec.workload.lengths import MAX_TOKENS
from powerband.spec.workload.schedule import Segment
from powerband.spec.workload.workload import MAX_TURNS, RequestTrace, TracedRequest

MOONCAKE_BLOCK = 512
MAX_FILE_BYTES = 1 << 30
MAX_SPAN_S = 366 * 86400.0  # from the first request to the last
_HEAD_CHARS = 1 << 16
_MAX_PROBLEMS = 300
_TOKENS_PER_BYTE = 0.25  # of English text, where no tokenizer counts

Count = Callable[[str], int]


def read_trace(path: Path, *, format: str = "auto", count_tokens: Count | None = None) -> RequestTrace:
    """format: 'auto' or one of FORMATS. count_tokens: of a text, for traces that have text only; default: by length.

    Raises EnvironmentFault when the file cannot be read, UsageError when it is not what it should be.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)  # what is no regular file has no size to ask for
        content = raw.decode("utf-8-sig") if len(raw) <= MAX_FILE_BYTES else ""
    except OSError as problem:
        raise EnvironmentFault(f"Cannot read {path}: {problem.strerror}.", param="trace") from None
    except UnicodeDecodeError:
        raise _wrong(path, "it is not text in UTF-8") from None
    if len(raw) > MAX_FILE_BYTES:
        raise UsageError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB.", hint="Cut it.", param="trace")
    kind = _recognised(content) if format == "auto" else format
    if kind not in FORMATS:
        raise _wrong(path, "its format was not recognised" if format == "auto" else f"unknown format '{format}'")
    try:
        if kind == "sharegpt":
            requests = list(_sharegpt(content, count_tokens or _estimate))
        else:
            requests = list(_READERS[kind](content))
    except (ValueError, TypeError, RecursionError, csv.Error) as problem:
        raise _wrong(path, f"read as {kind}, {str(problem)[:_MAX_PROBLEMS]}") from None
    requests.sort(key=lambda request: request.time_s)
    if requests and (first_s := requests[0].time_s):
        requests = [replace(request, time_s=request.time_s - first_s) for request in requests]
    if requests and requests[-1].time_s > MAX_SPAN_S:
        days = requests[-1].time_s / 86400
        raise _wrong(path, f"its last request is {days:.4g} days after its first; the limit is {MAX_SPAN_S / 86400:g}")
    source = {"file": path.name, "format": kind, "sha256": hashlib.sha256(raw).hexdigest()}
    return RequestTrace(source, tuple(requests))


def _recognised(content: str) -> str:
    """A format's name by how the file begins, or ''."""
    head = content[:_HEAD_CHARS].lstrip()
    if head.startswith("["):
        return "sharegpt"
    first = head.partition("\n")[0]
    if "ContextTokens" in first:
        return "azure"
    if '"scheduled_s"' in first:
        return "records"
    return "mooncake" if '"input_length"' in first else ""


def _azure(content: str) -> Iterator[TracedRequest]:
    """Microsoft's Azure public dataset (AzureLLMInferenceTrace)."""
    rows, first = csv.DictReader(io.StringIO(content.lstrip(), newline=None)), None
    for row in rows:
        number = rows.line_num
        with _place(f"line {number}"):
            time = datetime.fromisoformat(row["TIMESTAMP"].strip())
            # The trace of 2023 says no zone, that of 2024 says +00:00.
            time = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
            first = first or time
            prompt, output = _tokens(int(row["ContextTokens"])), _tokens(int(row["GeneratedTokens"]))
        yield TracedRequest((time - first).total_seconds(), (Segment(f"azure/{number}", prompt),), output)


def _mooncake(content: str) -> Iterator[TracedRequest]:
    """Each id of a request stands for 512 tokens; the last for what remains. Prompts share text exactly as far as their
    ids agree. What is beyond the ids' blocks, or has none, is the request's own.
    """
    whole: dict[int, Segment] = {}
    for number, line in _json_lines(content):
        with _place(f"line {number}"):
            left, keys, segments = _tokens(line["input_length"]), line.get("hash_ids", []), []
            if not isinstance(keys, list) or len(keys) > -(-left // MOONCAKE_BLOCK):
                raise ValueError(f"hash_ids are not a list with one entry for each {MOONCAKE_BLOCK} of {left} tokens")
            for key in keys:
                if isinstance(key, bool) or not isinstance(key, int):
                    raise ValueError(f"{shown(key)} among the hash_ids")
                if left >= MOONCAKE_BLOCK:
                    segment = whole.get(key) or whole.setdefault(key, Segment(f"mooncake/{key}", MOONCAKE_BLOCK))
                else:
                    segment = Segment(f"mooncake/{key}", left)
                segments.append(segment)
                left -= segment.tokens
            if left > 0:
                segments.append(Segment(f"mooncake/line {number}", left))
            time_s, output = _time(line.get("timestamp", 0)) / 1000, _tokens(line["output_length"])
        yield TracedRequest(time_s, tuple(segments), output)


def _sharegpt(content: str, count_tokens: Count) -> Iterator[TracedRequest]:
    """A person's turns are prompts, the model's the lengths of answers. Talks that do not begin with a person are left
    out, and so is what follows an empty turn, or two turns of the same side.
    """
    talks = parse_json(content)
    if not isinstance(talks, list):
        raise ValueError("it is not a list of conversations")
    for number, talk in enumerate(talks, 1):
        with _place(f"conversation {number}"):
            turns = talk.get("conversations") or talk.get("conversation") or []
            found = list(_exchanges(turns[:MAX_TURNS], count_tokens))
        for turn, (text, prompt, output) in enumerate(found):
            yield TracedRequest(0.0, (Segment(f"sharegpt/{number}/{turn}", prompt, text),), output, str(number))


def _exchanges(turns: list[dict[str, str]], count_tokens: Count) -> Iterator[tuple[str, int, int]]:
    """(question, its tokens, tokens of the answer)."""
    for question, answer in zip(turns[::2], turns[1::2], strict=False):
        if question["from"] not in ("human", "user") or answer["from"] not in ("gpt", "assistant", "chatgpt"):
            return
        text, answered = _text(question["value"]), _text(answer["value"])
        if not text or not answered:
            return
        yield text, _tokens(count_tokens(text)), _tokens(count_tokens(answered))


def _records(content: str) -> Iterator[TracedRequest]:
    """requests.jsonl: the same prompts at the same times, with the outputs that were asked for."""
    points = set()
    for number, line in _json_lines(content):
        with _place(f"line {number}"):
            points.add(str(line.get("point", 0)))
            if len(points) > 1:
                raise ValueError("a second load begins (its point is another): cut the file to one")
            segments = tuple(
                Segment(_text(s["key"]), _tokens(s["tokens"]), None if s.get("text") is None else _text(s["text"]))
                for s in line["segments"]
            )
            if not segments:
                raise ValueError("it has no segments")
            talk = line.get("conversation")
            time_s, output = _time(line["scheduled_s"]), _tokens(line["asked_tokens"])
        yield TracedRequest(time_s, segments, output, None if talk is None else str(talk))


_READERS: Mapping[str, Callable[[str], Iterable[TracedRequest]]] = {
    "azure": _azure,
    "mooncake": _mooncake,
    "records": _records,
}
FORMATS = ("azure", "mooncake", "sharegpt", "records")


@contextmanager
def _place(name: str) -> Iterator[None]:
    """Errors name the place."""
    try:
        yield
    except KeyError as problem:
        raise ValueError(f"{name} has no {problem}") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as problem:
        raise ValueError(f"{name}: {problem}") from None


def _json_lines(content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines: JSON's strings may hold what it takes for ends of lines.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            with _place(f"line {number}"):
                value = parse_json(line)
                if not isinstance(value, dict):
                    raise ValueError("it is not a JSON object")
            yield number, value


def _tokens(count: Any) -> int:
    """At least one: nothing can be asked for none."""
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_TOKENS:
        raise ValueError(f"{shown(count)} tokens; there may be 0 to {MAX_TOKENS}")
    return max(count, 1)


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"the time {shown(value)}")
    return float(value)


def _text(value: Any) -> str:
    """Half a character (a lone surrogate) cannot be sent: it becomes a question mark."""
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not a text")
    return value.encode(errors="replace").decode()


def _estimate(text: str) -> int:
    return math.ceil(len(text.encode()) * _TOKENS_PER_BYTE)


def _wrong(path: Path, why: str) -> UsageError:
    return UsageError(
        f"{path} is not a valid trace: {why}.", hint=f"Formats: {', '.join(FORMATS)} (--trace-format).", param="trace"
    )
