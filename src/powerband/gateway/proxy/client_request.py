"""What the gateway reads of a client's request, and the body that a replica gets in its place.

Fields that the gateway does not know pass through as they are: the replica judges them.
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
from powerband.gateway.accounts.limits import room_for_output
from powerband.gateway.request import ANONYMOUS, Endpoint, GatewayRequest
from powerband.gateway.routes import ReplicaAddress
from powerband.openai.fields import StreamOptionFields
from powerband.web.body import decode
from powerband.web.body_budget import SMALL_BYTES

PATHS: dict[Endpoint, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
}
COMPLETION_TOKENS = 16  # that a completion has at most where it names no limit: OpenAI's default, and the engines'
# Of one token in an answer's JSON, at most: the longest of a vocabulary are runs of 128 blanks or so, and a control
# character takes six bytes; with log-probabilities it stands there with twenty others.
_TOKEN_BYTES = 1024
_TOKEN_BYTES_WITH_LOGPROBS = 64 << 10
MAX_TOKENS = 1 << 20  # of one choice, where the request names no limit: no model has a longer context
_SLACK_PROMPT_TOKENS = 1 << 16
_PROMPT_BYTES = 32  # of an answer, for each of the prompt: its ids, and itself
_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_TRUE = Raw(b"true")
MAX_PROMPTS = 1024  # of one request
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"')
_TEXTS = msgspec.json.Decoder(list[str])
# Beside the prompt, what engines compute (SGLang and Ollama fill in before a suffix); what they
# do not, however long; and how long a field may be of which that is not known.
_FED = frozenset(("suffix", "resume_token_ids", "documents", "tools"))
_NOT_FED = frozenset(
    (
        *("prompt", "logit_bias", "metadata", "allowed_token_ids", "bad_words", "stop", "stop_token_ids", "user"),
        *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    )
)
_SHORT_FIELD = 256


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
    prompt_embeds: Raw | UnsetType = UNSET
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
        if self.prompt_embeds is not UNSET and bytes(self.prompt_embeds) != b"null":  # each makes choices of its own
            raise InvalidRequest("'prompt_embeds' is not supported.", hint="Send 'prompt'.", param="prompt_embeds")
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


class UnsuitableReplica(Exception):
    """The request needs a replica of another engine. error: what to raise where there is none."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


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
        self.max_prompt_tokens = self.prompt_tokens + self._fed_bytes() if is_exact else max(size, self.prompt_tokens)
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

    def _fed_bytes(self) -> int:
        """Of what engines may compute beside a prompt of ids: suffixes, and long fields not known here."""
        fed = {name: len(bytes(value)) for name, value in self._fields.items() if name not in _NOT_FED}
        return sum(size for name, size in fed.items() if name in _FED or size > _SHORT_FIELD)

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
        """What separates prompts in caches, besides their own text."""
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
        output_tokens = (default if fields.limit is None else fields.limit) * self.num_answers
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
            answers=self.num_answers,
            stream=self.is_stream,
            priority=max(fields.priority or 0, best_priority),
            arrival_s=now_s,
            deadline_s=None if fields.deadline_s is None else now_s + fields.deadline_s,
            session=headers.get("x-session-id", "")[:256] or (fields.prompt_cache_key or "")[:256],
        )

    def returns_token_ids(self, replica: ReplicaAddress) -> bool:
        """Whether its stream says the ids of all tokens: to resume after them, and to count them."""
        return self.is_stream and self.fields.limit != 0 and replica.adapter.returns_token_ids

    def returns_usage(self, replica: ReplicaAddress) -> bool:
        """Whether each chunk of its stream says how many tokens its choice has so far."""
        return self.is_stream and replica.adapter.returns_continuous_usage

    def upstream_body(self, replica: ReplicaAddress, tenant: str, resumed: Sequence[int] = ()) -> bytes:
        """resumed: ids of the output tokens that the client has, for our own engine to continue from.

        Raises UnsuitableReplica when the client has some that this replica could not go on after.
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
        # Waiting happens here: an engine whose queue knows no priorities would refuse them.
        changed = fields.pop("priority", None) is not None
        changed = fields.pop("deadline_s", None) is not None or changed
        if self.fields.model != replica.model:
            fields["model"] = _raw(replica.model)
            changed = True
        if tenant != ANONYMOUS or "user" in fields or "cache_salt" in fields:  # a client must not use a key's name
            changed = True
            isolating = replica.adapter.tenant_fields(tenant, self.fields.user, self.fields.cache_salt)
            for name, value in isolating.items():
                fields[name] = _raw(value)
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
    """At most, of its texts: an escape like \\u4e00 has six bytes, and stands for three at most."""
    # Behind an escaped backslash it is none; such pairs of it are all left out, so that the result is never too low.
    num_escapes = prompt.count(b"\\u") - prompt.count(b"\\\\u")
    return len(prompt) - 3 * max(num_escapes, 0)


def _measure(prompt: bytes, endpoint: Endpoint) -> tuple[int, int, bool]:
    """Prompts, about how many tokens they have together, and whether that is exact. Raises InvalidRequest.

    prompt: JSON. Nothing is built of it: it may have millions of items.
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
        raise InvalidRequest(
            "'prompt' mixes texts, token ids and lists.",
            hint="Send a text, texts, ids, or lists of ids.",
            param="prompt",
        )
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
    except msgspec.ValidationError as problem:
        raise InvalidRequest(f"'prompt' is no list of texts: {problem}.", param="prompt") from None
