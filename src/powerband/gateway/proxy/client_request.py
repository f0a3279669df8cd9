"""A client's request as the gateway reads it, and the body that it sends to a replica instead.

Unknown fields pass through unchanged; the replica validates them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from powerband.dispatch.estimates import BYTES_PER_TOKEN
from powerband.engines.powerband import MAX_LABEL_CHARS
from powerband.errors import InvalidRequest
from powerband.gateway.proxy.request_fields import (
    SLACK_PROMPT_TOKENS,
    UnsuitableReplica,
    as_raw,
    asks_for_nothing,
    capped,
    check_case,
    max_response_bytes,
    max_text_bytes,
    without_padding,
)
from powerband.gateway.request import ANONYMOUS, Endpoint, GatewayRequest
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.context_lengths import MAX_TOKENS
from powerband.openai.chunks import INVALID_JSON
from powerband.openai.fields import PROMPT_PATHS, StreamOptionFields
from powerband.web.body import decode
from powerband.web.field_types import whole_number_fields

PATHS: dict[Endpoint, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
    "count_tokens": "/v1/messages/count_tokens",
    "input_tokens": "/v1/responses/input_tokens",
}
COMPLETION_TOKENS = 16  # default max_tokens of a completion, at OpenAI and in the engines
_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_TRUE = Raw(b"true")
MAX_PROMPTS = 1024  # of one request
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"')
_TEXTS = msgspec.json.Decoder(list[str])
# _FED: fields that engines may feed to the model besides the prompt (SGLang and Ollama support `suffix`). _NOT_FED:
# fields that they do not, however long. An unknown field counts as fed if it is longer than _SHORT_FIELD bytes.
_FED = frozenset(("suffix", "resume_token_ids", "documents", "tools"))
_NOT_FED = frozenset(
    (
        *("prompt", "logit_bias", "metadata", "allowed_token_ids", "bad_words", "stop", "stop_token_ids", "user"),
        *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    )
)
_SHORT_FIELD = 256


class RequestFields(msgspec.Struct):
    """The fields that the gateway reads, of chats and completions."""

    model: str | None = None
    prompt: Raw | UnsetType = UNSET
    messages: Raw | UnsetType = UNSET
    stream: bool | None = None
    stream_options: StreamOptionFields | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None  # OpenAI's limit
    best_of: Annotated[int, Meta(ge=0, le=128)] | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    n_predict: Any = None
    n_cmpl: Any = None
    logprobs: bool | int | None = None
    return_token_ids: bool | None = None
    resume_token_ids: list[Annotated[int, Meta(ge=0, le=2**32 - 1)]] | None = None
    user: Annotated[str, Meta(max_length=MAX_LABEL_CHARS)] | None = None
    cache_salt: Annotated[str, Meta(max_length=MAX_LABEL_CHARS)] | None = None
    prompt_embeds: Raw | UnsetType = UNSET
    prompt_cache_key: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    deadline_s: Annotated[float, Meta(gt=0, le=86400)] | None = None

    @property
    def limit(self) -> int | None:
        """Maximum output tokens of one choice."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self, endpoint: Endpoint) -> None:
        """Raise InvalidRequest if engines would disagree about the maximum output, which limits and usage rely on."""
        for name, usual in (("n_predict", "max_tokens"), ("n_cmpl", "n")):
            if getattr(self, name) is not None:  # llama.cpp's names, which override the standard ones there
                raise InvalidRequest(f"'{name}' is not taken.", hint=f"Use '{usual}'.", param=name)
        if self.prompt_embeds is not UNSET and not asks_for_nothing(self.prompt_embeds):  # each one adds choices
            raise InvalidRequest("'prompt_embeds' is not supported.", hint="Send 'prompt'.", param="prompt_embeds")
        if self.max_completion_tokens is None:
            return
        if endpoint == "completions":
            raise InvalidRequest(
                "'max_completion_tokens' is for chats.", hint="Use 'max_tokens'.", param="max_completion_tokens"
            )
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise InvalidRequest(
                f"'max_tokens' is {self.max_tokens} and 'max_completion_tokens' is {self.max_completion_tokens}.",
                hint="Name one limit.",
                param="max_tokens",
            )


_WHOLE = re.compile(rb"(-?[0-9]{1,15})\.0{1,15}")
_WHOLE_NUMBERS = whole_number_fields(RequestFields)
_NAMES = frozenset(RequestFields.__struct_fields__)
# Fields after which a response has nothing but text, token ids and log-probabilities.
_TEXT_FIELDS = _NAMES | frozenset(
    (
        *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "top_logprobs", "echo"),
        *("prompt_logprobs", "tools", "tool_choice", "parallel_tool_calls", "response_format", "metadata", "store"),
    )
)


