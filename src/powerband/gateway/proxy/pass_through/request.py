"""A request that is passed through, as the gateway reads it, and the body that it sends to a replica instead.

Unknown fields pass through unchanged; the replica validates them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw

from powerband.engines.powerband import MAX_LABEL_CHARS
from powerband.errors import InvalidRequest
from powerband.gateway.proxy.pass_through.endpoints import PassThroughEndpoint
from powerband.gateway.proxy.pass_through.prompt_size import measure
from powerband.gateway.proxy.request_fields import (
    SLACK_PROMPT_TOKENS,
    UnsuitableReplica,
    as_raw,
    asks_for_nothing,
    capped,
    check_case,
    max_response_bytes,
    without_padding,
)
from powerband.gateway.request import ANONYMOUS, GatewayRequest
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.context_lengths import MAX_TOKENS
from powerband.openai.chunks import FIELDS
from powerband.web.body import decode
from powerband.web.errors import HttpError

_Tokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Label = Annotated[str, Meta(max_length=MAX_LABEL_CHARS)]
_COUNTS = ("n", "best_of", "n_cmpl")  # of choices: these endpoints have one
_IMAGES = (b"_url", b'"source"')  # replicas may fetch them


class PassThroughFields(msgspec.Struct):
    """The fields that the gateway reads."""

    model: str | None = None
    stream: bool | None = None
    max_tokens: _Tokens | None = None
    max_output_tokens: _Tokens | None = None
    encoding_format: Any = None
    store: Any = None
    user: _Label | None = None
    cache_salt: _Label | None = None
    prompt_cache_key: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    deadline_s: Annotated[float, Meta(gt=0, le=86400)] | None = None


_NAMES = frozenset(PassThroughFields.__struct_fields__)


class PassThroughRequest:
    """A parsed client request. `request`: the form for queue and limits. `upstream_body`: the body for a replica."""

    num_prompts = num_choices = num_sequences = 1

    def __init__(self, data: bytes, endpoint: PassThroughEndpoint, path: str) -> None:
        """Raises InvalidRequest."""
        self.path = path
        self.endpoint = endpoint.name
        self._endpoint = endpoint
        self.fields = decode(data, PassThroughFields)
        data = without_padding(data)
        self._fields: dict[str, Raw] = FIELDS.decode(data)
        check_case(self._fields, {*_NAMES, *endpoint.refused, *endpoint.prompts, *endpoint.queries, *_COUNTS})
        self._check()
        self.size = len(data)
        self.prompt, self.prompt_tokens, self.max_prompt_tokens = measure(endpoint, self._fields)
        self.max_prompt_usage = self.max_prompt_tokens + SLACK_PROMPT_TOKENS
        if any(mark in data for mark in _IMAGES):
            self.max_prompt_usage = max(self.max_prompt_usage, MAX_TOKENS)
        self.contexts: Mapping[str, int | None] = {}  # context length by replica, as far as known, for the cap
        self.cap: int | None = None  # on the output of a request without a limit

    def _check(self) -> None:
        """Raise InvalidRequest for fields with which the response could not be limited, read or kept apart."""
        fields, endpoint = self._fields, self._endpoint
        for name, hint in endpoint.refused.items():
            if name in fields and not asks_for_nothing(fields[name]):
                raise InvalidRequest(f"'{name}' is not supported at {self.path}.", hint=hint, param=name)
        for name in _COUNTS:
            if name in fields and not asks_for_nothing(fields[name]) and bytes(fields[name]) != b"1":
                raise InvalidRequest(f"'{name}' is not supported at {self.path}.", hint="Leave it out.", param=name)
        if endpoint.requires_limit and self._requested_limit is None:
            raise InvalidRequest(f"'{endpoint.limit}' is missing.", param=endpoint.limit)
        encoding = self.fields.encoding_format
        if isinstance(encoding, str) and encoding.startswith("bytes"):
            raise InvalidRequest(
                f"'encoding_format' is {encoding[:20]!r}: the gateway passes on JSON only.",
                hint="Use float or base64.",
                param="encoding_format",
            )

    @property
    def generates(self) -> bool:
        return bool(self._endpoint.limit)

    @property
    def is_stream(self) -> bool:
        return bool(self.fields.stream) and self._endpoint.events is not None

    @property
    def _requested_limit(self) -> int | None:
        limit: int | None = getattr(self.fields, self._endpoint.limit) if self.generates else 0
        return limit

    @property
    def limit(self) -> int | None:
        """Maximum output tokens: as requested, or as the key's limits allow; None: up to the context."""
        return self.cap if self._requested_limit is None else self._requested_limit

    @property
    def max_response_bytes(self) -> int:
        """Upper bound of a valid response's size; without a limit, and of vectors, practically none."""
        if not self.generates:
            return 1 << 62
        has_logprobs = any(name in self._fields for name in ("top_logprobs", "include"))
        return max_response_bytes(self._requested_limit, has_logprobs=has_logprobs, prompt_bytes=self.size)

    @property
    def prompt_salt(self) -> bytes:
        """Fields that precede the prompt in prefix caches, or separate equal prompts."""
        names = (*self._endpoint.before, "cache_salt")
        return b"".join(bytes(self._fields[name]) for name in names if name in self._fields)

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
        fields, now_s, limit = self.fields, time.monotonic(), self._requested_limit
        output_tokens = default_output_tokens if limit is None else limit
        return GatewayRequest(
            id=id,
            endpoint=self.endpoint,
            model=model,
            tenant=tenant,
            prompt_tokens=self.prompt_tokens,
            output_tokens=output_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            max_output_tokens=output_tokens,
            is_open_ended=limit is None,
            stream=self.is_stream,
            priority=max(fields.priority or 0, best_priority),
            arrival_s=now_s,
            deadline_s=None if fields.deadline_s is None else now_s + fields.deadline_s,
            session=headers.get("x-session-id", "")[:256] or (fields.prompt_cache_key or "")[:256],
        )

    def upstream_body(self, replica: ReplicaAddress, tenant: str) -> bytes:
        """The body to send to a replica. Raises UnsuitableReplica if its engine lacks the endpoint."""
        if not replica.adapter.may_offer(self.path):
            raise UnsuitableReplica(lacks_endpoint(replica, self.path))
        fields: dict[str, Raw] = {
            name: value for name, value in self._fields.items() if name not in ("priority", "deadline_s")
        }
        fields["model"] = as_raw(replica.model)
        if tenant != ANONYMOUS or "user" in fields or "cache_salt" in fields:  # no client may use another key's cache
            isolating = replica.adapter.tenant_fields(tenant, self.fields.user, self.fields.cache_salt)
            fields |= {name: as_raw(value) for name, value in isolating.items()}
        if self.endpoint == "responses":
            fields["store"] = as_raw(False)  # nobody could read it
        if self.cap is not None and self._requested_limit is None:
            context = self.contexts.get(replica.id) or MAX_TOKENS
            fields[self._endpoint.limit] = as_raw(capped(self.cap, context, self.max_prompt_tokens))
        return msgspec.json.encode(fields)


def lacks_endpoint(replica: ReplicaAddress, path: str, reported: str = "") -> HttpError:
    """reported: what the replica said, if it was asked."""
    shown = f" It reports: {reported}" if reported else ""
    return HttpError(404, "not_found", f"The model's engine, {replica.adapter.display_name}, has no {path}.{shown}")
