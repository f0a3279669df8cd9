"""The interface between Powerband and an engine: everything that the rest of the code knows about it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec import Raw

from powerband.engines.capabilities import EngineCapabilities
from powerband.engines.launch import Command, LaunchRequest
from powerband.errors import UsageError
from powerband.spec.deployment import EngineName

# Servers that a replica may run. openai: any other server with OpenAI's API, such as Ollama, LM Studio, LocalAI and
# Dynamo. Only GET /v1/models is assumed to work there.
ServerName = Literal[EngineName, "llamacpp", "openai"]
# Gauges: requests running and waiting, fraction of the KV cache in use (0 to 1). The others are counters.
Metric = Literal[
    "running", "waiting", "kv_usage", "preemptions", "prefix_queries", "prefix_hits", "prompt_tokens", "output_tokens"
]
Histogram = Literal["ttft", "queue"]  # in seconds
# Method, path and body of a request to a replica → its JSON response. Raises CannotResume when the replica does not
# offer the path, and another exception when it fails.
Ask = Callable[[str, str, Mapping[str, Any] | None], Awaitable[Mapping[str, Any]]]


class CannotResume(Exception):
    """No replica of this engine can continue this stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenStream:
    """A stream whose replica failed, up to where the client received it."""

    model: str  # its name at the replica
    fields: Mapping[str, Raw]  # of the request, as sent to a replica
    is_chat: bool
    max_tokens: int | None
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]  # of the output
    text: str  # of the output; the text of the last tokens may be missing
    has_sent_ids: bool  # the client has received `token_ids`, too


@dataclass(frozen=True, slots=True)
class Continuation:
    """A request for a completion that continues a stream."""

    fields: Mapping[str, Any]
    kept: int  # output tokens that are part of its prompt; later ones are generated again
    skipped: str  # text that the continuation begins with and that the client already has


def _no_command(_request: LaunchRequest) -> Command:
    raise UsageError("This engine is not started from a plan.", param="engine")


def _no_fields(_tenant: str, _user: str | None, _cache_salt: str | None) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAdapter:
    """One engine. The defaults hold for any server with OpenAI's API."""

    name: ServerName
    display_name: str
    owned_by: str = ""  # the owner of its models in GET /v1/models, in lower case

    # To plan and start replicas.
    lists_adapters: bool = False  # GET /v1/models lists LoRA adapters, with the model as their `parent`
    capabilities: EngineCapabilities = field(default_factory=EngineCapabilities)
    # Raises UsageError for an unsupported setting, EnvironmentFault if the engine or the key is missing.
    command: Callable[[LaunchRequest], Command] = _no_command

    # To monitor them.
    ready_path: str = "/health"  # answers 200 when the engine accepts requests
    ready_shows_progress: bool = False  # ready_path answers 503 when steps do not advance, and counts engine restarts
    config_path: str = ""  # answers {"engine": {"max_num_seqs": …}}; '': there is none
    metrics_path: str = "/metrics"  # '': it has no known metrics
    # Names of each metric, in the order in which they are tried: older versions have other names.
    metrics: Mapping[Metric, tuple[bytes, ...]] = field(default_factory=dict)
    histograms: Mapping[Histogram, bytes] = field(default_factory=dict)

    # To send requests.
    endpoints: frozenset[str] | None = None  # paths besides chats and completions that it offers; None: unknown
    supports_n: bool = False  # it generates `n` choices
    returns_token_ids: bool = False  # `return_token_ids`: a stream has the ids of all tokens
    returns_continuous_usage: bool = False  # `continuous_usage_stats`: chunks report their choice's tokens so far
    # Tenant, `user` and `cache_salt` of a request → fields that keep tenants from sharing cached prefixes.
    tenant_fields: Callable[[str, str | None, str | None], Mapping[str, str]] = _no_fields
    # The Retry-After of a rejection (429, 503) is about that request alone; others may be accepted at once.
    retry_after_is_per_request: bool = False

    # To continue streams of replicas that failed.
    takes_resume_token_ids: bool = False  # it accepts the same request with the token ids of the output so far
    # Builds a completion that continues prompt and output; None: no token is missing. Raises CannotResume. Needs the
    # stream's text, and the ids of prompt and output.
    complete_stream: Callable[[BrokenStream, Ask], Awaitable[Continuation | None]] | None = None
    resume_text: str = "a stream that breaks off ends with an error"  # for the log

    def may_offer(self, path: str) -> bool:
        return self.endpoints is None or path in self.endpoints
