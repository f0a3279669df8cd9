"""What the gateway reads of a client's request, and the body that a replica gets in its place.

Fields that the gateway does not know pass through as they are: the replica judges them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from powerband.dispatch.estimates import BYTES_PER_TOKEN
from powerband.errors import InvalidRequest
from powerband.gateway.accounts.limits import room_for_output
from powerband.gateway.request import ANONYMOUS, Endpoint, GatewayRequest
from powerband.gateway.routes import ReplicaAddress
from powerband.web.body import decode
from powerband.web.body_budget import SMALL_BYTES

PATHS: dict[Endpoint, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
}
MAX_LABEL_CHARS = 512  # of user and cache_salt, as at our replicas
COMPLETION_TOKENS = 16  # that a completion has at most where it names no limit: OpenAI's default, and the engines'
# Of one token in an answer's JSON, at most: the longest of a vocabulary are runs of 128 blanks or so, and a control
# character takes six bytes; with log-probabilities it stands there with twenty others.
_TOKEN_BYTES = 1024
_TOKEN_BYTES_WITH_LOGPROBS = 64 << 10
MAX_TOKENS = 1 << 20  # of one choice, where the request names no limit: no model has a longer context
_SLACK_PROMPT_TOKENS = 1 << 16
_PROMPT_BYTES = 32  # of an answer, for each of the prompt: its ids, and itself
_FIELDS = msgspec.json.Decoder(dict[str, Raw])
# Engines that say the ids of what they stream, so that another replica can go on.
_TELL_IDS = frozenset(("powerband", "vllm"))
# Engines that do not, but say with each chunk how many tokens its choice has so far: who leaves early is charged by it.
_TELL_USAGE = frozenset(("sglang", "trtllm"))
_TRUE = Raw(b"true")


class StreamOptionFields(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class RequestFields(msgspec.Struct):
    """The fields that the gateway reads, of both kinds of request."""

    model: str | None = None
    prompt: Raw | UnsetType = UNSET
    messages: Raw | UnsetType = UNSET
    stream: bool | None = None
    stream_options: StreamOptionFields | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None  # OpenAI's limit
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    n_predict: Any = None
    n_cmpl: Any = None
    logprobs: bool | int | None = None
    return_token_ids: bool | None = None
    resume_token_ids: list[Annotated[int, Meta(ge=0, le=2**32 - 1)]] | None = None
    user: Annotated[str, Meta(max_length=MAX_LABEL_CHARS)] | None = None
    cache_salt: Annotated[str, Meta(max_length=MAX_LABEL_CHARS)] | None = None
    prompt_cache_key: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    deadline_s: Annotated[float, Meta(gt=0, le=86400)] | None = None

    @property
    def limit(self) -> int | None:
        """Output tokens of one choice, at most."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self, endpoint: Endpoint) -> None:
        """Raise InvalidRequest when engines would not agree on how much may be made: limits and bills go by it."""
        for name, usual in (("n_predict", "max_tokens"), ("n_cmpl", "n")):
            if getattr(self, name) is not None:  # llama.cpp's names, which win over the usual ones there
                raise InvalidRequest(f"'{name}' is not taken.", hint=f"Say '{usual}'.", param=name)
        if self.max_completion_tokens is None:
            return
        if endpoint == "completions":
            raise InvalidRequest(
                "'max_completion_tokens' is for chats.", hint="Say 'max_tokens'.", param="max_completion_tokens"
            )
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise InvalidRequest(
                f"'max_tokens' is {self.max_tokens} and 'max_completion_tokens' is {self.max_completion_tokens}.",
                hint="Name one limit.",
                param="max_tokens",
            )


_NAMES = frozenset(RequestFields.__struct_fields__)
_MAX_NAME_CHARS = max(map(len, _NAMES))


