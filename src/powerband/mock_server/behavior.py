"""What a mock server does: its behavior, the record of each request, and the bytes of its answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

import msgspec

from powerband.bench.client.messages import Endpoint
from powerband.bench.client.prompts import WORDS
from powerband.errors import InvalidRequest, UsageError
from powerband.openai.chunks import INVALID_JSON
from powerband.openai.events import DONE
from powerband.openai.fields import MessageFields, StreamOptionFields

MAX_OUTPUT_TOKENS = 1 << 16
FIRST_PROMPT_ID = 1 << 20  # token t of any answer has the id t; those of prompts come from here on
# reset: the connection. end: as if that were all. hang: nothing more comes. garbage: what is no answer. error: an event
# that says so. no_done: all comes but the last event.
DropBy = Literal["reset", "end", "hang", "garbage", "error", "no_done"]
_TOKENS = [f" {word}" for word in WORDS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Behavior:
    """Times in seconds; a count of 0 means never, or no limit. The default answers at once, as fast as it can.

    Token t (0, 1, …) of a request is due ttft_s + t · tpot_s after its arrival, or after it got a slot; a chunk is due
    with its first token. Nothing drifts: a chunk that was late does not move the next.
    """

    ttft_s: float = 0.0
    tpot_s: float = 0.0
    tokens_per_chunk: int = 1
    usage: Literal["continuous", "end", "none"] = "continuous"  # at most, and only if requested
    stall_at_s: float = 0.0  # from the first request on; then, once, nothing moves at all …
    stall_s: float = 0.0  # … for so long, and all that was due comes so much later
    fail_every: int = 0  # each so-manieth request gets a 500 …
    fail_status: int = 500  # … or this
    drop_every: int = 0  # each so-manieth stream breaks off …
    drop_after_chunks: int = 2  # … after so many chunks; 0: before it has begun …
    drop_by: DropBy = "reset"  # … in this way
    drop_whole: bool = False  # and so does each so-manieth whole answer
    max_in_flight: int = 0  # others get a 429 …
    retry_after_s: float = 1.0  # … with this advice
    slots: int = 0  # served at the same time; others wait, first come, first served
    leaks_slots: bool = False  # a planted fault: the slot of a request that its client cancelled stays taken
    model: str = "scripted"
    max_model_len: int = 1 << 20
    max_body_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise UsageError(f"The script's {field.name} is {value}.", hint="It is 0 or more.", param=field.name)
        if not self.tokens_per_chunk:
            raise UsageError("A chunk of 0 tokens.", hint="tokens_per_chunk is 1 or more.", param="tokens_per_chunk")

    @property
    def is_instant(self) -> bool:
        return self.ttft_s == self.tpot_s == 0

    def due_s(self, chunk: int) -> float:
        """From the request's arrival."""
        return self.ttft_s + chunk * self.tokens_per_chunk * self.tpot_s

    def chunks(self, tokens: int) -> int:
        return math.ceil(tokens / self.tokens_per_chunk)

    def capacity(self, output_tokens: int) -> float:
        """Requests a second that the slots can serve."""
        held_s = self.due_s(self.chunks(output_tokens) - 1)
        return self.slots / held_s if self.slots and held_s else math.inf

    @classmethod
    def from_json(cls, text: str) -> Behavior:
        """Raises UsageError for an invalid behavior."""
        try:
            values = msgspec.json.decode(text, type=dict[str, object])
            unknown = set(values) - {field.name for field in fields(cls)}
            if unknown:
                raise UsageError(f"A script has no {', '.join(sorted(unknown))}.", param="script")
            return msgspec.convert(values, cls)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as problem:
            raise UsageError(f"This is not a valid behavior: {problem}.", param="script") from None


class ServerRecord(msgspec.Struct, kw_only=True):
    """What the server did with one request. Times on the monotonic clock. status 0: none was sent."""

    number: int  # from 0, in the order of arrival
    digest: str  # of the body, see `body_digest`
    arrived_s: float
    begun_s: float | None = None  # had a slot
    status: int = 0
    written_s: list[float] = []  # when each chunk with tokens was handed to the socket
    tokens: int = 0  # in them
    ended_s: float | None = None
    is_cancelled: bool = False  # by its client


class MockRequest(msgspec.Struct):
    """The part of OpenAI's two bodies that a script needs."""

    model: str = ""
    prompt: str | list[int] | None = None
    messages: list[MessageFields] | None = None
    return_token_ids: bool = False
    resume_token_ids: list[int] = []
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptionFields | None = None
    n: int | None = None

    @property
    def output_tokens(self) -> int:
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return (16 if asked is None else asked) + len(self.emitted_in_prompt)

    @property
    def emitted_in_prompt(self) -> list[int]:
        """Ids of output at the end of a prompt, which is to go on."""
        return [id for id in self.prompt if id < FIRST_PROMPT_ID] if isinstance(self.prompt, list) else []

    @property
    def first_index(self) -> int:
        """The first token that is to come."""
        return len(self.resume_token_ids or self.emitted_in_prompt)

    @property
    def prompt_tokens(self) -> int:
        """A word is a token."""
        if isinstance(self.prompt, list):
            return len(self.prompt)
        texts = [self.prompt] if self.prompt else [text for message in self.messages or () for text in message.texts]
        return sum(len(text.split()) for text in texts)


_BODY = msgspec.json.Decoder(MockRequest)


