"""The requests that the API takes: OpenAI's fields, and vLLM's extras under vLLM's names.

Bounds stand in the types, so that the OpenAPI description shows exactly what is enforced. What other servers take
beyond these types is listed below them, and `compatibility.py` says what becomes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

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
from powerband.core.structured_outputs import MAX_CHOICES
from powerband.openai.tools import MAX_TOOL_CALLS, MAX_TOOLS, Tool, ToolCall, ToolChoice
from powerband.spec.settings import MAX_ADAPTER_NAME

MAX_PROMPTS = 64
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_LABEL_CHARS = 512
MAX_TEMPLATE_LIST = 1024
MAX_TAGS = 256
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
# What a chat template may be given beside messages; more would be copied several times on the way to its process.
TemplateScalar = bool | int | float | str | None
TemplateValue = TemplateScalar | Annotated[list[TemplateScalar], Meta(max_length=MAX_TEMPLATE_LIST)]

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Nothing = Annotated[list[Any], Meta(max_length=0)]
# A text, a list of token ids, or a list of either; msgspec can only say so loosely.
Prompt = str | list[str | int | list[int]]
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": ["string", "null"]},
        _array({"type": "string"}, MAX_PROMPTS),
        _array(_TOKEN),
        _array(_array(_TOKEN), MAX_PROMPTS),
    ]
}
Biases = Annotated[
    dict[int, Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=MAX_LOGIT_BIAS, extra_json_schema={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"}}),
]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    include_usage: Annotated[bool, Meta(description="Send a last chunk with the usage")] | None = None
    continuous_usage_stats: Annotated[bool, Meta(description="Send the usage so far with every chunk")] | None = None
    include_obfuscation: Annotated[bool, Meta(description="No effect: there is no padding")] | None = None


class TextFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Any text: the default."""


class JsonObjectFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A JSON Schema as OpenAI wraps it. It is enforced whether `strict` or not."""

    name: Label
    schema: dict[str, Any] | bool | None = None  # null: any JSON object
    strict: bool | None = None
    description: str | None = None


class JsonSchemaFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """JSON of a schema."""

    json_schema: JsonSchema


class StructuralTagFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="structural_tag"):
    """Text with tags whose content has a form, as vLLM and xgrammar have it."""

    format: dict[str, Any] | None = None
    structures: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_TAGS)] | None = None
    triggers: Annotated[list[str], Meta(min_length=1, max_length=MAX_TAGS)] | None = None


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """vLLM's way to ask for a form: exactly one of the first six."""

    json: Annotated[dict[str, Any] | str | bool, Meta(description="A JSON Schema")] | None = None
    regex: Annotated[str, Meta(min_length=1, description="Of the whole answer")] | None = None
    choice: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=MAX_CHOICES)] | None = (
        None
    )
    grammar: Annotated[str, Meta(min_length=1, description="In Lark's syntax, or GBNF")] | None = None
    json_object: Annotated[bool, Meta(description="Any JSON object")] | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_any_whitespace: Annotated[bool, Meta(description="JSON without spaces and line ends")] | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: Annotated[str, Meta(min_length=1)] | None = None
    disable_fallback: Annotated[bool, Meta(description="No effect: there is one backend")] | None = None


class SamplingFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What requests that generate have in common in every API. null means the default, everywhere."""

    model: Annotated[str | None, Meta(description="Name of the served model, its default, or of an adapter")] = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    seed: Annotated[int, Meta(ge=-INT64 - 1, le=INT64)] | None = None
    user: Annotated[Label, Meta(description="The tenant of fair-share scheduling and of the prefix cache")] | None = (
        None
    )

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
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1, description="Lower is served first")] | None = None
    cache_salt: Annotated[Label, Meta(description="Only prompts with the same salt share cached prefixes")] | None = (
        None
    )
    deadline_s: (
        Annotated[float, Meta(gt=0, le=86400, description="Seconds from now by which the first token is wanted")] | None
    ) = None


class OpenAIRequest(SamplingFields, forbid_unknown_fields=True, kw_only=True):
    """What requests of OpenAI's APIs have in common, with fields that change nothing here."""

    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    metadata: Annotated[dict[str, Label], Meta(max_length=16, description="No effect: nothing is stored")] | None = None
    store: Annotated[bool, Meta(description="No effect: nothing is stored")] | None = None
    service_tier: Annotated[Label, Meta(description="No effect: there is one tier")] | None = None
    prompt_cache_key: Annotated[Label, Meta(description="No effect: every prefix is looked up")] | None = None
    prompt_cache_retention: Annotated[Label, Meta(description="No effect")] | None = None
    safety_identifier: Annotated[Label, Meta(description="No effect")] | None = None


class GenerationRequest(OpenAIRequest, forbid_unknown_fields=True, kw_only=True):
    """What chat and text completions have in common."""

    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=INT32)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=1, le=INT32, description="Keep only the last tokens")] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
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


