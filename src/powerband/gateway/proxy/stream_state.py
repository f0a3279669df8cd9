"""The state of one stream as its client sees it, even if several replicas sent parts of it.

A replica's event is rewritten for the client: without the fields that only the gateway requested, and with the served
model name. When another replica resumes the stream, `id` and `created` stay those that the client saw first.
"""

from __future__ import annotations

from array import array
from typing import Any, cast

import msgspec
from msgspec import Raw

from powerband.engines.base import EngineAdapter
from powerband.gateway.proxy.client_request import MAX_TOKENS, ClientRequest
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.buffered_response import BufferedResponse
from powerband.gateway.upstream.errors import InvalidUpstreamRequest, with_served_name
from powerband.gateway.upstream.failure import UpstreamFailure
from powerband.gateway.upstream.token_estimates import ASCII_PER_TOKEN, TextTokenCount, TokenEstimates, call_text
from powerband.openai.chunks import (
    FIELDS,
    NO_ERROR,
    NO_IDS,
    Chunk,
    ChunkChoice,
    ChunkDelta,
    ChunkUsage,
    InvalidChunk,
    count_ids,
    has_ids,
    read_chunk,
)
from powerband.openai.errors import MAX_ERROR_BYTES, read_error
from powerband.openai.events import DONE, event

# Fields that stay the same through a stream, besides the model.
_STABLE_FIELDS = ("id", "created", "system_fingerprint")
_MAX_STABLE_BYTES = 512  # larger ones would be repeated with every event after a failover
_ENCODE = msgspec.json.Encoder().encode
_CHOICES = msgspec.json.Decoder(list[dict[str, Raw]])
# Finish reasons of responses that an engine aborted: vLLM and SGLang; errors of vLLM and Dynamo; TensorRT-LLM.
_GIVEN_UP = frozenset(("abort", "aborted", "error", "cancelled", "canceled", "timeout"))
_SLACK_TOKENS = 64  # engines differ in whether they count the end of a turn