class ClientRequest:
    """A parsed client request. `request`: the form for queue and limits. `upstream_body`: the body for a replica."""

    def __init__(self, data: bytes, endpoint: Endpoint) -> None:
        """Raises InvalidRequest."""
        self.endpoint = endpoint
        data, self.fields = _decode_fields(data)
        if (compact := without_padding(data)) is not data:
            data, self.fields = compact, decode(compact, RequestFields)
        self.fields.check(endpoint)
        self._data = data
        self.prompt = self._prompt()
        self._fields: dict[str, Raw] = _FIELDS.decode(data)
        check_case(self._fields, _NAMES)
        self.num_prompts, self.prompt_tokens, is_exact = _measure(self.prompt, endpoint)
        # A token has at least one byte, and the JSON around a text has more bytes than the chat template adds tokens.
        size = len(data) - len(self.prompt) + max_text_bytes(self.prompt)
        self.max_prompt_tokens = self.prompt_tokens + self._fed_bytes() if is_exact else max(size, self.prompt_tokens)
        if "tools" in self._fields:
            self.prompt_tokens += len(bytes(self._fields["tools"])) // BYTES_PER_TOKEN
        # Upper bound of the prompt's reported usage. Templates add text, and replicas fetch images by URL.
        self.max_prompt_usage = (self.max_prompt_tokens + SLACK_PROMPT_TOKENS) * self.num_sequences
        if b"_url" in self.prompt:
            self.max_prompt_usage = max(self.max_prompt_usage, MAX_TOKENS)
        self.contexts: Mapping[str, int | None] = {}  # context length by replica, as far as known, for the cap
        self.cap: int | None = None  # on the output of a request without max_tokens, see `limit`

    @property
    def path(self) -> str:
        return PATHS[self.endpoint]

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return len(self._data)

    def _prompt(self) -> bytes:
        name = "messages" if self.endpoint == "chat" else "prompt"
        value = getattr(self.fields, name)
        if value is UNSET:
            sent = _FIELDS.decode(self._data)
            hints = [f"'{other}' is for {path}." for other, path in PROMPT_PATHS.items() if other in sent]
            raise InvalidRequest(f"'{name}' is missing.", hint=hints[0] if hints else "", param=name)
        return bytes(value)

    def _fed_bytes(self) -> int:
        """Bytes of fields that engines may feed to the model besides a prompt of ids."""
        fed = {name: len(bytes(value)) for name, value in self._fields.items() if name not in _NOT_FED}
        return sum(size for name, size in fed.items() if name in _FED or size > _SHORT_FIELD)

    @property
    def is_stream(self) -> bool:
        return bool(self.fields.stream)

    @property
    def limit(self) -> int | None:
        """Maximum output tokens of one choice: as requested, or as the key's limits allow; None: up to the context."""
        return self.cap if self.fields.limit is None else self.fields.limit

    @property
    def num_choices(self) -> int:
        return self.num_prompts * (self.fields.n or 1)

    @property
    def num_sequences(self) -> int:
        """Choices to compute; with best_of, not all of them are returned."""
        return self.num_prompts * max(self.fields.n or 1, self.fields.best_of or 1)

    @property
    def can_resume(self) -> bool:
        """Whether another replica could resume the response: only if there is a single choice."""
        fields = self.fields
        return self.num_choices == 1 and (fields.best_of or 1) == 1 and fields.limit != 0

    @property
    def resumed_ids(self) -> list[int]:
        """Token ids of output that the client already has and wants continued."""
        return self.fields.resume_token_ids or []

    @property
    def max_response_bytes(self) -> int:
        """Upper bound of a right response's size if only text was requested; else, practically none.

        Fields like SGLang's `return_hidden_states` make right responses much larger.
        """
        if not self._fields.keys() <= _TEXT_FIELDS:
            return 1 << 62
        has_logprobs = any(name in self._fields for name in ("logprobs", "top_logprobs", "prompt_logprobs"))
        return max_response_bytes(
            self.fields.limit,
            has_logprobs=has_logprobs,
            prompt_bytes=len(self.prompt),
            num_choices=self.num_choices,
        )

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
        """Fields that separate equal prompts in prefix caches."""
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
        """The request for queue and limits. best_priority: the best priority that the client may ask for."""
        fields, now_s = self.fields, time.monotonic()
        default = default_output_tokens if self.endpoint == "chat" else COMPLETION_TOKENS
        output_tokens = (default if fields.limit is None else fields.limit) * self.num_sequences
        return GatewayRequest(
            id=id,
            endpoint=self.endpoint,
            model=model,
            tenant=tenant,
            prompt_tokens=self.prompt_tokens,
            output_tokens=output_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            max_output_tokens=output_tokens,
            is_open_ended=fields.limit is None and self.endpoint == "chat",
            num_sequences=self.num_sequences,
            stream=self.is_stream,
            priority=max(fields.priority or 0, best_priority),
            arrival_s=now_s,
            deadline_s=None if fields.deadline_s is None else now_s + fields.deadline_s,
            session=headers.get("x-session-id", "")[:256] or (fields.prompt_cache_key or "")[:256],
        )

    def returns_token_ids(self, replica: ReplicaAddress) -> bool:
        """Whether the replica's stream has the ids of all tokens, to resume after them and to count them."""
        return self.is_stream and self.fields.limit != 0 and replica.adapter.returns_token_ids

    def returns_usage(self, replica: ReplicaAddress) -> bool:
        """Whether each chunk of the replica's stream reports its choice's tokens so far."""
        return self.is_stream and replica.adapter.returns_continuous_usage

    def upstream_body(self, replica: ReplicaAddress, tenant: str, resumed: Sequence[int] = ()) -> bytes:
        """The body to send to a replica. resumed: output token ids that a Powerband replica continues from.

        Raises UnsuitableReplica if the client sent resume_token_ids and this replica does not support them.
        """
        if self.resumed_ids and not replica.adapter.takes_resume_token_ids:
            raise UnsuitableReplica(
                InvalidRequest(
                    f"'resume_token_ids' needs a replica of Powerband; this one runs {replica.engine}.",
                    hint="Leave it out.",
                    param="resume_token_ids",
                )
            )
        fields = dict(self._fields)
        # Requests queue in the gateway; an engine without priority scheduling would reject these fields.
        changed = fields.pop("priority", None) is not None
        changed = fields.pop("deadline_s", None) is not None or changed
        if self.fields.model != replica.model:
            fields["model"] = as_raw(replica.model)
            changed = True
        if tenant != ANONYMOUS or "user" in fields or "cache_salt" in fields:  # no client may use another key's cache
            changed = True
            isolating = replica.adapter.tenant_fields(tenant, self.fields.user, self.fields.cache_salt)
            for name, value in isolating.items():
                fields[name] = as_raw(value)
        if self.cap is not None and self.fields.limit is None:
            context = self.contexts.get(replica.id) or MAX_TOKENS
            fields["max_tokens"] = as_raw(capped(self.cap, context, self.max_prompt_tokens))
            changed = True
        if self.is_stream:
            changed = True
            options = _FIELDS.decode(fields["stream_options"]) if self.fields.stream_options is not None else {}
            options["include_usage"] = _TRUE
            if self.returns_usage(replica):
                options["continuous_usage_stats"] = _TRUE
            fields["stream_options"] = as_raw(options)
            if self.returns_token_ids(replica):
                fields["return_token_ids"] = _TRUE
            if resumed:
                fields["resume_token_ids"] = as_raw([*self.resumed_ids, *resumed])
                fields.pop("echo", None)  # the client already has the prompt
        return msgspec.json.encode(fields) if changed else self._data


