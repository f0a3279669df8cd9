"""The requests that the API takes: OpenAI's fields, and vLLM's extras under vLLM's names. Unknown fields are errors.

Bounds stand in the types, so that the OpenAPI description shows exactly what is enforced.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from powerband.core.params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_BYTES,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MIN_REPETITION_PENALTY,
)

MAX_PROMPTS = 64
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_LABEL_CHARS = 512
MAX_RESUMED_TOKENS = 1 << 20
INT32 = 2**31 - 1
INT64 = 2**63 - 1

_TOKEN = {"type": "integer", "minimum": 0, "maximum": INT32}


def _array(items: dict[str, Any], max_items: int | None = None) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1} | ({"maxItems": max_items} if max_items else {})


Count = Annotated[int, Meta(ge=0, le=INT32)]
Token = Annotated[int, Meta(ge=0, le=INT32)]
Label = Annotated[str, Meta(max_length=MAX_LABEL_CHARS)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_BYTES)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]


Nothing = Annotated[list[Any], Meta(max_length=0)]
# A text, a list of token ids, or a list of either; msgspec can only say so loosely.
Prompt = str | list[str | int | list[int]]
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        _array({"type": "string", "minLength": 1}, MAX_PROMPTS),
        _array(_TOKEN),
        _array(_array(_TOKEN), MAX_PROMPTS),
    ]
}
Biases = Annotated[
    dict[int, Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=MAX_LOGIT_BIAS, extra_json_schema={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"}}),
]

# Fields of OpenAI's API that ask for something this server cannot do yet.
# fmt: off
NOT_SUPPORTED = frozenset((
    "audio", "function_call", "functions", "guided_choice", "guided_grammar", "guided_json", "guided_regex",
    "image_url", "input_audio", "json_schema", "prediction", "prompt_embeds", "reasoning_effort",
    "structured_outputs", "use_beam_search", "verbosity", "web_search_options",
))
# fmt: on


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    include_usage: Annotated[bool, Meta(description="Send a last chunk with the usage")] = False
    continuous_usage_stats: Annotated[bool, Meta(description="Send the usage so far with every chunk")] = False


class TextFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]


class GenerationRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What chat and text completions have in common. null means the default, everywhere."""

    not_supported: ClassVar[frozenset[str]] = NOT_SUPPORTED

    model: Annotated[str | None, Meta(description="Name of the served model; default: the only one there is")] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=INT32)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    seed: Annotated[int, Meta(ge=-INT64 - 1, le=INT64)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    user: Annotated[Label, Meta(description="The tenant of fair-share scheduling and of the prefix cache")] | None = (
        None
    )
    metadata: Annotated[dict[str, Label], Meta(max_length=16, description="No effect: nothing is stored")] | None = None
    store: Annotated[bool, Meta(description="No effect: nothing is stored")] | None = None
    service_tier: Annotated[Literal["auto", "default"], Meta(description="No effect: there is one tier")] | None = None
    prompt_cache_key: Annotated[Label, Meta(description="No effect: every prefix is looked up")] | None = None
    safety_identifier: Annotated[Label, Meta(description="No effect")] | None = None

    top_k: Annotated[int, Meta(ge=-1, le=INT32)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(ge=MIN_REPETITION_PENALTY, le=100)] | None = None
    min_tokens: Count | None = None
    stop_token_ids: Annotated[list[Token], Meta(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: Annotated[list[Token], Meta(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS)] | None = None
    bad_words: Annotated[list[StopString], Meta(max_length=MAX_BAD_WORDS)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=1, le=INT32, description="Keep only the last tokens")] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1, description="Lower is served first")] | None = None
    cache_salt: Annotated[Label, Meta(description="Only prompts with the same salt share cached prefixes")] | None = (
        None
    )
    resume_token_ids: (
        Annotated[
            list[Token],
            Meta(
                min_length=1,
                max_length=MAX_RESUMED_TOKENS,
                description="Output that the client has already: go on after it, and answer only with what is new",
            ),
        ]
        | None
    ) = None
    deadline_s: (
        Annotated[float, Meta(gt=0, le=86400, description="Seconds from now by which the first token is wanted")] | None
    ) = None


class CompletionRequest(GenerationRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_N, description="Only the same value as n")] | None = None
    suffix: Annotated[str, Meta(max_length=0, description="Not supported; only empty")] | None = None


class ContentPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One message of a conversation.

    Fields that may only be null or empty are there because clients send back what they got.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Meta(min_length=1, max_length=MAX_PARTS)] | None = None
    name: Label | None = None
    reasoning_content: str | None = None
    tool_call_id: Label | None = None
    refusal: str | None = None
    annotations: Nothing | None = None
    tool_calls: Nothing | None = None
    audio: None = None
    function_call: None = None


class ChatRequest(GenerationRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: TextFormat | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=64)] | None = None
    modalities: Annotated[list[Literal["text"]], Meta(min_length=1, max_length=1)] | None = None
    tools: Nothing | None = None
    tool_choice: Annotated[Literal["none", "auto"], Meta(description="No effect without tools")] | None = None
    parallel_tool_calls: Annotated[bool, Meta(description="No effect without tools")] | None = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of /tokenize: either `prompt` or `messages`."""

    not_supported: ClassVar[frozenset[str]] = NOT_SUPPORTED

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Meta(max_length=64)] | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of /detokenize."""

    tokens: list[Token]
    model: str | None = None
    skip_special_tokens: bool | None = None