class CompletionRequest(GenerationRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of /v1/completions."""

    prompt: Prompt | None  # null, as the empty text: the beginning of a document
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Meta(ge=0, le=MAX_N, description="Only the same value as n")] | None = None
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
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_TOOL_CALLS)] | None = None
    audio: None = None
    function_call: None = None


class ReasoningSwitch(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """As OpenRouter has it. What the model's template and format do not offer has no effect."""

    effort: ReasoningEffort | None = None
    enabled: bool | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=INT32, description="As thinking_token_budget")] | None = None
    exclude: Annotated[bool, Meta(description="true: leave the reasoning out of the answer")] | None = None
    summary: Annotated[Label, Meta(description="No effect")] | None = None


class ChatRequest(GenerationRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, TemplateValue], Meta(max_length=64)] | None = None
    modalities: Annotated[list[Literal["text"]], Meta(min_length=1, max_length=1)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Annotated[bool, Meta(description="false: at most one call")] | None = None
    reasoning_effort: ReasoningEffort | None = None
    thinking_token_budget: (
        Annotated[int, Meta(ge=-1, le=INT32, description="Maximum tokens of reasoning; -1: no limit")] | None
    ) = None
    include_reasoning: Annotated[bool, Meta(description="false: leave the reasoning out of the answer")] | None = None
    reasoning: ReasoningSwitch | None = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of /tokenize: either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, TemplateValue], Meta(max_length=64)] | None = None


class LoadAdapterRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    lora_name: Annotated[str, Meta(min_length=1, max_length=MAX_ADAPTER_NAME, description="What requests call it")]
    lora_path: Annotated[str, Meta(min_length=1, max_length=4096, description="A folder here, or a Hugging Face id")]
    load_inplace: Annotated[bool, Meta(description="Give it a name that is in use")] | None = None


class UnloadAdapterRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    lora_name: Annotated[str, Meta(min_length=1, max_length=MAX_ADAPTER_NAME)]
    lora_int_id: Annotated[int, Meta(description="No effect: the name says which")] | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of /detokenize."""

    tokens: list[Token]
    model: str | None = None
    skip_special_tokens: bool | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that other servers have and this one has not.

    neutral: values that do not ask for it, besides null, false, "", "none", and empty lists and objects.
    """

    what: str  # as the beginning of a sentence
    neutral: tuple[Any, ...] = ()
    instead: str = ""


