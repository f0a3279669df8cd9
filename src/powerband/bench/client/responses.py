"""From the pieces of a streamed answer to chunks of tokens with their times, after it has ended."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from powerband.http_client.connection import CollectedResponse
from powerband.openai.chunks import NO_ERROR, ChunkChoice, ChunkDelta, ChunkUsage, InvalidChunk, read_chunk
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
    content: str = ""  # of a chat, without reasoning
    calls: dict[int, list[str]] = field(default_factory=dict)  # of a chat: names and arguments
    finish_reason: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    counted_by_usage: bool = False
    problem: str = ""  # why it counts as an error, or ''


def parse_response(answer: CollectedResponse) -> ParsedResponse:
    """Parse a streamed response. `problem` describes what is invalid in it."""
    reading = ParsedResponse(problem=answer.problem)
    if answer.status != 200:
        reading.problem = answer.problem or error_text(answer.body()) or f"HTTP {answer.status}"
        return reading
    times_s: list[float] = []  # of each choice of each chunk …
    texts: list[str | None] = []  # … what it adds; None: by its looks it carries no token …
    totals: list[int | None] = []  # … and how many output tokens there are so far, where it says so
    has_ended = False
    reader = EventReader(MAX_RESPONSE_BYTES)
    # What follows the last empty line is whole when the answer is.
    pieces = zip([*answer.times_s, *answer.times_s[-1:]], [*answer.pieces, b"\n\n"], strict=False)
    events = [(time_s, data) for time_s, piece in pieces for data in reader.feed(piece)]
    for time_s, data in events:
        if data == END:
            has_ended = True
            continue
        try:
            event = read_chunk(data)
        except InvalidChunk as problem:
            reading.problem = reading.problem or f"an invalid chunk: {problem}"
            continue
        if event.error is not NO_ERROR and event.has_error:
            reading.problem = error_text(data) or "an error in the stream"
        if event.usage is not None:
            _add_usage(reading, event.usage)
        for choice in event.choices or ():
            has_ended = has_ended or bool(choice.finish_reason)  # '' (LocalAI and others) is not an end
            reading.finish_reason = choice.finish_reason or reading.finish_reason
            times_s.append(time_s)
            texts.append(_token_text(choice))
            if choice.delta is not None:
                _add_delta(reading, choice.delta)
            totals.append(event.usage.completion_tokens if event.usage is not None else None)
    if not reading.problem and not has_ended:
        reading.problem = "the stream ended before its answer did"
    reading.text = "".join(text for text in texts if text)
    _count(reading, times_s, texts, totals)
    return reading


def error_text(body: bytes) -> str:
    """The message of an error object as OpenAI's, or the body's beginning."""
    return (read_error(body).message or " ".join(body.decode(errors="replace").split()))[:MAX_ERROR_CHARS]


def _token_text(choice: ChunkChoice) -> str | None:
    """What the chunk adds, which may be nothing yet (half a character); None: it carries no token."""
    delta = choice.delta
    if delta is None:
        if choice.text:
            return choice.text
        return None if choice.text is None or choice.finish_reason else ""
    content = delta.content
    if isinstance(content, str) and content and not (delta.reasoning_content or delta.reasoning):
        return content
    if delta.is_parsed:
        texts = content, delta.reasoning_content or delta.reasoning
        return "".join(text for text in texts if isinstance(text, str))
    return None if content is None or delta.role is not None or choice.finish_reason else ""


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int = 0
    function: _Function | None = None


def _add_delta(reading: ParsedResponse, delta: ChunkDelta) -> None:
    if isinstance(delta.content, str):
        reading.content += delta.content
    if not delta.has_calls:
        return
    try:
        calls = msgspec.json.decode(delta.tool_calls, type=list[_Call])
    except msgspec.MsgspecError as problem:
        reading.problem = reading.problem or f"invalid tool calls: {problem}"
        return
    for call in calls:
        whole = reading.calls.setdefault(call.index, ["", ""])
        if call.function is not None:
            whole[0] += call.function.name or ""
            whole[1] += call.function.arguments or ""


def _add_usage(reading: ParsedResponse, usage: ChunkUsage) -> None:
    """Zeros, which some servers send until the end or throughout, count nothing."""
    reading.prompt_tokens = usage.prompt_tokens or reading.prompt_tokens
    if usage.completion_tokens:
        reading.counted_by_usage = True
        reading.output_tokens = usage.completion_tokens
    if usage.prompt_tokens_details is not None:
        reading.cached_tokens = usage.cached_tokens


def _count(reading: ParsedResponse, times_s: list[float], texts: list[str | None], totals: list[int | None]) -> None:
    """Which chunks carry tokens, and how many: by the usage that each says, so far; else those that carry text, and the
    whole usage spread by the lengths of their texts.
    """
    if totals and totals[-1] and None not in totals:
        before = 0
        for time_s, total in zip(times_s, totals, strict=True):
            if total is not None and total > before:
                reading.times_s.append(time_s)
                reading.tokens.append(total - before)
                before = total
        return
    reading.times_s = [time_s for time_s, text in zip(times_s, texts, strict=True) if text is not None]
    if not reading.counted_by_usage:
        reading.output_tokens = len(reading.times_s)
    reading.tokens = spread(reading.output_tokens, [len(text) for text in texts if text is not None])


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