def read_body(data: bytes, endpoint: Endpoint, script: Behavior) -> MockRequest:
    """Raises InvalidRequest."""
    try:
        body = _BODY.decode(data)
    except INVALID_JSON as problem:
        raise InvalidRequest(f"The body is wrong: {problem}") from None
    if (body.messages if endpoint == "chat" else body.prompt) is None:
        raise InvalidRequest("The body has no prompt.", param="messages" if endpoint == "chat" else "prompt")
    if not 1 <= body.output_tokens <= MAX_OUTPUT_TOKENS:
        raise InvalidRequest(f"{body.output_tokens} output tokens.", hint=f"1 to {MAX_OUTPUT_TOKENS} may be asked for.")
    if (body.n or 1) > 1 and not body.stream:  # of a stream, one choice is what tests of gateways need
        raise InvalidRequest("This server gives one answer.", hint="Leave 'n' out.", param="n")
    known = body.resume_token_ids or body.emitted_in_prompt
    if known != list(range(len(known))):
        raise InvalidRequest("These tokens are not those that were emitted.", param="resume_token_ids")
    if len(known) >= body.output_tokens:
        raise InvalidRequest("The output is already complete.", code="output_complete", param="resume_token_ids")
    if body.model not in ("", script.model):
        raise InvalidRequest(f"There is no model '{body.model}'.", hint=f"There is: {script.model}.", param="model")
    return body


class ReplyWriter:
    """The bytes of one answer. usage: as in Behavior."""

    def __init__(self, number: int, body: MockRequest, endpoint: Endpoint, usage: str) -> None:
        self._total, self._prompt, self._is_chat = body.output_tokens, body.prompt_tokens, endpoint == "chat"
        self._returns_ids, self._first_index = body.return_token_ids, body.first_index
        self._is_resumed, self._uncounted = bool(body.resume_token_ids), len(body.emitted_in_prompt)
        options = body.stream_options or StreamOptionFields()
        self._usage_ever = bool(options.include_usage) and usage != "none"
        self._usage_always = self._usage_ever and bool(options.continuous_usage_stats) and usage == "continuous"
        name = "chat.completion.chunk" if self._is_chat else "text_completion"
        self._head = (
            f'data: {{"id":"scripted-{number}","object":"{name}","created":0,"model":"{body.model}","choices":['
        )

    def opening(self) -> bytes:
        """Before the first token."""
        if not self._is_chat or self._is_resumed:
            return b""
        opening = '{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}'
        return self._event(opening, 0, self._prompt_ids())

    def chunk(self, first: int, after: int) -> bytes:
        """Tokens from `first` to before `after`."""
        text = words(first, after)
        ending = '"length"' if after == self._total else "null"
        ids = f',"token_ids":[{",".join(map(str, range(first, after)))}]' if self._returns_ids else ""
        if self._is_chat:
            return self._event(f'{{"index":0,"delta":{{"content":"{text}"}},"finish_reason":{ending}{ids}}}', after)
        ids += self._prompt_ids() if first == self._first_index else ""
        return self._event(f'{{"index":0,"text":"{text}","logprobs":null,"finish_reason":{ending}{ids}}}', after)

    def closing(self, *, is_done: bool = True) -> bytes:
        """After the last token, with the end of the message."""
        usage = f"{self._head}],{self._usage(self._total)}}}\n\n" if self._usage_ever else ""
        return (chunk_frame(usage.encode() + DONE) if is_done else b"") + LAST_CHUNK

    def _prompt_ids(self) -> str:
        ids = range(FIRST_PROMPT_ID, FIRST_PROMPT_ID + self._prompt - self._uncounted)
        return f',"prompt_token_ids":[{",".join(map(str, ids))}]' if self._returns_ids else ""

    def whole(self) -> bytes:
        """All of it, not streamed."""
        text = words(0, self._total)
        content: Mapping[str, object] = (
            {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        )
        usage = {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._total,
            "total_tokens": self._prompt + self._total,
        }
        return msgspec.json.encode({"choices": [{"index": 0, **content, "finish_reason": "length"}], "usage": usage})

    def _event(self, choice: str, tokens: int, more: str = "") -> bytes:
        usage = f"],{self._usage(tokens)}" if self._usage_always else "]"
        return chunk_frame(f"{self._head}{choice}{usage}{more}}}\n\n".encode())

    def _usage(self, after: int) -> str:
        tokens = after - self._uncounted
        return (
            f'"usage":{{"prompt_tokens":{self._prompt},"completion_tokens":{tokens},'
            f'"total_tokens":{self._prompt + tokens}}}'
        )


LAST_CHUNK = b"0\r\n\r\n"  # of a message in chunked coding
GARBAGE = b'data: {"choices": [[[ nothing of the kind\n\n'
TROUBLE = b'data: {"error":{"message":"Scripted to break off.","type":"server_error","code":"engine_dead"}}\n\n'


def words(first: int, after: int) -> str:
    """The text of the tokens from `first` to before `after` of any answer."""
    if after == first + 1:
        return _TOKENS[first % len(_TOKENS)]
    return "".join([_TOKENS[token % len(_TOKENS)] for token in range(first, after)])


def text_from_ids(ids: list[int]) -> str:
    """Of tokens of answers and prompts."""
    return "".join(words(id, id + 1) if id < FIRST_PROMPT_ID else " said" for id in ids)


def chunk_frame(data: bytes) -> bytes:
    """As one chunk of HTTP's chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)