class StreamState:
    """`process_event` takes a replica's events; the attributes describe the output so far."""

    def __init__(
        self,
        client_request: ClientRequest,
        model: str,
        estimates: TokenEstimates | None = None,
        *,
        keeps_text: bool = False,
    ) -> None:
        """estimates: of the model's responses, for tokens that the replica does not count."""
        self._client_request = client_request
        self._num_choices = client_request.num_choices
        self.text = TextTokenCount(estimates or TokenEstimates())
        self._always_keeps_text = keeps_text
        self._model = self._inner_model = model
        fields = client_request.fields
        self._wants_ids = bool(fields.return_token_ids)
        self.wants_empty_chunks = self._wants_ids or bool(fields.logprobs)  # the client wants events without text, too
        self._wants_usage = client_request.wants_usage
        self._strips_usage = False  # remove usage from chunks with choices: only the gateway requested it
        self._usage_of: dict[int, int] | None = None  # output tokens by choice, if chunks report them
        self._tokens_since_usage = 0  # output tokens received after the last usage
        self._has_sent_usage = False
        self._prompt_sizes: dict[int, int] = {}  # tokens by prompt index, if replicas send the ids
        self._served_model = Raw(_ENCODE(model))
        self._stable_fields: dict[str, Raw] = {}
        self._before = 0  # output tokens of earlier replicas, if the current one does not count them
        self._converts_to_chat = False  # the current replica sends completions, but the client requested chat
        self.keeps_text = False
        self._skipped = ""
        self._text_offset = 0  # added to the current replica's `text_offset`, which starts at 0
        self.adapter: EngineAdapter | None = None  # of the current replica
        self._roles_sent: set[int] = set()  # choices whose role was sent
        self.is_resumed = False
        self.token_ids = array("q")  # of all output, if replicas send them; an array, because there may be many
        # Leading ids whose text was sent, except what a stop string held back. A token may need the next for its text.
        self.num_emitted = 0
        self.prompt_ids = NO_IDS
        self.has_missing_ids = False  # some output arrived without ids
        self.is_parsed = False  # some output was reasoning or a tool call, parsed from the text
        self.texts: list[str] = []  # with keeps_text, to find where another engine resumes
        self.finish_reason = ""
        self._open: set[int] = set()  # choices that have begun and not ended
        self._finished: set[int] = set()
        self.usage: ChunkUsage | None = None
        self.times_s = array("d")
        self.counts = array("q")
        self.num_tokens = 0
        self._max_tokens = 0  # upper bound, see `begin`
        self._min_tokens = 0  # lower bound: ids, and one for each text without ids

    @property
    def is_finished(self) -> bool:
        """Every requested choice has a finish reason."""
        return len(self._finished) >= self._num_choices

    @property
    def may_end(self) -> bool:
        """Every choice that has started has a finish reason, and none is missing."""
        return not self._open and self._is_complete(self._finished)

    def _is_complete(self, indexes: set[int]) -> bool:
        """Whether these are all choices. A server that may not support `n` must send at least one per prompt."""
        if self.adapter is not None and self.adapter.supports_n:
            return len(indexes) >= self._num_choices
        return (
            len({index // (self._client_request.fields.n or 1) for index in indexes})
            >= self._client_request.num_prompts
        )

    @property
    def has_too_many(self) -> bool:
        """Whether there are more tokens than requested."""
        return self._min_tokens > self._max_tokens

    def begin(self, replica: ReplicaAddress) -> None:
        """The next events come from this replica."""
        adapter = replica.adapter
        self.adapter, self._inner_model = adapter, replica.model
        limit = self._client_request.limit
        self._max_tokens = (MAX_TOKENS if limit is None else limit) * self._num_choices + _SLACK_TOKENS
        returns_usage = self._client_request.returns_usage(replica)
        self._strips_usage = returns_usage and not self._client_request.wants_continuous_usage
        self._usage_of = {} if returns_usage else None
        resumes_by_text = adapter.complete_stream is not None and self._client_request.can_resume
        self.keeps_text = self._always_keeps_text or resumes_by_text

    def process_whole(self, chunk: Chunk, replica: ReplicaAddress, *, size: int = 0) -> None:
        """Process a response that was not streamed. Raises UpstreamFailure.

        size: bytes of a response that is too large to decode; `chunk` then lacks the texts, and tokens are estimated.
        """
        self.begin(replica)
        if len(chunk.choices or ()) > self._num_choices:
            raise self._too_many_choices(chunk)
        self.num_tokens = sum(self._count(choice) for choice in chunk.choices or ())
        if not self._is_complete(has := self._finished | self._open):
            message = f"The replica's response has {len(has)} of {self._num_choices} choices."
            raise UpstreamFailure("truncated", message)
        if size:
            self.texts = [f"[a response of {size} bytes]"]
            self.num_tokens = min(size // ASCII_PER_TOKEN, self._max_output)
        self._take_usage(chunk, self.num_tokens)
        _, _, self.num_tokens = self.final_usage()

    def resume(
        self, *, kept: int, skipped: str = "", converts_to_chat: bool = False, counts_as_prompt: bool = False
    ) -> None:
        """Another replica resumes after the first `kept` tokens. Later tokens are generated and sent again.

        skipped: text that the replica repeats first, and that the client already has. is_other_kind: the replica sends
        completions, but the client requested chat. counts_as_prompt: the replica counts the kept tokens as prompt.
        """
        self.is_resumed = True
        self._converts_to_chat = converts_to_chat
        self._skipped = skipped
        self._before = kept if counts_as_prompt else 0
        self._text_offset = sum(map(len, self.texts)) - len(skipped) if counts_as_prompt else 0
        self.num_tokens -= len(self.token_ids) - kept
        self._min_tokens = min(self._min_tokens, kept)
        self.usage, self._tokens_since_usage = None, self.num_tokens  # the next replica counts for itself
        del self.token_ids[kept:]
        self.num_emitted = min(self.num_emitted, kept)

    def process_event(self, data: bytes, now_s: float) -> bytes:
        """The events for the client, from one event's data. Raises UpstreamFailure and InvalidUpstreamRequest."""
        try:
            chunk = read_chunk(data)
        except InvalidChunk as problem:
            raise UpstreamFailure.invalid(problem) from None
        if chunk.error is not NO_ERROR and chunk.has_error:
            raise self.as_failure(chunk.error)
        if not chunk.choices:
            if _is_error(data):
                raise self.as_failure(Raw(data))
            self._take_usage(chunk, 0)
            return self._rewritten(data, chunk) if chunk.usage is not None and self._wants_usage else b""
        if len(chunk.choices) > self._num_choices:
            raise self._too_many_choices(chunk)
        tokens, is_empty = 0, True
        for choice in chunk.choices:
            tokens += self._count(choice)
            is_empty = is_empty and self._is_empty(choice)
        self._take_usage(chunk, tokens)
        if chunk.prompt_token_ids is not NO_IDS and has_ids(chunk.prompt_token_ids) and not self._before:
            self.prompt_ids = chunk.prompt_token_ids
        if tokens:
            self.times_s.append(now_s)
            self.counts.append(tokens)
            self.num_tokens += tokens
        return b"" if is_empty else self._rewritten(data, chunk)

    def _too_many_choices(self, chunk: Chunk) -> UpstreamFailure:
        message = f"The replica sent {len(chunk.choices or ())} choices at once"
        return UpstreamFailure("garbage", f"{message}; {self._num_choices} were requested.")

    def _count(self, choice: ChunkChoice) -> int:
        """The tokens that a choice adds. Raises UpstreamFailure for a choice that was not requested."""
        index, text, delta = choice.index or 0, choice.text, choice.delta or choice.message
        if not 0 <= index < self._num_choices:
            raise UpstreamFailure("garbage", f"The replica sent choice {index} of {self._num_choices}.")
        if choice.finish_reason and choice.finish_reason.lower() in _GIVEN_UP:
            raise UpstreamFailure("truncated", f"The replica gave up: finish_reason {choice.finish_reason!r}.")
        if index in self._finished and (text or choice.token_ids or (delta is not None and delta.content)):
            raise UpstreamFailure("garbage", f"The replica sent more of choice {index} after its end.")
        if self._skipped:
            text = choice.text = self._after_skipped(text or "", is_last=bool(choice.finish_reason))
        if delta is not None:
            if delta.is_parsed:
                text, self.is_parsed = _parsed_text(delta), True
            else:
                text = cast(str | None, delta.content)
        if choice.finish_reason:
            self._finished.add(index)
            self._open.discard(index)
            self.finish_reason = choice.finish_reason
        elif index not in self._finished:
            self._open.add(index)
        if choice.prompt_token_ids is not NO_IDS and has_ids(choice.prompt_token_ids) and not self._before:
            self.prompt_ids = choice.prompt_token_ids
            self._prompt_sizes[index // (self._client_request.fields.n or 1)] = count_ids(choice.prompt_token_ids)
        if text and self.keeps_text:
            self.texts.append(text)
        if choice.token_ids:
            self.token_ids.extend(choice.token_ids)
            if text:
                self.num_emitted = len(self.token_ids)
            self._min_tokens += len(choice.token_ids)
            return len(choice.token_ids)
        if text:
            self.has_missing_ids = True
            self._min_tokens += 1
            return self.text.add(text)
        return 0

    def _take_usage(self, chunk: Chunk, tokens: int) -> None:
        """Take a chunk's usage; one with 0 output tokens is ignored. tokens: added by the chunk, as counted here."""
        usage = chunk.usage
        if usage is None or not usage.completion_tokens:
            self._tokens_since_usage += tokens
            if usage is not None and usage.prompt_tokens and self.usage is None:
                self.usage = usage
            return
        if chunk.choices and self._usage_of is not None:
            for choice in chunk.choices:
                self._usage_of[choice.index or 0] = usage.completion_tokens
            usage = msgspec.structs.replace(usage, completion_tokens=sum(self._usage_of.values()))
        self.usage, self._tokens_since_usage = usage, 0

    def _after_skipped(self, text: str, *, is_last: bool) -> str:
        """The text without the part that the client already has. Raises UpstreamFailure if it begins differently."""
        skipped = self._skipped
        size = min(len(text), len(skipped))
        if text[:size] != skipped[:size] or (is_last and size < len(skipped)):
            raise UpstreamFailure("resume", "The replica resumed with text that differs from what the client has.")
        self._skipped = skipped[size:]
        return text[size:]

    def _is_empty(self, choice: ChunkChoice) -> bool:
        """Whether a choice has nothing for the client: only ids that the gateway requested, or a role sent before."""
        delta = choice.delta
        if choice.text or choice.finish_reason:
            return False
        if delta is None:
            return choice.token_ids is not None and not self.wants_empty_chunks
        if delta.content or delta.is_parsed:
            return False
        if delta.role is not None:
            index = choice.index or 0
            is_repeated = self.is_resumed and index in self._roles_sent
            self._roles_sent.add(index)
            return is_repeated
        return choice.token_ids is not None and not self.wants_empty_chunks

    def _rewritten(self, data: bytes, chunk: Chunk) -> bytes:
        """The event for the client: the original bytes, if nothing has to change."""
        if not self._stable_fields:
            first = FIELDS.decode(data)
            self._stable_fields = {
                name: first[name] for name in _STABLE_FIELDS if name in first and len(first[name]) <= _MAX_STABLE_BYTES
            }
        returns_usage = self._wants_usage and not (chunk.choices and self._strips_usage)
        if returns_usage and chunk.usage is not None and not chunk.choices:
            self._has_sent_usage = True
        if not (self.is_resumed or chunk.model != self._model or self._has_too_much(chunk, returns_usage)):
            return event(data)
        fields: dict[str, Any] = FIELDS.decode(data)
        fields["model"] = self._served_model
        if chunk.choices:
            choices = fields["choices"] = _CHOICES.decode(fields["choices"])
            for read, choice in zip(chunk.choices, choices, strict=True):
                if self.is_resumed and "text" in choice:
                    choice["text"] = Raw(_ENCODE(read.text))  # without the part that the client has
                self._rewrite_choice(choice)
        if not self._wants_ids or self.is_resumed:
            fields.pop("prompt_token_ids", None)
        if not returns_usage:
            fields.pop("usage", None)
        if self.is_resumed:
            fields |= self._stable_fields
            if self._converts_to_chat:
                fields["object"] = "chat.completion.chunk"
            if chunk.usage is not None and self._before and returns_usage:
                fields["usage"] = self._with_earlier_usage(fields["usage"], chunk.usage)
        return event(_ENCODE(fields))

    def _has_too_much(self, chunk: Chunk, returns_usage: bool) -> bool:
        """Whether a chunk has fields that only the gateway requested, or an empty finish_reason instead of null."""
        if chunk.usage is not None and not returns_usage:
            return True
        if chunk.prompt_token_ids is not NO_IDS and has_ids(chunk.prompt_token_ids) and not self._wants_ids:
            return True
        for choice in chunk.choices or ():
            if choice.finish_reason == "":
                return True
            if not self._wants_ids and (choice.token_ids is not None or has_ids(choice.prompt_token_ids)):
                return True
        return False

    def _rewrite_choice(self, choice: dict[str, Any]) -> None:
        """Rewrite a choice for the client."""
        if not self._wants_ids or self.is_resumed:
            choice.pop("prompt_token_ids", None)
        if "finish_reason" in choice and bytes(choice["finish_reason"]) == b'""':
            choice["finish_reason"] = None
        if self._text_offset and "logprobs" in choice:
            choice["logprobs"] = _shifted(choice["logprobs"], self._text_offset)
        if self._converts_to_chat:
            text = choice.pop("text", None)
            choice["delta"] = {"content": text} if text or "token_ids" in choice else {}
        if not self._wants_ids:
            choice.pop("token_ids", None)

    def _with_earlier_usage(self, data: Raw, usage: ChunkUsage) -> dict[str, Any]:
        """The usage with earlier output, which was in this replica's prompt, counted as output."""
        counted = {
            "prompt_tokens": max(0, (usage.prompt_tokens or 0) - self._before),
            "completion_tokens": (usage.completion_tokens or 0) + self._before,
        }
        return {**FIELDS.decode(data), **counted}

    def as_failure(self, error: Raw) -> Exception:
        """The exception for an error in a response: UpstreamFailure (another replica may succeed), or
        InvalidUpstreamRequest.
        """
        complaint = with_served_name(read_error(bytes(error)), self._inner_model, self._model)
        if complaint.is_about_request:
            return InvalidUpstreamRequest(complaint)
        return UpstreamFailure(complaint.code or "error", f"The replica reported an error: {complaint.message}")

    def whole(self, response: BufferedResponse, chunk: Chunk) -> list[bytes]:
        """A response that was not streamed, with the served model name."""
        return response.pieces() if chunk.model == self._model else response.renamed(self._model)

    def final_usage(self) -> tuple[int, int, int]:
        """Prompt, cached and output tokens: as replicas reported them, else as counted here (see `is_estimate`).

        Never more than the request's upper bound, because the client is charged for them.
        """
        usage = self.usage
        cached = 0 if usage is None else usage.cached_tokens
        prompt = min(self._prompt_size() or self._client_request.prompt_tokens, self._client_request.max_prompt_usage)
        return prompt, min(cached, prompt), min(self._counted_output, self._max_output)

    @property
    def _counted_output(self) -> int:
        return max(self._output_size(), len(self.token_ids))

    @property
    def _max_output(self) -> int:
        limit = self._client_request.limit
        return (MAX_TOKENS if limit is None else limit) * self._client_request.num_sequences

    @property
    def is_estimate(self) -> bool:
        """Whether `final_usage` has counts that no replica reported."""
        is_counted = self._tokens_since_usage == 0 or not self.has_missing_ids
        is_possible = (
            self._prompt_size() <= self._client_request.max_prompt_usage and self._counted_output <= self._max_output
        )
        return not self._prompt_size() or not is_counted or not is_possible

    @property
    def counted_prompt(self) -> int:
        """Prompt tokens, as a replica reported them; 0: none has yet."""
        return self._prompt_size()

    def _output_size(self) -> int:
        usage = self.usage
        if usage is None or not usage.completion_tokens:
            return self.num_tokens
        return usage.completion_tokens + self._before + self._tokens_since_usage

    def _prompt_size(self) -> int:
        """Tokens of all prompts; 0: unknown. The usage of one choice counts one prompt."""
        prompts, usage = self._client_request.num_prompts, self.usage
        if len(self._prompt_sizes) == prompts:
            return sum(self._prompt_sizes.values())
        if usage is not None and usage.prompt_tokens and not (self._usage_of and prompts > 1):
            return max(0, usage.prompt_tokens - self._before)
        return count_ids(self.prompt_ids) if prompts == 1 else 0

    def finish(self) -> bytes:
        """The event with the finish reason, if nothing else was lost."""
        return self.cut("length" if self._has_all else "stop")

    def cut(self, reason: str) -> bytes:
        """The event with this finish reason for all unfinished choices."""
        self.finish_reason = reason
        empty: dict[str, Any] = {"delta": {}} if self._client_request.endpoint == "chat" else {"text": ""}
        left = [index for index in range(self._num_choices) if index not in self._finished]
        self._finished.update(left)
        return self._build_chunk(
            [{"index": index, **empty, "logprobs": None, "finish_reason": reason} for index in left]
        )

    @property
    def _has_all(self) -> bool:
        return len(self._client_request.resumed_ids) + len(self.token_ids) == self._client_request.limit

    def final_events(self) -> bytes:
        """The last events: the usage, if the client wants it and the replica did not send it, and [DONE]."""
        if not self._wants_usage or self._has_sent_usage:
            return DONE
        prompt, cached, output = self.final_usage()
        usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        return self._build_chunk([], usage={**usage, "prompt_tokens_details": {"cached_tokens": cached}}) + DONE

    def _build_chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self._client_request.endpoint == "chat" else "text_completion"
        return event(_ENCODE({**self._stable_fields, "model": self._model, "object": kind, "choices": choices, **more}))


def _is_error(data: bytes) -> bool:
    """Whether an event without choices is an error in a format that has no field 'error'."""
    if len(data) > MAX_ERROR_BYTES:
        return False
    fields = FIELDS.decode(data)
    kind = fields.get("object")
    # The format of older vLLM and of TensorRT-LLM, with or without a message; and that of JSON:API.
    if (kind is not None and bytes(kind) == b'"error"') or "errors" in fields:
        return True
    return "usage" not in fields and bool(read_error(data).message)


def _shifted(logprobs: Raw, offset: int) -> Any:
    """A completion's log-probabilities with `offset` added to their `text_offset`."""
    found = msgspec.json.decode(logprobs)
    if isinstance(found, dict) and isinstance(places := found.get("text_offset"), list):
        found["text_offset"] = [place + offset if isinstance(place, int) else place for place in places]
    return found


def _parsed_text(delta: ChunkDelta) -> str:
    """The text of a delta, including reasoning and tool calls; not empty."""
    texts = [delta.content, delta.reasoning_content, delta.reasoning]
    calls = call_text(delta.tool_calls) if delta.has_calls else ""
    return "".join(one for one in texts if isinstance(one, str)) + calls or "..."