def _decode_fields(data: bytes) -> tuple[bytes, RequestFields]:
    """The body and its fields; whole numbers that are written like 3.0, as some clients do, become 3 in both."""
    try:
        return data, decode(data, RequestFields)
    except InvalidRequest as error:
        if error.code != InvalidRequest.default_code:  # no JSON, or nested too deeply to be decoded
            raise
        try:
            fields = _FIELDS.decode(data)
        except INVALID_JSON:
            fields = {}
        found = {name: _WHOLE.fullmatch(bytes(fields[name])) for name in _WHOLE_NUMBERS if name in fields}
        plain = {name: Raw(match[1]) for name, match in found.items() if match is not None}
        if not plain:
            raise
        data = msgspec.json.encode(fields | plain)
        return data, decode(data, RequestFields)


def with_model(data: bytes, model: str) -> bytes:
    """The body with its model name replaced."""
    return msgspec.json.encode({**_FIELDS.decode(data), "model": model})


def _measure(prompt: bytes, endpoint: Endpoint) -> tuple[int, int, bool]:
    """Number of prompts, their tokens together, and whether that count is exact. Raises InvalidRequest.

    prompt: JSON, which is not decoded because it may have millions of items.
    """
    if endpoint == "chat" or not prompt.startswith(b"["):
        return 1, max(1, len(prompt) // BYTES_PER_TOKEN), False
    first = prompt[1:].lstrip()[:1]
    if first == b'"':
        num_prompts = sum(1 for _ in islice(_STRING.finditer(prompt), MAX_PROMPTS + 1))
        _check_prompts(num_prompts)
        _check_texts(prompt)
        return num_prompts, max(1, len(prompt) // BYTES_PER_TOKEN), False
    num_lists = prompt.count(b"[") - 1
    if b'"' in prompt or (num_lists and first != b"["):
        raise _mixed_prompts()
    _check_prompts(num_lists)
    return max(1, num_lists), prompt.count(b",") + 1, True


def _check_prompts(num_prompts: int) -> None:
    if num_prompts > MAX_PROMPTS:
        raise InvalidRequest(
            f"'prompt' has more than {MAX_PROMPTS} prompts.", hint="Send them in several requests.", param="prompt"
        )


def _check_texts(prompt: bytes) -> None:
    try:
        _TEXTS.decode(prompt)
    except msgspec.ValidationError:
        raise _mixed_prompts() from None


def _mixed_prompts() -> InvalidRequest:
    return InvalidRequest(
        "'prompt' mixes texts, token ids and lists.", hint="Send a text, texts, ids, or lists of ids.", param="prompt"
    )