class ClientRequest:
    """A request that was read. `request`: for queue and limits. `upstream_body`: what a replica is sent."""

    def __init__(self, data: bytes, endpoint: Endpoint) -> None:
        """Raises InvalidRequest."""
        self.endpoint = endpoint
        self.fields = decode(data, RequestFields)
        if len(data) > SMALL_BYTES and len(compact := msgspec.json.format(data, indent=-1)) < len(data) * 7 // 8:
            data = compact  # what is kept until the answer has ended; the blanks that padded it are not
            self.fields = decode(data, RequestFields)
        self.fields.check(endpoint)
        self.prompt = self._prompt()
        self._data = data
        self._fields: dict[str, Raw] = _FIELDS.decode(data)
        _check_case(self._fields)
        self.num_prompts, self.prompt_tokens, is_exact = _measure(self.prompt, endpoint)
        # A token has a byte at least, and the JSON around a text more bytes than its chat template has tokens.
        size = len(data) - len(self.prompt) + _text_bytes(self.prompt)
        self.max_prompt_tokens = self.prompt_tokens if is_exact else max(size, self.prompt_tokens)
        if "tools" in self._fields:
            self.prompt_tokens += len(bytes(self._fields["tools"])) // BYTES_PER_TOKEN
        # Of its usage, at most, as far as is known here: templates add text, pictures are fetched by the replica.
        self.max_prompt_usage = (self.max_prompt_tokens + _SLACK_PROMPT_TOKENS) * self.num_answers
        if b"_url" in self.prompt:
            self.max_prompt_usage = max(self.max_prompt_usage, MAX_TOKENS)
        self.contexts: Mapping[str, int | None] = {}  # of replicas, as far as they are known, for the cap
        self.cap: int | None = None  # on the output of a request that names no limit, see `limit`

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return len(self._data)

    def _prompt(self) -> bytes:
        name = "messages" if self.endpoint == "chat" else "prompt"
        value = getattr(self.fields, name)
        if value is UNSET:
            raise InvalidRequest(f"'{name}' is missing.", param=name)
        return bytes(value)

    @property
    def is_stream(self) -> bool:
        return bool(self.fields.stream)

    @property
    def limit(self) -> int | None:
        """Output tokens of one choice, at most: as asked, or as its key's limits allow; None: as the context allows."""
        return self.cap if self.fields.limit is None else self.fields.limit

    @property
    def num_choices(self) -> int:
        return self.num_prompts * (self.fields.n or 1)

    @property
    def num_answers(self) -> int:
        """That are computed, of which the best may be all that is answered."""
        return self.num_prompts * max(self.fields.n or 1, self.fields.best_of or 1)

    @property
    def can_resume(self) -> bool:
        """Whether there is one answer, which another replica could go on with."""
        fields = self.fields
        return self.num_choices == 1 and (fields.best_of or 1) == 1 and fields.limit != 0

    @property
    def resumed_ids(self) -> list[int]:
        """Output that the client has already, and wants to be gone on with."""
        return self.fields.resume_token_ids or []

    @property
    def max_answer_bytes(self) -> int:
        """More than any right answer to it has; without a limit to its tokens there is no such bound."""
        limit = self.fields.limit
        if limit is None:
            return 1 << 62
        has_logprobs = any(name in self._fields for name in ("logprobs", "top_logprobs", "prompt_logprobs"))
        token_bytes = _TOKEN_BYTES_WITH_LOGPROBS if has_logprobs else _TOKEN_BYTES
        of_prompt = len(self.prompt) * (_TOKEN_BYTES_WITH_LOGPROBS if has_logprobs else _PROMPT_BYTES)
        return (1 << 20) + (limit * token_bytes + of_prompt) * self.num_choices

    @property
    def wants_usage(self) -> bool:
        options = self.fields.stream_options
        return options is not None and bool(options.include_usage)

    @property
    def wants_continuous_usage(self) -> bool:
        options = self.fields.stream_options
        return options is not None and bool(options.continuous_usage_stats)

    @property
    def prompt_salt(self) -> bytes:
        """What tells prompts apart beside their own words."""
        return b"".join(bytes(self._fields[name]) for name in ("tools", "cache_salt") if name in self._fields)

    def request(
        self,
        id: str,
        model: str,
        tenant: str,
        headers: Mapping[str, str],
        default_output_tokens: int,
        best_priority: int = 0,
    ) -> GatewayRequest:
        """best_priority: nothing that the client writes gets it a better one."""
        fields, now_s = self.fields, time.monotonic()
        default = default_output_tokens if self.endpoint == "chat" else COMPLETION_TOKENS
        most = (default if fields.limit is None else fields.limit) * self.num_answers
        return GatewayRequest(
            id=id,
            endpoint=self.endpoint,
            model=model,
            tenant=tenant,
            prompt_tokens=self.prompt_tokens,
            output_tokens=most,
            max_prompt_tokens=self.max_prompt_tokens,
            max_output_tokens=most,
            is_open_ended=fields.limit is None and self.endpoint == "chat",
            answers=self.num_answers,
            stream=self.is_stream,
            priority=max(fields.priority or 0, best_priority),
            arrival_s=now_s,
            deadline_s=None if fields.deadline_s is None else now_s + fields.deadline_s,
            session=headers.get("x-session-id", "")[:256] or (fields.prompt_cache_key or "")[:256],
        )

    def returns_token_ids(self, replica: ReplicaAddress) -> bool:
        """Whether its stream says the ids of all tokens: to resume after them, and to count them."""
        return self.is_stream and self.fields.limit != 0 and replica.engine in _TELL_IDS

    def returns_usage(self, replica: ReplicaAddress) -> bool:
        """Whether each chunk of its stream says how many tokens its choice has so far."""
        return self.is_stream and replica.engine in _TELL_USAGE

    def upstream_body(self, replica: ReplicaAddress, tenant: str, resumed: Sequence[int] = ()) -> bytes:
        """resumed: ids of the output tokens that the client has, for our own engine to continue from.

        Raises InvalidRequest when the client has some that this replica could not go on after.
        """
        if self.resumed_ids and replica.engine != "powerband":
            raise InvalidRequest(
                f"'resume_token_ids' needs a replica of Powerband; this one runs {replica.engine}.",
                hint="Leave it out.",
                param="resume_token_ids",
            )
        fields = dict(self._fields)
        # Waiting happens here: an engine whose queue knows no priorities would refuse them.
        changed = fields.pop("priority", None) is not None
        changed = fields.pop("deadline_s", None) is not None or changed
        if self.fields.model != replica.model:
            fields["model"] = _raw(replica.model)
            changed = True
        if tenant != ANONYMOUS or "user" in fields or "cache_salt" in fields:  # nobody takes a key's name
            changed = True
            self._set_cache_salt(fields, replica, tenant)
        if self.cap is not None and self.fields.limit is None:
            fields["max_tokens"] = _raw(self._cap_at(replica, self.cap))
            changed = True
        if self.is_stream:
            changed = True
            options = _FIELDS.decode(fields["stream_options"]) if self.fields.stream_options is not None else {}
            options["include_usage"] = _TRUE
            if self.returns_usage(replica):
                options["continuous_usage_stats"] = _TRUE
            fields["stream_options"] = _raw(options)
            if self.returns_token_ids(replica):
                fields["return_token_ids"] = _TRUE
            if resumed:
                fields["resume_token_ids"] = _raw([*self.resumed_ids, *resumed])
                fields.pop("echo", None)  # the client has it
        return msgspec.json.encode(fields) if changed else self._data

    def _cap_at(self, replica: ReplicaAddress, cap: int) -> int:
        """A context in which the prompt has no room is none: the replica judges."""
        room = room_for_output(self.contexts.get(replica.id) or MAX_TOKENS, self.max_prompt_tokens)
        return min(cap, room) if room > 0 else cap

    def _set_cache_salt(self, fields: dict[str, Raw], replica: ReplicaAddress, tenant: str) -> None:
        """Cached prefixes of one key are not found by another."""
        if replica.engine == "powerband":
            label = f"{tenant}/{self.fields.user}" if self.fields.user else tenant
            if len(label) > MAX_LABEL_CHARS:  # cut, two users could have the same
                label = f"{tenant}/{hashlib.sha256(label.encode()).hexdigest()}"
            fields["user"] = _raw(label)
        elif replica.engine == "vllm":
            salt = self.fields.cache_salt
            fields["cache_salt"] = _raw(f"{tenant}/{salt}" if salt else tenant)


