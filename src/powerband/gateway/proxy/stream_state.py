"""One stream as its client has it, whichever replicas sent its parts.

A replica's event becomes what the client is to read: the same fields less what only the gateway asked for, under the
name that is served. After another replica has taken over, the answer's id and age stay those that the client saw first.
"""

from __future__ import annotations

from array import array
from typing import Any, cast

import msgspec
from msgspec import Raw

from powerband.gateway.proxy.client_request import MAX_TOKENS, ClientRequest
from powerband.gateway.proxy.connection import UpstreamFailure
from powerband.gateway.proxy.estimates import ASCII_PER_TOKEN, TextTokenCount, TokenEstimates, call_text
from powerband.gateway.proxy.events import (
    CHOICES,
    FIELDS,
    NO_IDS,
    Chunk,
    ChunkChoice,
    ChunkDelta,
    ChunkUsage,
    count_ids,
    has_ids,
    read_chunk,
)
from powerband.gateway.proxy.upstream_errors import (
    MAX_BYTES,
    InvalidUpstreamRequest,
    read_upstream_error,
    with_served_name,
)
from powerband.gateway.proxy.whole_response import WholeAnswer
from powerband.gateway.routes import ReplicaAddress
from powerband.web.streaming import DONE, event

# What stays the same through a stream, beside the model.
_LASTING = ("id", "created", "system_fingerprint")
_MAX_LASTING_BYTES = 512  # larger ones would be repeated with every event after a failover
_ENCODE = msgspec.json.Encoder().encode
# How engines end an answer that they gave up: vLLM and SGLang; errors of vLLM and Dynamo; TensorRT-LLM.
_GIVEN_UP = frozenset(("abort", "aborted", "error", "cancelled", "canceled", "timeout"))
_MAKES_SEVERAL = frozenset(("powerband", "vllm", "sglang", "trtllm"))  # choices, where n asks for them
_SLACK_TOKENS = 64  # engines differ in whether they count the end of a turn


