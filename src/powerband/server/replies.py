"""The responses that the API gives, in exactly OpenAI's shape; fields that were not asked for are left out."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from powerband.openai.tools import ToolCall, ToolCallDelta

Finish = Literal["stop", "length", "tool_calls"]
StopReason = int | str | None  # as in vLLM: the stop token or string that ended a choice; null for other ends
FINGERPRINT = f"powerband-{version('powerband')}"


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """completion_tokens_details: of models that reason."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """The elder form: parallel lists. The first token of an echoed prompt has neither probability nor alternatives."""

    tokens: list[str] = msgspec.field(default_factory=list)
    token_logprobs: list[float | None] = msgspec.field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = msgspec.field(default_factory=list)
    text_offset: list[int] = msgspec.field(default_factory=list)


class RankedToken(msgspec.Struct):
    logprob: float
    rank: int
    decoded_token: str


# One entry per prompt token, by token id; null for the first token, which nothing predicts.
PromptLogprobs = list[dict[int, RankedToken] | None]


class ChatMessage(msgspec.Struct, kw_only=True):
    """content: null for calls without text.

    The reasoning is given under both names that clients read: `reasoning_content` (DeepSeek, SGLang, llama.cpp) and
    `reasoning` (vLLM, OpenRouter).
    """

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    stop_reason: StopReason = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Delta(msgspec.Struct, kw_only=True):
    """Names are those of ChatMessage."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None
    stop_reason: StopReason | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: StopReason | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """Also the chunks of a stream have this form."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "powerband"
    max_model_len: int
    parent: str | None = None  # of an adapter: the model that it belongs to


class UnloadedAdapter(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenized(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    prompt: str


class Version(msgspec.Struct):
    version: str


class Health(msgspec.Struct, kw_only=True):
    status: Annotated[str, Meta(description="ok, or what is in the way")]
    reason: str = ""
    steps: int = 0
    heartbeat_age_s: float = 0.0
    engine_restarts: int = 0
    engine_exit: Annotated[str, Meta(description="why the engine was last restarted; '': it was not")] = ""
    engine_exit_code: Annotated[
        int | None, Meta(description="of the engine's process then; 128 + the number of the signal that ended it")
    ] = None


class AdminState(msgspec.Struct, kw_only=True):
    draining: bool
    paused: bool
    running_http_requests: int


class EffectiveConfig(msgspec.Struct, kw_only=True):
    engine: dict[str, Any]
    server: dict[str, Any]