def _check_case(fields: Mapping[str, Raw]) -> None:
    """Servers in Go (Ollama, LocalAI) read field names in any case: limits must not depend on which server it is."""
    for name in fields:
        if name not in _NAMES and len(name) <= _MAX_NAME_CHARS and (usual := name.casefold()) in _NAMES:
            raise InvalidRequest(f"Unknown field '{name}'.", hint=f"Did you mean '{usual}'?", param=name)


def with_model(data: bytes, model: str) -> bytes:
    """A body with this model's name."""
    return msgspec.json.encode({**_FIELDS.decode(data), "model": model})


def _raw(value: Any) -> Raw:
    return Raw(msgspec.json.encode(value))


def _text_bytes(prompt: bytes) -> int:
    """At most, of its texts: an escape like \\u4e00 has twice the bytes of what it stands for."""
    if b"\\u" not in prompt:
        return len(prompt)
    try:
        return len(msgspec.json.encode(msgspec.json.decode(prompt)))
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return len(prompt)


def _measure(prompt: bytes, endpoint: Endpoint) -> tuple[int, int, bool]:
    """Prompts, about how many tokens they have together, and whether that is exact."""
    if endpoint == "chat" or not prompt.startswith(b"["):
        return 1, max(1, len(prompt) // BYTES_PER_TOKEN), False
    if b'"' in prompt:
        return max(1, len(msgspec.json.decode(prompt, type=list[Raw]))), max(1, len(prompt) // BYTES_PER_TOKEN), False
    return max(1, prompt.count(b"[") - 1), prompt.count(b",") + 1, True
