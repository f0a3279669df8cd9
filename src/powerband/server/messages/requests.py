"""The requests that /v1/messages takes: Anthropic's fields, and our extras under the names that chats have for them.

What other servers take beyond these types is listed below them; `amendment.py` says what becomes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from powerband.core.params import MAX_STOP_STRINGS
from powerband.openai.tools import MAX_TOOLS, CallId, ToolName
from powerband.server.protocol import (
    IGNORED,
    INT32,
    MAX_MESSAGES,
    MAX_PARTS,
    NOT_SUPPORTED,
    Label,
    Missing,
    SamplingFields,
    StopString,
    TemplateValue,
)

MAX_MESSAGES_SENT = MAX_MESSAGES - 1  # `system` becomes a message, too


class _Block(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """cache_control: no effect, because every prefix is looked up."""

    cache_control: dict[str, Any] | None = None


class TextInput(_Block, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="text"):
    text: str
    citations: list[Any] | None = None


class ThinkingInput(_Block, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="thinking"):
    thinking: str
    signature: str | None = None


class RedactedThinkingInput(
    _Block, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="redacted_thinking"
):
    """Only Anthropic's servers can read it: it is left out."""

    data: str


class ToolUseInput(_Block, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="tool_use"):
    id: CallId
    name: Annotated[str, Meta(min_length=1, max_length=512)]
    input: dict[str, Any]
    caller: dict[str, Any] | None = None


class ToolResultInput(_Block, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="tool_result"):
    tool_use_id: CallId
    content: str | Annotated[list[TextInput], Meta(max_length=MAX_PARTS)] | None = None
    is_error: bool | None = None


InputBlock = TextInput | ThinkingInput | RedactedThinkingInput | ToolUseInput | ToolResultInput


class MessageInput(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """An assistant's message at the end is the beginning of the answer, which goes on after it."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[InputBlock], Meta(max_length=MAX_PARTS)]


class ToolDefinition(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """input_schema: a JSON Schema of an object."""

    name: ToolName
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: Annotated[dict[str, Any], Meta(description="No effect")] | None = None


class _Choice(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    disable_parallel_tool_use: bool | None = None


class AutoChoice(_Choice, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="auto"):
    """The model decides."""


class AnyChoice(_Choice, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="any"):
    """It calls some tool."""


class ToolChoiceByName(_Choice, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="tool"):
    """It calls this tool."""

    name: ToolName


class NoneChoice(_Choice, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="none"):
    """It calls none."""


class ThinkingConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """budget_tokens: of the reasoning. display: omitted leaves the reasoning out of the answer."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Meta(ge=1, le=INT32)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class JsonSchemaOutput(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="json_schema"):
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonSchemaOutput | None = None


class RequestMetadata(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    user_id: Annotated[Label, Meta(description="No effect")] | None = None


class CountTokensRequest(SamplingFields, forbid_unknown_fields=True, kw_only=True):
    """Body of /v1/messages/count_tokens: what the model reads. Fields that say how to generate have no effect."""

    messages: Annotated[list[MessageInput], Meta(min_length=1, max_length=MAX_MESSAGES_SENT)]
    system: str | Annotated[list[TextInput], Meta(max_length=MAX_PARTS)] | None = None
    tools: Annotated[list[ToolDefinition], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: AutoChoice | AnyChoice | ToolChoiceByName | NoneChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    cache_control: Annotated[dict[str, Any], Meta(description="No effect")] | None = None
    chat_template_kwargs: Annotated[dict[str, TemplateValue], Meta(max_length=64)] | None = None


class MessagesRequest(CountTokensRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of /v1/messages. max_tokens may be more than the context has room for: the answer ends there, too."""

    max_tokens: Annotated[int, Meta(ge=1, le=INT32)]
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    metadata: RequestMetadata | None = None
    service_tier: Annotated[Label, Meta(description="No effect: there is one tier")] | None = None
    speed: Annotated[Label, Meta(description="No effect: there is one speed")] | None = None


_LIMIT = Missing("This name is", instead="Use 'max_tokens'.")
_OWN: Mapping[str, Missing] = {
    "mcp_servers": Missing("Calling MCP servers is", instead="Offer their tools in 'tools', and call them yourself."),
    "container": Missing("Running code in a container is"),
    "n": Missing("More than one answer is", neutral=(1,)),
    "max_completion_tokens": _LIMIT,
    "max_output_tokens": _LIMIT,
    "stop": Missing("This name is", instead="Use 'stop_sequences'."),
    "input": Missing("This name is", instead="Use 'messages'."),
    "instructions": Missing("This name is", instead="Use 'system'."),
    "response_format": Missing("This name is", instead="Use 'output_config.format'."),
    "output_format": Missing("This name is", instead="Use 'output_config.format'."),
    "reasoning_effort": Missing("This name is", instead="Use 'output_config.effort'."),
    "thinking_token_budget": Missing("This name is", instead="Use 'thinking.budget_tokens'."),
    "parallel_tool_calls": Missing(
        "This name is", neutral=(True,), instead="Use 'tool_choice.disable_parallel_tool_use'."
    ),
    "functions": Missing("This name is", instead="Use 'tools'."),
    "function_call": Missing("This name is", instead="Use 'tool_choice'."),
}
FIELDS_NOT_SUPPORTED: Mapping[str, Missing] = {
    name: missing
    for name, missing in {**NOT_SUPPORTED, **_OWN}.items()
    if name not in MessagesRequest.__struct_fields__
}
# context_management: what Anthropic's servers leave out of a prompt to make it shorter.
FIELDS_IGNORED = IGNORED - set(MessagesRequest.__struct_fields__) | {
    *("context_management", "inference_geo", "diagnostics", "user_profile_id", "workspace_id", "betas"),
    *("anthropic_version", "anthropic_beta"),
}
BLOCK_IGNORED = frozenset(("toolset_name", "caller", "id", "parsed_output"))
MESSAGE_IGNORED = frozenset(("id", "type", "model", "stop_reason", "stop_sequence", "usage", "container"))
TOOL_IGNORED = frozenset(("allowed_callers", "defer_loading", "eager_input_streaming", "input_examples"))
