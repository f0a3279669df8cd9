"""One stream as its client has it, whichever replicas told its parts.

A replica's event becomes what the client is to read: the same bytes less what only the gateway asked for. After another
replica has taken over, the answer's name, age and model stay those that the client saw first.
"""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

from powerband.errors import PowerbandError
from powerband.gateway.proxy.connection import UpstreamFailure
from powerband.gateway.proxy.estimates import Estimates, TextCount, call_text
from powerband.gateway.proxy.events import Choice, Chunk, Usage, read_chunk, without_list
from powerband.gateway.proxy.intake import Intake
from powerband.gateway.routes import ReplicaAddress
from powerband.web.streaming import DONE, event

_IDS = b',"token_ids":['
_PROMPT_IDS = b',"prompt_token_ids":['
_NO_USAGE = b',"usage":null'
# What stays the same through a stream.
_LASTING = ("id", "created", "model", "system_fingerprint")


class RequestFault(PowerbandError):
    """A replica's error in the middle of a stream which is the request's own; another would say the same."""

    http_status = 400


class Story:
    """`tell` takes events; the attributes say how far it has come.

    token_ids: of all output, where the replicas tell them. num_said: the text of the first so many is told, too, unless
    a stop string made the replica hold some back: a later one may need the next, as half a letter does. has_gap: some
    of it came without ids. is_parsed: some of it was thought or a call of a tool, parsed out of the text.
    texts: kept only when asked for, to find the place where another engine goes on.
    """

    def __init__(
        self, intake: Intake, model: str, estimates: Estimates | None = None, *, keeps_text: bool = False
    ) -> None:
        """estimates: of the model's answers, for tokens that are not counted by the replica."""
        self._intake = intake
        self.text = TextCount(estimates or Estimates())
        self._always_keeps_text = keeps_text
        self._model = model
        asked = intake.asked
        self._wants_ids = bool(asked.return_token_ids)
        self._wants_silence = self._wants_ids or bool(asked.logprobs)  # events that add no text, too
        self._wants_usage = intake.wants_usage
        self._strips_ids = False
        self._strips_usage = False  # of chunks that add to a choice: the gateway asked for it, the client did not
        self._usage_of: dict[int, int] | None = None  # output tokens by choice, where that is what chunks say
        self._since_usage = 0  # output tokens that came after the last usage
        self._has_told_usage = False
        self._prompt_sizes: dict[int, int] = {}  # by number of the prompt, where replicas tell its ids
        self._rename: tuple[bytes, bytes] | None = None
        self._lasting: dict[str, Any] = {}
        self._before = 0  # output tokens of the replicas before, where the current one does not count them
        self._is_other_kind = False  # the current replica tells completions where the client asked for chat
        self.keeps_text = False
        self.is_open = False  # the role was told
        self.is_resumed = False
        self.token_ids = array("q")  # arrays: there may be many, of many streams
        self.num_said = 0
        self.prompt_ids: list[int] = []
        self.has_gap = False
        self.is_parsed = False
        self.texts: list[str] = []
        self.finish_reason = ""
        self.num_finished = 0
        self.usage: Usage | None = None
        self.times_s = array("d")
        self.counts = array("i")
        self.num_tokens = 0

    @property
    def is_finished(self) -> bool:
        """Every choice has said how it ended."""
        return self.num_finished >= self._intake.num_choices

    def begin(self, replica: ReplicaAddress) -> None:
        """The next events are this replica's."""
        self._strips_ids = self._intake.tells_ids(replica) and not self._wants_ids
        tells_usage = self._intake.tells_usage(replica)
        self._strips_usage = tells_usage and not self._intake.wants_continuous_usage
        self._usage_of = {} if tells_usage else None
        self.keeps_text = self._always_keeps_text or (replica.engine == "vllm" and self._intake.can_resume)
        names = replica.model, self._model
        encoded = [b'"model":' + msgspec.json.encode(name) for name in names]
        self._rename = None if names[0] == names[1] else (encoded[0], encoded[1])

    def renamed(self, body: bytes, replica: ReplicaAddress) -> bytes:
        """A whole answer under the name that is served here."""
        self.begin(replica)
        return body if self._rename is None else body.replace(*self._rename, 1)

    def take_whole(self, chunk: Chunk, replica: ReplicaAddress) -> None:
        """An answer that came at once."""
        self.begin(replica)
        self.num_tokens = sum(self._count(choice) for choice in chunk.choices or ())
        self._take_usage(chunk, self.num_tokens)
        _, _, self.num_tokens = self.final_usage()

    def resume(self, *, kept: int, is_other_kind: bool = False, counts_as_prompt: bool = False) -> None:
        """Another replica goes on after the first `kept` tokens. Those that follow are made, and told, again.

        is_other_kind: it tells completions where the client asked for chat. counts_as_prompt: it takes the kept tokens
        for a part of the prompt.
        """
        self.is_resumed = True
        self._is_other_kind = is_other_kind
        self._before = kept if counts_as_prompt else 0
        self.num_tokens -= len(self.token_ids) - kept
        self.usage, self._since_usage = None, self.num_tokens  # the next replica counts for itself
        del self.token_ids[kept:]
        self.num_said = min(self.num_said, kept)

    def tell(self, data: bytes, now_s: float) -> bytes:
        """What the client reads of an event's data, whole events. Raises UpstreamFailure and RequestFault."""
        chunk = read_chunk(data)
        if chunk.error is not None:
            raise _as_failure(data)
        if not chunk.choices:
            self._take_usage(chunk, 0)
            return self._end_chunk(data, chunk)
        tokens, is_silent = 0, True
        for choice in chunk.choices:
            tokens += self._count(choice)
            is_silent = is_silent and self._is_silent(choice)
        self._take_usage(chunk, tokens)
        if chunk.prompt_token_ids and not self._before:
            self.prompt_ids = chunk.prompt_token_ids
        if tokens:
            self.times_s.append(now_s)
            self.counts.append(tokens)
            self.num_tokens += tokens
        if is_silent:
            return b""
        if self.is_resumed:
            return self._retold(data)
        if not self._lasting:
            self._lasting = _lasting_fields(data, self._model)
        return event(self._stripped(data, chunk))

    def _count(self, choice: Choice) -> int:
        """Tokens that it adds."""
        text, delta = choice.text, choice.delta or choice.message
        if delta is not None:
            text = delta.content
            if delta.reasoning_content or delta.reasoning or delta.tool_calls:
                parsed = (delta.reasoning_content or delta.reasoning or "") + call_text(delta.tool_calls)
                text, self.is_parsed = (text or "") + parsed, True
        if choice.finish_reason is not None:
            self.num_finished += 1
            self.finish_reason = choice.finish_reason
        if choice.prompt_token_ids and not self._before:
            self.prompt_ids = choice.prompt_token_ids
            self._prompt_sizes[choice.index // (self._intake.asked.n or 1)] = len(choice.prompt_token_ids)
        if text and self.keeps_text:
            self.texts.append(text)
        if choice.token_ids:
            self.token_ids.extend(choice.token_ids)
            if text:
                self.num_said = len(self.token_ids)
            return len(choice.token_ids)
        if text:
            self.has_gap = True
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
                self._usage_of[choice.index] = usage.completion_tokens
            usage = msgspec.structs.replace(usage, completion_tokens=sum(self._usage_of.values()))
        self.usage, self._since_usage = usage, 0

    def _is_silent(self, choice: Choice) -> bool:
        """Whether the client needs nothing of it."""
        delta = choice.delta
        if choice.text or choice.finish_reason is not None:
            return False
        if delta is None:
            return not self._wants_silence
        if delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls is not None:
            return False
        if delta.role is not None:
            is_told, self.is_open = self.is_open and self.is_resumed, True
            return is_told
        return not self._wants_silence

    def _stripped(self, data: bytes, chunk: Chunk) -> bytes:
        if self._strips_ids:
            data = without_list(data, _IDS)
            if b"prompt_token_ids" in data:
                data = without_list(data, _PROMPT_IDS)
        if not self._wants_usage:
            data = data.replace(_NO_USAGE, b"") if chunk.usage is None else _without(data, "usage")
        elif chunk.usage is not None:
            if chunk.choices and self._strips_usage:
                data = _without(data, "usage")
            else:
                self._has_told_usage = True
        if self._rename is not None:
            data = data.replace(*self._rename, 1)
        return data

    def _end_chunk(self, data: bytes, chunk: Chunk) -> bytes:
        if chunk.usage is None or not self._wants_usage:
            return b""
        self._has_told_usage = True
        if self.is_resumed:
            return self._retold(data)
        return event(self._stripped(data, chunk))

    def _retold(self, data: bytes) -> bytes:
        """An event of a replica that took over, as if there had been one all along."""
        value: dict[str, Any] = msgspec.json.decode(data)
        self._lasting = self._lasting or _lasting_fields(data, self._model)
        value |= self._lasting
        value.pop("prompt_token_ids", None)
        for choice in value.get("choices") or ():
            choice.pop("prompt_token_ids", None)
            if not self._wants_ids:
                choice.pop("token_ids", None)
            if self._is_other_kind:
                text, ids = choice.pop("text", ""), choice.get("token_ids")
                choice["delta"] = {"content": text} if text or ids else {}
        if self._is_other_kind:
            value["object"] = "chat.completion.chunk"
        if not self._wants_usage or (value.get("choices") and self._strips_usage):
            value.pop("usage", None)
        elif value.get("usage"):
            self._has_told_usage = True
            if self._before:
                self._add_before(value["usage"])
        return event(msgspec.json.encode(value))

    def _add_before(self, usage: dict[str, Any]) -> None:
        """Its prompt held output that came before."""
        usage["prompt_tokens"] -= self._before
        usage["completion_tokens"] += self._before

    def final_usage(self) -> tuple[int, int, int]:
        """Prompt, cached and output tokens: as replicas said; else as far as they were seen, see `is_estimate`."""
        usage, seen_ids = self.usage, len(self.token_ids)
        cached = 0 if usage is None else usage.cached_tokens
        return self._prompt_size() or self._intake.prompt_tokens, cached, max(self._output_size(), seen_ids)

    @property
    def is_estimate(self) -> bool:
        """Whether `final_usage` has sizes that no replica counted."""
        is_counted = self._since_usage == 0 or not self.has_gap
        return not self._prompt_size() or not is_counted

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
        prompts, usage = self._intake.num_prompts, self.usage
        if len(self._prompt_sizes) == prompts:
            return sum(self._prompt_sizes.values())
        if usage is not None and usage.prompt_tokens and not (self._usage_of and prompts > 1):
            return max(0, usage.prompt_tokens - self._before)
        return len(self.prompt_ids) if prompts == 1 else 0

    def finish(self) -> bytes:
        """The event that says how the answer ended, when that is all that was lost of it."""
        self.num_finished += 1
        self.finish_reason = "length" if len(self.token_ids) == self._intake.limit else "stop"
        said: dict[str, Any] = {"delta": {}} if self._intake.endpoint == "chat" else {"text": ""}
        return self._made([{"index": 0, **said, "logprobs": None, "finish_reason": self.finish_reason}])

    def closing(self) -> bytes:
        """The end, and before it what a replica left out that told everything else: the usage, if it was wanted."""
        if not self._wants_usage or self._has_told_usage:
            return DONE
        prompt, cached, output = self.final_usage()
        usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
        return self._made([], usage={**usage, "prompt_tokens_details": {"cached_tokens": cached}}) + DONE

    def _made(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self._intake.endpoint == "chat" else "text_completion"
        return event(msgspec.json.encode({**self._lasting, "object": kind, "choices": choices, **more}))


def _lasting_fields(data: bytes, model: str) -> dict[str, Any]:
    value: dict[str, Any] = msgspec.json.decode(data)
    return {name: value[name] for name in _LASTING if name in value} | {"model": model}


def _without(data: bytes, name: str) -> bytes:
    value: dict[str, Any] = msgspec.json.decode(data)
    value.pop(name, None)
    return msgspec.json.encode(value)


def _as_failure(data: bytes) -> Exception:
    """An error in a stream: the replica's own, which another may be free of, or the request's."""
    error = msgspec.json.decode(data).get("error")
    if not isinstance(error, dict):
        return UpstreamFailure("error", "The replica met an error.")
    message, code, kind = (str(error.get(name) or "") for name in ("message", "code", "type"))
    if kind.lower().startswith("invalid_request") or kind == "BadRequestError":
        return RequestFault(message[:500], code=code[:80], param=error.get("param"))
    return UpstreamFailure(code[:80] or "error", f"The replica met an error: {message[:500]}")