_TOOLS = "Tool calls are"
_CHATS = "Send a conversation to /v1/chat/completions."
_SAMPLER = "This way of sampling is"
# Fields of OpenAI's API, vLLM, SGLang, llama.cpp and others that ask for something this server cannot do. They are
# errors wherever they ask for it: the answer would be another than the one that was asked for.
NOT_SUPPORTED: Mapping[str, Missing] = {
    "tools": Missing(_TOOLS, instead=_CHATS),
    "tool_choice": Missing(_TOOLS, neutral=("auto",), instead=_CHATS),
    "parallel_tool_calls": Missing(_TOOLS, neutral=(True,), instead=_CHATS),
    "functions": Missing("This name is", instead="Use 'tools'."),
    "function_call": Missing("This name is", neutral=("auto",), instead="Use 'tool_choice'."),
    **{
        name: Missing("This name is", instead=f"Send 'structured_outputs' with '{new}'.")
        for name, new in {
            **{f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")},
            **{"guided_whitespace_pattern": "whitespace_pattern", "structural_tag": "structural_tag"},
            **{"json_schema": "json", "regex": "regex", "grammar": "grammar", "ebnf": "grammar"},
        }.items()
    },
    "modalities": Missing("Output other than text is", neutral=(["text"],)),
    "audio": Missing("Audio is"),
    "input_audio": Missing("Audio is"),
    "image_url": Missing("Images are"),
    "prompt_embeds": Missing("Embeddings as a prompt are", instead="Send text or token ids."),
    "suffix": Missing("Text after the gap (suffix) is", instead="Write the model's own fill-in tokens into 'prompt'."),
    "echo": Missing("Repeating the last message is"),  # of chats; text completions have it
    "prediction": Missing("Predicted output is"),
    "reasoning_effort": Missing("An effort of reasoning is", instead=_CHATS),
    "thinking_token_budget": Missing("A budget of reasoning tokens is", neutral=(-1,), instead=_CHATS),
    "verbosity": Missing("Verbosity is"),
    "web_search_options": Missing("Web search is"),
    "moderation": Missing("Moderation is"),
    "chat_template": Missing("A chat template of one request is", instead="Start with --chat-template FILE."),
    "documents": Missing("Passing documents is", instead="Write them into a message."),
    "use_beam_search": Missing("Beam search is"),
    "num_beams": Missing("Beam search is", neutral=(1,)),
    "logits_processors": Missing("A logits processor of one request is"),
    "custom_logit_processor": Missing("A logits processor of one request is"),
    "logprob_token_ids": Missing("Log-probabilities of chosen tokens are"),
    "return_tokens_as_token_ids": Missing("Token ids as text are", instead="Use 'return_token_ids'."),
    "return_prompt_text": Missing("The rendered prompt is", instead="Send it to /tokenize."),
    "repetition_detection": Missing("Ending an output that repeats itself is"),
    "truncation_side": Missing("Truncation at this side is", neutral=("left",)),
    "lora_path": Missing("An adapter's path in a request is", instead="Name a loaded adapter as 'model'."),
    "lora": Missing("Scaling of adapters in a request is", instead="Name a loaded adapter as 'model'."),
    "min_new_tokens": Missing("This name is", neutral=(0,), instead="Use 'min_tokens'."),
    "max_new_tokens": Missing("This name is", instead="Use 'max_tokens'."),
    "n_predict": Missing("This name is", neutral=(-1,), instead="Use 'max_tokens'."),
    "repeat_penalty": Missing("This name is", neutral=(1,), instead="Use 'repetition_penalty'."),
    "no_repeat_ngram_size": Missing(_SAMPLER, neutral=(0,)),
    "typical_p": Missing(_SAMPLER, neutral=(0, 1)),
    "tfs_z": Missing(_SAMPLER, neutral=(1,)),
    **dict.fromkeys(
        ("top_a", "mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range", "penalty_alpha"),
        Missing(_SAMPLER, neutral=(0,)),
    ),
}
# Of these, requests of the kinds that have such a field may ask for it.
OWN_FIELDS = frozenset(
    (
        *("echo", "documents", "lora_path", "tools", "tool_choice", "parallel_tool_calls"),
        *("reasoning_effort", "thinking_token_budget"),
    )
)
ALWAYS_ASKS = frozenset(("web_search_options",))  # {} asks for a search as it is done by default
# Fields that clients of other servers send and that change nothing here: they are ignored, and the response says so.
IGNORED = frozenset(
    (
        # OpenAI
        *("prompt_cache_options", "extra_body", "extra_headers"),
        # vLLM, SGLang
        *("include_reasoning", "request_id", "session_id", "mm_processor_kwargs", "media_io_kwargs"),
        *("kv_transfer_params", "ec_transfer_params", "vllm_xargs", "length_penalty", "early_stopping"),
        *("spaces_between_special_tokens", "stream_interval", "return_token_offsets", "return_mm_kwargs"),
        "guided_decoding_backend",
        *("routed_experts_prompt_start", "separate_reasoning", "stream_reasoning", "rid", "no_stop_trim"),
        # OpenRouter, DeepSeek, Qwen and others that reason
        *("reasoning", "thinking", "enable_thinking", "think", "thinking_budget"),  # chats take them
        *("provider", "transforms", "route", "models", "usage"),
        # llama.cpp, Ollama
        *("keep_alive", "options", "num_ctx", "cache_prompt", "id_slot", "slot_id", "n_keep", "samplers"),
        *("timings_per_token", "mirostat_tau", "mirostat_eta", "repeat_last_n"),
    )
)
MESSAGE_NOT_SUPPORTED: Mapping[str, Missing] = {
    "function_call": Missing("This name is", instead="Use 'tool_calls'."),
    "audio": Missing("Audio is"),
    "images": Missing("Images are"),
    "prefix": Missing("This name is", instead="Use 'continue_final_message'."),
    "partial": Missing("This name is", instead="Use 'continue_final_message'."),
}
MESSAGE_IGNORED = frozenset(
    (
        *("id", "object", "created", "created_at", "status", "type", "index", "metadata", "annotations", "citations"),
        *("cache_control", "reasoning", "reasoning_details", "reasoning_signature", "thinking", "thinking_blocks"),
        *("provider_specific_fields", "stop_reason", "finish_reason", "token_ids", "parsed"),
    )
)
PART_IGNORED = frozenset(
    ("id", "annotations", "logprobs", "cache_control", "prompt_cache_breakpoint", "citations", "parsed")
)
# Of tools and calls; `index` is what clients have that add deltas up, `parsed…` what they made of an answer themselves.
TOOL_IGNORED = frozenset(
    (
        *("index", "cache_control", "defer_loading", "allowed_callers", "extra_content", "thought_signature"),
        "parsed_arguments",
    )
)
# Parts of a message that are no text, and what they are.
MEDIA_PARTS = {
    **dict.fromkeys(("image_url", "input_image", "image", "image_pil", "image_embeds"), "Images are"),
    **dict.fromkeys(("input_audio", "audio_url", "audio", "audio_embeds"), "Audio is"),
    **dict.fromkeys(("video_url", "video"), "Videos are"),
    **dict.fromkeys(("file", "input_file", "document"), "Files are"),
}
