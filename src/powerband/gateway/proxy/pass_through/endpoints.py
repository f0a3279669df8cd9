"""The table of the endpoints that are passed through: everything that differs between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from powerband.gateway.request import Endpoint

_USE_MAX_TOKENS = "Use 'max_tokens'."
_USE_MAX_OUTPUT_TOKENS = "Use 'max_output_tokens'."
_WHOLE_INPUT = "Send the whole conversation in 'input'"
_STORE_OFF = f"{_WHOLE_INPUT}: this gateway stores no responses. (Started with --store-content, it does.)"
_NO_CONVERSATIONS = f"{_WHOLE_INPUT}, or 'previous_response_id' where the gateway has --store-content."


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEvents:
    """The types of a stream's events. opening: those before any output, which are held back until the first output, so
    that until then another replica can take over. last: those that end a complete stream.
    """

    opening: frozenset[str]
    last: frozenset[str]
    failed: str = ""  # ends a stream that failed


@dataclass(frozen=True, slots=True, kw_only=True)
class PassThroughEndpoint:
    name: Endpoint  # in usage, metrics and logs
    paths: tuple[str, ...]  # the same here and at the replica
    prompts: tuple[str, ...]  # fields with the prompt: a request has exactly one of them
    queries: tuple[str, ...] = ()  # fields whose text the model reads together with each prompt
    before: tuple[str, ...] = ()  # fields that the model reads before the prompt
    limit: str = ""  # the field that limits the output; '': it generates nothing
    requires_limit: bool = False
    results: tuple[str, ...]  # fields of the response: a valid one has one of them
    may_be_list: bool = False  # some engines respond with a list
    events: StreamEvents | None = None  # None: there are no streams
    refused: Mapping[str, str] = field(default_factory=dict)  # field → hint: others' limits, and what needs a store


RESPONSES = PassThroughEndpoint(
    name="responses",
    paths=("/v1/responses",),
    prompts=("input",),
    before=("instructions", "tools"),
    limit="max_output_tokens",
    results=("output",),
    events=StreamEvents(
        opening=frozenset(
            (
                *("response.created", "response.queued", "response.in_progress"),
                *("response.output_item.added", "response.content_part.added", "response.reasoning_part.added"),
            )
        ),
        last=frozenset(("response.completed", "response.incomplete")),
        failed="response.failed",
    ),
    # Other keys' responses could be read by their ids, and a response in the background is never accounted for.
    refused={
        "previous_response_id": _STORE_OFF,
        "conversation": _NO_CONVERSATIONS,
        "background": "Ask for it as a stream.",
        "max_tokens": _USE_MAX_OUTPUT_TOKENS,
        "max_completion_tokens": _USE_MAX_OUTPUT_TOKENS,
        "n_predict": _USE_MAX_OUTPUT_TOKENS,
    },
)
MESSAGES = PassThroughEndpoint(
    name="messages",
    paths=("/v1/messages",),
    prompts=("messages",),
    before=("system", "tools"),
    limit="max_tokens",
    requires_limit=True,
    results=("content",),
    events=StreamEvents(
        opening=frozenset(("message_start", "content_block_start", "ping")), last=frozenset(("message_stop",))
    ),
    refused={
        "max_output_tokens": _USE_MAX_TOKENS,
        "max_completion_tokens": _USE_MAX_TOKENS,
        "n_predict": _USE_MAX_TOKENS,
    },
)
EMBEDDINGS = PassThroughEndpoint(
    name="embeddings", paths=("/v1/embeddings",), prompts=("input", "messages"), results=("data",)
)
POOLING = PassThroughEndpoint(
    name="pooling", paths=("/pooling",), prompts=("input", "messages", "data"), results=("data",)
)
CLASSIFY = PassThroughEndpoint(name="classify", paths=("/classify",), prompts=("input", "messages"), results=("data",))
SCORE = PassThroughEndpoint(
    name="score",
    paths=("/v1/score", "/score"),
    prompts=("text_2", "documents", "items", "data_2"),
    queries=("text_1", "queries", "query", "data_1"),
    results=("data", "scores"),
)
RERANK = PassThroughEndpoint(
    name="rerank",
    paths=("/v1/rerank", "/rerank", "/v2/rerank"),
    prompts=("documents",),
    queries=("query",),
    results=("results",),
    may_be_list=True,  # SGLang
)
ENDPOINTS = (RESPONSES, MESSAGES, EMBEDDINGS, RERANK, SCORE, POOLING, CLASSIFY)
