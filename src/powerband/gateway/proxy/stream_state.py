"""The state of one stream as its client sees it, even if several replicas sent parts of it.

StreamState     which choices have begun and ended, and where another replica can resume
TokenCounter    how many tokens there are (see `token_counter`)
EventRewriter   what the client gets of a replica's event (see `event_rewriter`)
"""

from __future__ import annotations

from typing import Any, cast

from msgspec import Raw

from powerband.engines.base import EngineAdapter
from powerband.gateway.proxy.client_request import ClientRequest
from powerband.gateway.proxy.event_rewriter import EventRewriter
from powerband.gateway.proxy.token_counter import TokenCounter
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.buffered_response import BufferedResponse
from powerband.gateway.upstream.failure import UpstreamFailure
from powerband.gateway.upstream.reported import reported_failure
from powerband.gateway.upstream.token_estimates import ASCII_PER_TOKEN, TokenEstimates, call_text
from powerband.openai.chunks import (
    FIELDS,
    NO_ERROR,
    NO_IDS,
    Chunk,
    ChunkChoice,
    ChunkDelta,
    InvalidChunk,
    has_unknown_content,
    read_chunk,
)
from powerband.openai.errors import MAX_ERROR_BYTES, read_error
from powerband.openai.events import DONE

# Finish reasons of responses that an engine aborted: vLLM and SGLang; errors of vLLM and Dynamo; TensorRT-LLM.
_GIVEN_UP = frozenset(("abort", "aborted", "error", "cancelled", "canceled", "timeout"))


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
        self._model = self._inner_model = model
        self.tokens = TokenCounter(client_request, estimates)
        self._rewriter = EventRewriter(client_request, model)
        fields = client_request.fields
        # The client wants events without text, too.
        self.wants_empty_chunks = bool(fields.return_token_ids) or bool(fields.logprobs)
        self.adapter: EngineAdapter | None = None  # of the current replica
        self._roles_sent: set[int] = set()  # choices whose role was sent
        self.finish_reason = ""
        self._open: set[int] = set()  # choices that have begun and not ended
        self._finished: set[int] = set()
        self.texts: list[str] = []  # with keeps_text, to find where another engine resumes
        self.keeps_text = False
        self._always_keeps_text = keeps_text
        self.is_parsed = False  # some output was reasoning, a tool call or an unknown field, parsed from the text
        self._has_calls = False
        self._skipped = ""  # text that the current replica repeats, and that the client already has

    @property
    def is_finished(self) -> bool:
        """Every requested choice has a finish reason."""
        return len(self._finished) >= self._num_choices

    @property
    def is_over(self) -> bool:
        return False  # the usage and the last event may follow

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

    def begin(self, replica: ReplicaAddress) -> None:
        """The next events come from this replica."""
        adapter = replica.adapter
        self.adapter, self._inner_model = adapter, replica.model
        self.tokens.begin(reports_each_choice=self._client_request.returns_usage(replica))
        self._rewriter.begin(replica)
        resumes_by_text = adapter.complete_stream is not None and self._client_request.can_resume
        self.keeps_text = self._always_keeps_text or resumes_by_text

    def read_whole(self, response: BufferedResponse, replica: ReplicaAddress) -> list[bytes]:
        """Count the tokens of a response that was not streamed, and return it with the served model name.

        Raises UpstreamFailure and InvalidUpstreamRequest.
        """
        chunk = response.read()
        self.begin(replica)
        if chunk.has_error:
            raise self.as_failure(chunk.error)
        if not chunk.choices:
            raise UpstreamFailure("garbage", "The replica sent a response without choices.")
        self.process_whole(chunk, replica, size=response.size if response.is_large else 0)
        self.finish_reason = chunk.choices[0].finish_reason or ""
        return response.pieces() if chunk.model == self._model else response.renamed(self._model)

    def process_whole(self, chunk: Chunk, replica: ReplicaAddress, *, size: int = 0) -> None:
        """Process a response that was not streamed. Raises UpstreamFailure.

        size: bytes of a response that is too large to decode; `chunk` then lacks the texts, and tokens are estimated.
        """
        self.begin(replica)
        if len(chunk.choices or ()) > self._num_choices:
            raise self._too_many_choices(chunk)
        tokens = self.tokens
        tokens.num_output = sum(self._count(choice) for choice in chunk.choices or ())
        if not self._is_complete(has := self._finished | self._open):
            message = f"The replica's response has {len(has)} of {self._num_choices} choices."
            raise UpstreamFailure("truncated", message)
        if size:
            self.texts = [f"[a response of {size} bytes]"]
            tokens.num_output = min(size // ASCII_PER_TOKEN, tokens.max_output)
        tokens.add_usage(chunk, tokens.num_output)
        _, _, tokens.num_output = tokens.final_usage()

    def resume(
        self, *, kept: int, skipped: str = "", converts_to_chat: bool = False, counts_as_prompt: bool = False
    ) -> None:
        """Another replica resumes after the first `kept` tokens. Later tokens are generated and sent again.

        skipped: text that the replica repeats first, and that the client already has. converts_to_chat: the replica
        sends completions, but the client requested chat. counts_as_prompt: it counts the kept tokens as prompt.
        """
        self._skipped = skipped
        self.tokens.resume(kept, counts_as_prompt=counts_as_prompt)
        self._rewriter.resume(
            converts_to_chat=converts_to_chat,
            text_offset=sum(map(len, self.texts)) - len(skipped) if counts_as_prompt else 0,
            num_in_prompt=self.tokens.num_in_prompt,
        )

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
            self.tokens.add_usage(chunk, 0)
            is_wanted = chunk.usage is not None and self._client_request.wants_usage
            return self._rewriter.rewrite(data, chunk) if is_wanted or has_unknown_content(data) else b""
        if len(chunk.choices) > self._num_choices:
            raise self._too_many_choices(chunk)
        tokens, is_empty = 0, True
        for choice in chunk.choices:
            tokens += self._count(choice)
            is_empty = is_empty and self._is_empty(choice)
        self.tokens.add_usage(chunk, tokens)
        if chunk.prompt_token_ids is not NO_IDS:
            self.tokens.add_prompt_ids(chunk.prompt_token_ids)
        if tokens:
            self.tokens.add(tokens, now_s)
        if is_empty:
            if not has_unknown_content(data):
                return b""
            self.is_parsed = True
        return self._rewriter.rewrite(data, chunk)

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
                self._has_calls = self._has_calls or delta.has_calls
            else:
                text = cast(str | None, delta.content)
        if choice.finish_reason:
            self._finished.add(index)
            self._open.discard(index)
            self.finish_reason = choice.finish_reason
        elif index not in self._finished:
            self._open.add(index)
        if choice.prompt_token_ids is not NO_IDS:
            self.tokens.add_prompt_ids(choice.prompt_token_ids, index // (self._client_request.fields.n or 1))
        if text and self.keeps_text:
            self.texts.append(text)
        return self.tokens.count(choice.token_ids, text)

    def _after_skipped(self, text: str, *, is_last: bool) -> str:
        """The text without the part that the client already has. Raises UpstreamFailure if it begins differently."""
        skipped = self._skipped
        size = min(len(text), len(skipped))
        if text[:size] != skipped[:size] or (is_last and size < len(skipped)):
            raise UpstreamFailure("resume", "The replica resumed with text that differs from what the client has.")
        self._skipped = skipped[size:]
        return text[size:]

    def _is_empty(self, choice: ChunkChoice) -> bool:
        """Whether no field that is read has anything for the client: only ids that the gateway requested, or a role
        that was sent before.
        """
        delta = choice.delta
        if choice.text or choice.finish_reason:
            return False
        if delta is None:
            return choice.token_ids is not None and not self.wants_empty_chunks
        if delta.content or delta.is_parsed:
            return False
        if delta.role is not None:
            index = choice.index or 0
            is_repeated = self._rewriter.is_resumed and index in self._roles_sent
            self._roles_sent.add(index)
            return is_repeated
        return choice.token_ids is not None and not self.wants_empty_chunks

    def as_failure(self, error: Raw) -> Exception:
        """The exception for an error in a response: UpstreamFailure (another replica may succeed), or
        InvalidUpstreamRequest.
        """
        return reported_failure(bytes(error), self._inner_model, self._model)

    def finish(self) -> bytes:
        """The event with the finish reason, if nothing else was lost."""
        return self.cut("length" if self._has_all else "tool_calls" if self._has_calls else "stop")

    def cut(self, reason: str) -> bytes:
        """The event with this finish reason for all unfinished choices."""
        self.finish_reason = reason
        empty: dict[str, Any] = {"delta": {}} if self._client_request.endpoint == "chat" else {"text": ""}
        left = [index for index in range(self._num_choices) if index not in self._finished]
        self._finished.update(left)
        return self._rewriter.build(
            [{"index": index, **empty, "logprobs": None, "finish_reason": reason} for index in left]
        )

    @property
    def _has_all(self) -> bool:
        return len(self._client_request.resumed_ids) + len(self.tokens.token_ids) == self._client_request.limit

    def final_events(self) -> bytes:
        """The last events: the usage, if the client wants it and the replica did not send it, and [DONE]."""
        if not self._client_request.wants_usage or self._rewriter.has_sent_usage:
            return DONE
        prompt, cached, output = self.tokens.final_usage()
        usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
        if self.tokens.reasoning is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.tokens.reasoning}
        return self._rewriter.build([], usage=usage) + DONE


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


def _parsed_text(delta: ChunkDelta) -> str:
    """The text of a delta, including reasoning and tool calls; not empty."""
    texts = [delta.content, delta.reasoning_content, delta.reasoning]
    calls = call_text(delta.tool_calls) if delta.has_calls else ""
    return "".join(one for one in texts if isinstance(one, str)) + calls or "..."