class StreamState:
    """`tell` takes events; the attributes say how far it has come.

    token_ids: of all output, where replicas send them. num_said: the text of the first so many was sent, too, unless
    a stop string made the replica hold some back: a later one may need the next, as half a letter does. has_gap: some
    of it came without ids. is_parsed: some of it was thought or a call of a tool, parsed out of the text.
    texts: kept only when asked for, to find the place where another engine goes on.
    """

    def __init__(
        self,
        client_request: ClientRequest,
        model: str,
        estimates: TokenEstimates | None = None,
        *,
        keeps_text: bool = False,
    ) -> None:
        """estimates: of the model's answers, for tokens that are not counted by the replica."""
        self._client_request = client_request
        self._num_choices = client_request.num_choices
        self.text = TextTokenCount(estimates or TokenEstimates())
        self._always_keeps_text = keeps_text
        self._model = self._inner_model = model
        fields = client_request.fields
        self._wants_ids = bool(fields.return_token_ids)
        self.wants_silence = self._wants_ids or bool(fields.logprobs)  # events of ids without text, too
        self._wants_usage = client_request.wants_usage
        self._strips_usage = False  # of chunks that add to a choice: the gateway asked for it, the client did not
        self._usage_of: dict[int, int] | None = None  # output tokens by choice, where that is what chunks say
        self._since_usage = 0  # output tokens that came after the last usage
        self._has_told_usage = False
        self._prompt_sizes: dict[int, int] = {}  # by number of the prompt, where replicas tell its ids
        self._served_model = Raw(_ENCODE(model))
        self._lasting: dict[str, Raw] = {}
        self._before = 0  # output tokens of the replicas before, where the current one does not count them
        self._is_other_kind = False  # the current replica tells completions where the client asked for chat
        self.keeps_text = False
        self._skipped = ""
        self._text_offset = 0  # of what the current replica tells, where it counts from its own first character
        self.engine = ""  # of the replicas so far
        self._opened: set[int] = set()  # choices whose role was sent
        self.is_resumed = False
        self.token_ids = array("q")  # arrays: there may be many, of many streams
        self.num_said = 0
        self.prompt_ids = NO_IDS
        self.has_gap = False
        self.is_parsed = False
        self.texts: list[str] = []
        self.finish_reason = ""
        self._open: set[int] = set()  # choices that have begun and not ended
        self._finished: set[int] = set()
        self.usage: ChunkUsage | None = None
        self.times_s = array("d")
        self.counts = array("q")
        self.num_tokens = 0
        self._min_tokens = 0  # that there are at least: ids, and one for each text without any

    @property
    def is_finished(self) -> bool:
        """Every choice that was asked for has said how it ended."""
        return len(self._finished) >= self._num_choices

    @property
    def may_end(self) -> bool:
        """Every choice that has begun has said how it ended, and none is missing."""
        return not self._open and self._is_complete(self._finished)

    def _is_complete(self, indexes: set[int]) -> bool:
        """Whether these are all choices; of a server of which nobody knows whether it makes several: one a prompt."""
        if self.engine in _MAKES_SEVERAL:
            return len(indexes) >= self._num_choices
        return (
            len({index // (self._client_request.fields.n or 1) for index in indexes})
            >= self._client_request.num_prompts
        )

    @property
    def has_too_many(self) -> bool:
        """More tokens than may have been asked for."""
        limit = self._client_request.limit
        per_choice = MAX_TOKENS if limit is None else limit
        return self._min_tokens > per_choice * self._num_choices + _SLACK_TOKENS

    def begin(self, replica: ReplicaAddress) -> None:
        """The next events are this replica's."""
        self.engine, self._inner_model = replica.engine, replica.model
        returns_usage = self._client_request.returns_usage(replica)
        self._strips_usage = returns_usage and not self._client_request.wants_continuous_usage
        self._usage_of = {} if returns_usage else None
        self.keeps_text = self._always_keeps_text or (replica.engine == "vllm" and self._client_request.can_resume)

    def process_whole(self, chunk: Chunk, replica: ReplicaAddress, *, size: int = 0) -> None:
        """An answer that came at once. Raises UpstreamFailure.

        size: of one of which `chunk` is the surface, in bytes: its text is not kept, and its tokens are guessed.
        """
        self.begin(replica)
        self._check_choices(chunk)
        self.num_tokens = sum(self._count(choice) for choice in chunk.choices or ())
        if not self._is_complete(has := self._finished | self._open):
            message = f"The replica's answer has {len(has)} of {self._num_choices} choices."
            raise UpstreamFailure("truncated", message)
        if size:
            self.texts = [f"[an answer of {size} bytes]"]
            self.num_tokens = min(size // ASCII_PER_TOKEN, self._max_output)
        self._take_usage(chunk, self.num_tokens)
        _, _, self.num_tokens = self.final_usage()

    def resume(
        self, *, kept: int, skipped: str = "", is_other_kind: bool = False, counts_as_prompt: bool = False
    ) -> None:
        """Another replica goes on after the first `kept` tokens. Those that follow are generated and sent again.

        skipped: text that it says first and the client has already. is_other_kind: it tells completions where the
        client asked for chat. counts_as_prompt: it takes the kept tokens for a part of the prompt.
        """
        self.is_resumed = True
        self._is_other_kind = is_other_kind
        self._skipped = skipped
        self._before = kept if counts_as_prompt else 0
        self._text_offset = sum(map(len, self.texts)) - len(skipped) if counts_as_prompt else 0
        self.num_tokens -= len(self.token_ids) - kept
        self._min_tokens = min(self._min_tokens, kept)
        self.usage, self._since_usage = None, self.num_tokens  # the next replica counts for itself
        del self.token_ids[kept:]
        self.num_said = min(self.num_said, kept)

    def process_event(self, data: bytes, now_s: float) -> bytes:
        """What the client reads of an event's data, whole events. Raises UpstreamFailure and InvalidUpstreamRequest."""
        chunk = read_chunk(data)
        if chunk.has_error:
            raise self.as_failure(chunk.error)
        self._check_choices(chunk)
        if not chunk.choices:
            if _is_error(data):
                raise self.as_failure(Raw(data))
            self._take_usage(chunk, 0)
            return self._rewritten(data, chunk) if chunk.usage is not None and self._wants_usage else b""
        tokens, is_silent = 0, True
        for choice in chunk.choices:
            tokens += self._count(choice)
            is_silent = is_silent and self._is_empty(choice)
        self._take_usage(chunk, tokens)
        if has_ids(chunk.prompt_token_ids) and not self._before:
            self.prompt_ids = chunk.prompt_token_ids
        if tokens:
            self.times_s.append(now_s)
            self.counts.append(tokens)
            self.num_tokens += tokens
        return b"" if is_silent else self._rewritten(data, chunk)

    def _check_choices(self, chunk: Chunk) -> None:
        """Raise UpstreamFailure for more choices than were asked for."""
        if len(chunk.choices or ()) > self._num_choices:
            message = f"The replica sent {len(chunk.choices or ())} choices at once"
            raise UpstreamFailure("garbage", f"{message}; {self._num_choices} were asked for.")

    def _count(self, choice: ChunkChoice) -> int:
        """Tokens that it adds. Raises UpstreamFailure for a choice that nobody asked for."""
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
        if has_ids(choice.prompt_token_ids) and not self._before:
            self.prompt_ids = choice.prompt_token_ids
            self._prompt_sizes[index // (self._client_request.fields.n or 1)] = count_ids(choice.prompt_token_ids)
        if text and self.keeps_text:
            self.texts.append(text)
        if choice.token_ids:
            self.token_ids.extend(choice.token_ids)
            if text:
                self.num_said = len(self.token_ids)
            self._min_tokens += len(choice.token_ids)
            return len(choice.token_ids)
        if text:
            self.has_gap = True
            self._min_tokens += 1
            return self.text.add(text)
        return 0

    def _take_usage(self, chunk: Chunk, tokens: int) -> None:
        """tokens: that the chunk adds, as they were counted here. What says 0 tokens says nothing."""
        usage = chunk.usage
        if usage is None or not usage.completion_tokens:
            self._since_usage += tokens
            if usage is not None and usage.prompt_tokens and self.usage is None:
                self.usage = usage
            return
        if chunk.choices and self._usage_of is not None:
            for choice in chunk.choices:
                self._usage_of[choice.index or 0] = usage.completion_tokens
            usage = msgspec.structs.replace(usage, completion_tokens=sum(self._usage_of.values()))
        self.usage, self._since_usage = usage, 0

    def _after_skipped(self, text: str, *, is_last: bool) -> str:
        """What is new of a text that begins with what the client has. Raises UpstreamFailure when it does not."""
        skipped = self._skipped
        size = min(len(text), len(skipped))
        if text[:size] != skipped[:size] or (is_last and size < len(skipped)):
            raise UpstreamFailure("resume", "The replica goes on with another text than the client has.")
        self._skipped = skipped[size:]
        return text[size:]

    def _is_empty(self, choice: ChunkChoice) -> bool:
        """Whether the client needs nothing of it: ids that only the gateway asked for, and what it has already."""
        delta = choice.delta
        if choice.text or choice.finish_reason:
            return False
        if delta is None:
            return choice.token_ids is not None and not self.wants_silence
        if delta.content or delta.is_parsed:
            return False
        if delta.role is not None:
            index = choice.index or 0
            is_told = self.is_resumed and index in self._opened
            self._opened.add(index)
            return is_told
        return choice.token_ids is not None and not self.wants_silence

    def _rewritten(self, data: bytes, chunk: Chunk) -> bytes:
        """The event as the client is to read it: the very bytes that came, if they may stay so."""
        if not self._lasting:
            first = FIELDS.decode(data)
            self._lasting = {
                name: first[name] for name in _LASTING if name in first and len(first[name]) <= _MAX_LASTING_BYTES
            }
        returns_usage = self._wants_usage and not (chunk.choices and self._strips_usage)
        if returns_usage and chunk.usage is not None and not chunk.choices:
            self._has_told_usage = True
        if not (self.is_resumed or chunk.model != self._model or self._has_too_much(chunk, returns_usage)):
            return event(data)
        fields: dict[str, Any] = FIELDS.decode(data)
        fields["model"] = self._served_model
        if chunk.choices:
            choices = fields["choices"] = CHOICES.decode(fields["choices"])
            for read, choice in zip(chunk.choices, choices, strict=True):
                if self.is_resumed and "text" in choice:
                    choice["text"] = Raw(_ENCODE(read.text))  # less what the client has
                self._rewrite_choice(choice)
        if not self._wants_ids or self.is_resumed:
            fields.pop("prompt_token_ids", None)
        if not returns_usage:
            fields.pop("usage", None)
        if self.is_resumed:
            fields |= self._lasting
            if self._is_other_kind:
                fields["object"] = "chat.completion.chunk"
            if chunk.usage is not None and self._before and returns_usage:
                fields["usage"] = self._with_earlier_usage(fields["usage"], chunk.usage)
        return event(_ENCODE(fields))

    def _has_too_much(self, chunk: Chunk, returns_usage: bool) -> bool:
        """Whether it has what only the gateway asked for, or an empty finish_reason where null is meant."""
        if chunk.usage is not None and not returns_usage:
            return True
        if has_ids(chunk.prompt_token_ids) and not self._wants_ids:
            return True
        for choice in chunk.choices or ():
            if choice.finish_reason == "":
                return True
            if not self._wants_ids and (choice.token_ids is not None or has_ids(choice.prompt_token_ids)):
                return True
        return False

    def _rewrite_choice(self, choice: dict[str, Any]) -> None:
        """Change a choice to what the client is to read."""
        if not self._wants_ids or self.is_resumed:
            choice.pop("prompt_token_ids", None)
        if "finish_reason" in choice and bytes(choice["finish_reason"]) == b'""':
            choice["finish_reason"] = None
        if self._text_offset and "logprobs" in choice:
            choice["logprobs"] = _shifted(choice["logprobs"], self._text_offset)
        if self._is_other_kind:
            text = choice.pop("text", None)
            choice["delta"] = {"content": text} if text or "token_ids" in choice else {}
        if not self._wants_ids:
            choice.pop("token_ids", None)

    def _with_earlier_usage(self, data: Raw, usage: ChunkUsage) -> dict[str, Any]:
        """Its prompt held output that came before."""
        counted = {
            "prompt_tokens": max(0, (usage.prompt_tokens or 0) - self._before),
            "completion_tokens": (usage.completion_tokens or 0) + self._before,
        }
        return {**FIELDS.decode(data), **counted}

    def as_failure(self, error: Raw) -> Exception:
        """An error in an answer: the replica's own, which another may be free of, or the request's."""
        complaint = with_served_name(read_upstream_error(bytes(error)), self._inner_model, self._model)
        if complaint.is_about_request:
            return InvalidUpstreamRequest(complaint)
        return UpstreamFailure(complaint.code or "error", f"The replica met an error: {complaint.message}")

    def whole(self, answer: WholeAnswer, chunk: Chunk) -> list[bytes]:
        """A whole answer under the name that is served."""
        return answer.pieces() if chunk.model == self._model else answer.renamed(self._model)

    def final_usage(self) -> tuple[int, int, int]:
        """Prompt, cached and output tokens: as replicas said; else as far as they were seen, see `is_estimate`.

        Never more than the request can have: its client pays for them.
        """
        usage = self.usage
        cached = 0 if usage is None else usage.cached_tokens
        prompt = min(self._prompt_size() or self._client_request.prompt_tokens, self._client_request.max_prompt_usage)
        return prompt, min(cached, prompt), min(self._said_output, self._max_output)

    @property
    def _said_output(self) -> int:
        return max(self._output_size(), len(self.token_ids))

    @property
    def _max_output(self) -> int:
        limit = self._client_request.limit
        return (MAX_TOKENS if limit is None else limit) * self._client_request.num_answers

    @property
    def is_estimate(self) -> bool:
        """Whether `final_usage` has sizes that no replica counted."""
        is_counted = self._since_usage == 0 or not self.has_gap
        is_possible = (
            self._prompt_size() <= self._client_request.max_prompt_usage and self._said_output <= self._max_output
        )
        return not self._prompt_size() or not is_counted or not is_possible

    @property
    def counted_prompt(self) -> int:
        """Its tokens, as a replica says; 0: none has said yet."""
        return self._prompt_size()

    def _output_size(self) -> int:
        usage = self.usage
        if usage is None or not usage.completion_tokens:
            return self.num_tokens
        return usage.completion_tokens + self._before + self._since_usage

    def _prompt_size(self) -> int:
        """Of all prompts; 0: not known. A usage of one choice has one prompt."""
        prompts, usage = self._client_request.num_prompts, self.usage
        if len(self._prompt_sizes) == prompts:
            return sum(self._prompt_sizes.values())
        if usage is not None and usage.prompt_tokens and not (self._usage_of and prompts > 1):
            return max(0, usage.prompt_tokens - self._before)
        return count_ids(self.prompt_ids) if prompts == 1 else 0

    def finish(self) -> bytes:
        """The event that says how the answer ended, when that is all that was lost of it."""
        return self.cut("length" if self._has_all else "stop")

    def cut(self, reason: str) -> bytes:
        """The event that ends all choices which have not ended."""
        self.finish_reason = reason
        said: dict[str, Any] = {"delta": {}} if self._client_request.endpoint == "chat" else {"text": ""}
        left = [index for index in range(self._num_choices) if index not in self._finished]
        self._finished.update(left)
        return self._build_chunk(
            [{"index": index, **said, "logprobs": None, "finish_reason": reason} for index in left]
        )

    @property
    def _has_all(self) -> bool:
        return len(self._client_request.resumed_ids) + len(self.token_ids) == self._client_request.limit

    def final_events(self) -> bytes:
        """The last events: the usage, if the client wants it and the replica did not send it, and the end."""
        if not self._wants_usage or self._has_told_usage:
            return DONE
        prompt, cached, output = self.final_usage()
        usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        return self._build_chunk([], usage={**usage, "prompt_tokens_details": {"cached_tokens": cached}}) + DONE

    def _build_chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self._client_request.endpoint == "chat" else "text_completion"
        return event(_ENCODE({**self._lasting, "model": self._model, "object": kind, "choices": choices, **more}))


def _is_error(data: bytes) -> bool:
    """Whether an event without choices is an error in a form that does not say so by its field 'error'."""
    if len(data) > MAX_BYTES:
        return False
    fields = FIELDS.decode(data)
    kind = fields.get("object")
    # Older vLLM's and TensorRT-LLM's form, with or without words; and JSON:API's.
    if (kind is not None and bytes(kind) == b'"error"') or "errors" in fields:
        return True
    return "usage" not in fields and bool(read_upstream_error(data).message)


def _shifted(logprobs: Raw, offset: int) -> Any:
    """Log-probabilities of a completion whose places in the text begin so many characters later."""
    found = msgspec.json.decode(logprobs)
    if isinstance(found, dict) and isinstance(places := found.get("text_offset"), list):
        found["text_offset"] = [place + offset if isinstance(place, int) else place for place in places]
    return found


def _parsed_text(delta: ChunkDelta) -> str:
    """What a delta says, thoughts and calls of tools among it; not empty."""
    said = [delta.content, delta.reasoning_content, delta.reasoning]
    calls = call_text(delta.tool_calls) if delta.has_calls else ""
    return "".join(one for one in said if isinstance(one, str)) + calls or "..."
