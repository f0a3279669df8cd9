"""The response to a request that is passed through, as its client sees it: its tokens, and the served model name."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from powerband.engines.base import CannotResume
from powerband.gateway.proxy.pass_through.endpoints import PassThroughEndpoint, StreamEvents
from powerband.gateway.proxy.pass_through.request import PassThroughRequest
from powerband.gateway.proxy.pass_through.stored import ResponseToStore
from powerband.gateway.proxy.pass_through.usage import ReportedUsage
from powerband.gateway.proxy.token_counter import TokenCounter
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.buffered_response import BufferedResponse
from powerband.gateway.upstream.failure import UpstreamFailure
from powerband.gateway.upstream.reported import reported_failure
from powerband.gateway.upstream.token_estimates import ASCII_PER_TOKEN, TokenEstimates
from powerband.openai.chunks import FIELDS, INVALID_JSON, NO_ERROR, Chunk
from powerband.openai.events import MAX_EVENT_BYTES

_MAX_HELD_EVENTS = 64  # before the first output
_TYPE = re.compile(r"[a-z0-9_.]{1,80}")
_MAX_REASON_CHARS = 64
_MAX_OTHER_BYTES = 64 << 10
_ENCODE = msgspec.json.Encoder().encode
_Kind = TypeVar("_Kind")


class PassedResponse(msgspec.Struct, gc=False):
    """The fields of a response that the gateway reads, whichever the endpoint."""

    model: str | None = None
    usage: ReportedUsage | None = None
    error: Raw = NO_ERROR
    status: str | None = None  # of OpenAI's Responses
    stop_reason: str | None = None  # of Anthropic's Messages
    # The results, of which each endpoint has one.
    output: Raw | UnsetType = UNSET
    content: Raw | UnsetType = UNSET
    data: Raw | UnsetType = UNSET
    scores: Raw | UnsetType = UNSET
    results: Raw | UnsetType = UNSET
    # The other fields that may be large, of OpenAI's Responses and of vLLM's.
    instructions: Raw | UnsetType = UNSET
    tools: Raw | UnsetType = UNSET
    text: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET
    input_messages: Raw | UnsetType = UNSET
    output_messages: Raw | UnsetType = UNSET

    @property
    def has_error(self) -> bool:
        return self.error is not NO_ERROR and bytes(self.error) not in (b"null", b"{}", b'""')

    @property
    def finish_reason(self) -> str:
        return (self.stop_reason or self.status or "")[:_MAX_REASON_CHARS]

    def check(self, size: int) -> None:
        """Raise UpstreamFailure if there may be so many fields that renaming would take long. size: in bytes."""
        large = [getattr(self, name) for name in _LARGE]
        other_bytes = size - sum(len(value) for value in large if value is not UNSET)
        if other_bytes > _MAX_OTHER_BYTES:
            raise UpstreamFailure("garbage", f"The replica's response has {other_bytes} bytes in unknown fields.")


_LARGE = tuple(field.name for field in msgspec.structs.fields(PassedResponse) if field.default is UNSET)


class _Delta(msgspec.Struct, gc=False):
    """Of Anthropic's Messages; of OpenAI's Responses, a delta is a text."""

    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    stop_reason: str | None = None


class _Event(msgspec.Struct, gc=False):
    type: str = ""
    delta: str | _Delta | None = None
    response: PassedResponse | None = None
    message: PassedResponse | str | None = None  # a text in an error
    usage: ReportedUsage | None = None

    @property
    def text(self) -> str:
        delta = self.delta
        if delta is None or isinstance(delta, str):
            return delta or ""
        return (delta.text or "") + (delta.thinking or "") + (delta.partial_json or "")

    @property
    def inner(self) -> PassedResponse | None:
        """The response as far as it is known."""
        return self.message if isinstance(self.message, PassedResponse) else self.response


class PassThroughState:
    """See ResponseState."""

    def __init__(
        self,
        client_request: PassThroughRequest,
        endpoint: PassThroughEndpoint,
        model: str,
        estimates: TokenEstimates,
        *,
        keeps_text: bool,
        kept: ResponseToStore | None = None,
    ) -> None:
        """model: the served name. kept: the response that is stored when it is complete."""
        self._kept = kept
        self._endpoint = endpoint
        self._events = endpoint.events or StreamEvents(opening=frozenset(), last=frozenset())
        self._model = self._inner_model = model
        self._keeps_text = keeps_text
        self.tokens = TokenCounter(client_request, estimates)
        self._usage: ReportedUsage | None = None  # of all events so far
        self.texts: list[str] = []
        self.finish_reason = ""
        self.is_finished = False
        self.sequence_number = 0  # of the next event
        self._held: list[bytes] | None = []  # events before the first output; None: it has begun
        self._held_bytes = 0

    @property
    def is_over(self) -> bool:
        return self.is_finished

    @property
    def may_end(self) -> bool:
        return self.is_finished

    def begin(self, replica: ReplicaAddress) -> None:
        self._inner_model = replica.model
        self.tokens.begin(reports_each_choice=False)

    # ---- responses that are not streamed

    def read_whole(self, response: BufferedResponse, replica: ReplicaAddress) -> list[bytes]:
        self.begin(replica)
        data = response.surface()
        if self._endpoint.may_be_list and data.lstrip()[:1] == b"[":
            _decode(data, Raw)
            return response.pieces()
        found = _decode(data, PassedResponse)
        if found.has_error or found.status == self._events.failed.rpartition(".")[2] != "":
            raise reported_failure(bytes(found.error), self._inner_model, self._model)
        results = [getattr(found, name) for name in self._endpoint.results]
        if all(result is UNSET for result in results):
            names = " or ".join(self._endpoint.results)
            raise UpstreamFailure("garbage", f"The replica sent a response without {names}.")
        self.finish_reason = found.finish_reason
        if self._endpoint.limit:
            self.tokens.num_output = min(response.size // ASCII_PER_TOKEN, self.tokens.max_output)
        self._count_usage(found.usage)
        _, _, self.tokens.num_output = self.tokens.final_usage()
        if self._keeps_text and self._endpoint.limit:
            self.texts = [bytes(result).decode() for result in results if result is not UNSET]
        is_stored = self._kept is not None and not response.is_large  # decoding a large one would take long
        if not is_stored and found.model in (None, self._model):
            return response.pieces()
        if not response.is_large:
            found.check(len(data))
        return [self._keep(data)] if is_stored else response.renamed(self._model)

    def _keep(self, response: bytes) -> bytes:
        """Store a complete response. Returns it as it is stored."""
        response = self._with_own_fields(response)
        if self._kept is not None:
            self._kept.keep(response)
        return response

    def _with_own_fields(self, response: bytes) -> bytes:
        stored = {} if self._kept is None else self._kept.fields
        return _ENCODE({**FIELDS.decode(response), "model": self._model, **stored})

    def _count_usage(self, usage: ReportedUsage | None, tokens: int = 0) -> None:
        reported = None
        if usage is not None:
            self._usage = usage.after(self._usage)
            reported = self._usage.as_chunk_usage()
        self.tokens.add_usage(Chunk(usage=reported), tokens)

    # ---- streams

    def process_event(self, data: bytes, now_s: float) -> bytes:
        if self.is_finished:
            return b""
        event = _decode(data, _Event)
        if event.type in ("error", self._events.failed) or not _TYPE.fullmatch(event.type):
            raise self._failure(event, data)
        self.sequence_number += 1
        text, inner = event.text, event.inner
        tokens = self.tokens.count(None, text)
        if text and self._keeps_text:
            self.texts.append(text)
        usage = event.usage or (inner.usage if inner is not None else None)
        self._count_usage(usage, tokens)
        if tokens:
            self.tokens.add(tokens, now_s)
        if inner is not None and inner.finish_reason:
            self.finish_reason = inner.finish_reason
        if isinstance(event.delta, _Delta) and event.delta.stop_reason:
            self.finish_reason = event.delta.stop_reason[:_MAX_REASON_CHARS]
        self.is_finished = event.type in self._events.last
        return self._hold(event.type, self._with_served_name(event, data))

    def _hold(self, type: str, data: bytes) -> bytes:
        """The event, after those that were held back; b'' while it is held back itself."""
        encoded = b"event: %b\ndata: %b\n\n" % (type.encode(), data)
        if self._held is None:
            return encoded
        self._held.append(encoded)
        self._held_bytes += len(encoded)
        is_full = len(self._held) > _MAX_HELD_EVENTS or self._held_bytes > MAX_EVENT_BYTES
        if type in self._events.opening and not is_full:
            return b""
        held, self._held = self._held, None
        return b"".join(held)

    def _with_served_name(self, event: _Event, data: bytes) -> bytes:
        inner = event.inner
        if inner is None or (self._kept is None and inner.model in (None, self._model)):
            return data
        name = "message" if inner is event.message else "response"
        inner.check(len(data))
        fields = FIELDS.decode(data)
        change = self._keep if event.type in self._events.last else self._with_own_fields
        fields[name] = Raw(change(bytes(fields[name])))
        return _ENCODE(fields)

    def _failure(self, event: _Event, data: bytes) -> Exception:
        if event.type == self._events.failed and event.response is not None:
            data = bytes(event.response.error)
        elif event.type != "error" and b'"error"' not in data:
            return UpstreamFailure("garbage", "The replica sent an event without a type.")
        return reported_failure(data, self._inner_model, self._model)

    def cut(self, reason: str) -> bytes:  # noqa: ARG002 (the interface)
        raise UpstreamFailure("garbage", "The replica generated more tokens than requested.")

    def finish(self) -> bytes:
        raise CannotResume

    def final_events(self) -> bytes:
        return b""


def _decode(data: bytes, kind: type[_Kind]) -> _Kind:
    """Raises UpstreamFailure if it is not that."""
    try:
        if not data.isascii():
            data.decode()  # checks UTF-8, also in fields that are only passed on
        return msgspec.json.decode(data, type=kind)
    except INVALID_JSON as problem:
        raise UpstreamFailure.invalid(problem) from None
