"""From the pieces of a streamed answer to chunks of tokens with their times, after it has ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from powerband.http_client.connection import CollectedResponse
from powerband.openai.chunks import ChunkChoice, ChunkUsage, InvalidChunk, Text, read_chunk
from powerband.openai.errors import read_error
from powerband.openai.events import END, EventReader

MAX_RESPONSE_BYTES = 64 << 20
MAX_ERROR_CHARS = 300


@dataclass(slots=True)
class ParsedResponse:
    """A response, read after it has ended."""

    times_s: list[float] = field(default_factory=list)  # of the chunks that carry tokens, on the monotonic clock
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    counted_by_usage: bool = False
    problem: str = ""  # why it counts as an error, or ''


class _TimedText(NamedTuple):
    time_s: float
    text: str | None  # None: by its looks it carries no token
    total: int | None  # output tokens so far, where it says so


def parse_response(answer: CollectedResponse) -> ParsedResponse:
    """Parse a streamed response. `problem` describes what is invalid in it."""
    reading = ParsedResponse(problem=answer.problem)
    if answer.status != 200:
        reading.problem = answer.problem or error_text(answer.body()) or f"HTTP {answer.status}"
        return reading
    chunks: list[_TimedText] = []
    has_ended = False
    for time_s, data in _events(answer):
        if data == END:
            has_ended = True
            continue
        try:
            event = read_chunk(data)
        except InvalidChunk as problem:
            reading.problem = reading.problem or f"an invalid chunk: {problem}"
            continue
        if event.has_error:
            reading.problem = error_text(data) or "an error in the stream"
        if event.usage is not None:
            _add_usage(reading, event.usage)
        for choice in event.choices or ():
            has_ended = has_ended or bool(choice.finish_reason)  # '' (LocalAI and others) is not an end
            reading.finish_reason = choice.finish_reason or reading.finish_reason
            total = event.usage.completion_tokens if event.usage is not None else None
            chunks.append(_TimedText(time_s, _token_text(choice), total))
    if not reading.problem and not has_ended:
        reading.problem = "the stream ended before its answer did"
    reading.text = "".join(chunk.text for chunk in chunks if chunk.text)
    _count(reading, chunks)
    return reading


def error_text(body: bytes) -> str:
    """The message of an error object as OpenAI's, or the body's beginning."""
    return (read_error(body).message or " ".join(body.decode(errors="replace").split()))[:MAX_ERROR_CHARS]


def _events(answer: CollectedResponse) -> Iterator[tuple[float, bytes]]:
    """The data of server-sent events, each with the time at which it was whole."""
    reader = EventReader(MAX_RESPONSE_BYTES)
    for time_s, piece in zip(answer.times_s, answer.pieces, strict=True):
        for data in reader.feed(piece):
            yield time_s, data
    if answer.times_s:  # what follows the last empty line is whole when the answer is
        for data in reader.feed(b"\n\n"):
            yield answer.times_s[-1], data


def _token_text(choice: ChunkChoice) -> str | None:
    """What the chunk adds, which may be nothing yet (half a character); None: it carries no token."""
    if choice.delta is not None:
        delta = choice.delta
        text = _plain(delta.content) + _plain(delta.reasoning_content or delta.reasoning)
        if text or delta.is_parsed:
            return text
        is_silent = delta.role is not None or bool(choice.finish_reason)
        return None if is_silent or delta.content is None else ""
    if choice.text:
        return choice.text
    return None if choice.text is None or choice.finish_reason else ""


def _plain(text: Text) -> str:
    """What comes in parts is not read."""
    return text if isinstance(text, str) else ""


def _add_usage(reading: ParsedResponse, usage: ChunkUsage) -> None:
    """Zeros, which some servers send until the end or throughout, count nothing."""
    reading.prompt_tokens = usage.prompt_tokens or reading.prompt_tokens
    if usage.completion_tokens:
        reading.counted_by_usage = True
        reading.output_tokens = usage.completion_tokens
    if usage.prompt_tokens_details is not None:
        reading.cached_tokens = usage.cached_tokens


def _count(reading: ParsedResponse, chunks: list[_TimedText]) -> None:
    """Which chunks carry tokens, and how many: by the usage that each says, so far; else those that carry text, and the
    whole usage spread by the lengths of their texts.
    """
    if chunks and chunks[-1].total and all(chunk.total is not None for chunk in chunks):
        before = 0
        for chunk in chunks:
            if chunk.total is not None and chunk.total > before:
                reading.times_s.append(chunk.time_s)
                reading.tokens.append(chunk.total - before)
                before = chunk.total
        return
    texts = [chunk.text for chunk in chunks if chunk.text is not None]
    if not reading.counted_by_usage:
        reading.output_tokens = len(texts)
    reading.times_s = [chunk.time_s for chunk in chunks if chunk.text is not None]
    reading.tokens = spread(reading.output_tokens, [len(text) for text in texts])


def spread(total: int, lengths: list[int]) -> list[int]:
    """`total` in whole numbers of at least 1, the excess in proportion to `lengths`; all 1 where total is too small."""
    excess = total - len(lengths)
    if excess <= 0:
        return [1] * len(lengths)
    weights = lengths if any(lengths) else [1] * len(lengths)
    whole = sum(weights)
    made, reached, given = [], 0, 0
    for weight in weights:
        reached += weight
        due = excess * reached // whole
        made.append(1 + due - given)
        given = due
    return made
