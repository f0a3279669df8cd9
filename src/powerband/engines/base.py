"""The interface between Powerband and an engine: all that the rest of the code has to know of one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec import Raw

from powerband.engines.capabilities import EngineCapabilities
from powerband.engines.launch import Command, LaunchRequest
from powerband.errors import UsageError
from powerband.spec.deployment import EngineName

# Servers that replicas may be. openai: any other that speaks OpenAI's API, such as Ollama, LM Studio, LocalAI and
# Dynamo: all that is known of it is that GET /v1/models lists what it serves.
ServerName = Literal[EngineName, "llamacpp", "openai"]
# Gauges: requests running and waiting, share of the KV cache in use (0 to 1). Counters: the others.
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
    """A stream whose replica failed, as far as its client has it."""

    model: str  # its name at the replica
    fields: Mapping[str, Raw]  # of the request, as a replica gets it
    is_chat: bool
    max_tokens: int | None
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]  # of the output
    text: str  # of the output; that of the last tokens may be missing
    has_sent_ids: bool  # the client has `token_ids`, too


@dataclass(frozen=True, slots=True)
class Continuation:
    """A request for a completion that continues a stream."""

    fields: Mapping[str, Any]
    kept: int  # output tokens that are in its prompt; the others are generated again
    skipped: str  # text that it begins with and that the client has


def _no_command(_request: LaunchRequest) -> Command:
    raise UsageError("This engine is not started from a plan.", param="engine")


def _no_fields(_tenant: str, _user: str | None, _cache_salt: str | None) -> Mapping[str, str]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAdapter:
    """One engine. The defaults hold for any server that speaks OpenAI's API."""

    name: ServerName
    display_name: str
    owned_by: str = ""  # the owner of its models in GET /v1/models, in lower case

    # To plan and start replicas.
    capabilities: EngineCapabilities = field(default_factory=EngineCapabilities)
    # Raises UsageError for an unsupported setting, EnvironmentFault if the engine or the key is missing.
    command: Callable[[LaunchRequest], Command] = _no_command

    # To watch them.
    ready_path: str = "/health"  # answers 200 when the engine accepts requests
    ready_shows_progress: bool = False  # it answers 503 when steps do not advance, and counts restarts
    config_path: str = ""  # answers {"engine": {"max_num_seqs": …}}; '': there is none
    metrics_path: str = "/metrics"  # '': it has no metrics that are known
    # Names of the same figure, in the order in which they are tried: older versions have other names.
    metrics: Mapping[Metric, tuple[bytes, ...]] = field(default_factory=dict)
    histograms: Mapping[Histogram, bytes] = field(default_factory=dict)

    # To send requests.
    supports_n: bool = False  # it makes as many choices as `n` asks for
    returns_token_ids: bool = False  # `return_token_ids`: a stream has the ids of all tokens
    returns_continuous_usage: bool = False  # `continuous_usage_stats`: chunks have the tokens of their choice so far
    # Tenant, `user` and `cache_salt` of a request → the fields with which tenants share no cached prefix.
    tenant_fields: Callable[[str, str | None, str | None], Mapping[str, str]] = _no_fields
    # Retry-After of a refusal is about that request; others may be accepted at once.
    retry_after_is_per_request: bool = False

    # To continue streams of replicas that failed.
    takes_resume_token_ids: bool = False  # the same request with the ids of the output so far
    # A completion after prompt and output; None: no token is missing. Raises CannotResume. The stream must have had the
    # ids of both, and its text.
    complete_stream: Callable[[BrokenStream, Ask], Awaitable[Continuation | None]] | None = None
    resume_text: str = "a stream that breaks off ends with an error"  # for the log
