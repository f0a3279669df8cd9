"""The requests that /v1/responses takes: OpenAI's fields, and our extras under the names that chats have for them.

What other servers take beyond these types is listed below them; `amendment.py` says what becomes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from powerband.core.params import MAX_LOGPROBS
from powerband.openai.tools import MAX_TOOLS, CallId, ToolName
from powerband.server.protocol import (
    IGNORED,
    INT32,
    MAX_MESSAGES,
    MAX_PARTS,
    NOT_SUPPORTED,
    JsonObjectFormat,
    Label,
    Missing,
    OpenAIRequest,
    ReasoningEffort,
    TemplateValue,
    TextFormat,
)

MAX_ITEMS = MAX_MESSAGES - 1  # `instructions` become a message, too
Summary = Literal["auto", "concise", "detailed"]


class InputText(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="input_text"):
    text: str


class OutputTextInput(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class RefusalInput(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="refusal"):
    refusal: str


class ChatText(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Of Chat Completions: taken, because clients mix them up."""

    text: str


Parts = Annotated[list[InputText | OutputTextInput | RefusalInput | ChatText], Meta(max_length=MAX_PARTS)]


class _Item(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """id, status: of an item that was output; no effect."""

    id: Label | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(_Item, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="message"):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    phase: Annotated[Label, Meta(description="No effect")] | None = None


class FunctionCallItem(_Item, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="function_call"):
    """arguments: a JSON object as text."""

    call_id: CallId
    name: Annotated[str, Meta(min_length=1, max_length=512)]
    arguments: str


class FunctionResultItem(_Item, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="function_call_output"):
    call_id: CallId
    output: str | Parts


class SummaryPart(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="summary_text"):
    text: str


class ReasoningPart(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="reasoning_text"):
    text: str


class ReasoningItem(_Item, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model reads is `content`, or without that `summary`."""

    summary: Annotated[list[SummaryPart], Meta(max_length=MAX_PARTS)] | None = None
    content: Annotated[list[ReasoningPart], Meta(max_length=MAX_PARTS)] | None = None
    encrypted_content: Annotated[str, Meta(max_length=0)] | None = None


InputItem = MessageItem | FunctionCallItem | FunctionResultItem | ReasoningItem


class FunctionTool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="function"):
    """parameters: a JSON Schema of an object; left out, the function has none."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    name: ToolName


class AllowedFunctions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="allowed_tools"):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Meta(min_length=1, max_length=MAX_TOOLS)]


class JsonSchemaText(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="json_schema"):
    """JSON of a schema. It is enforced whether `strict` or not."""

    name: Label
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    format: TextFormat | JsonObjectFormat | JsonSchemaText | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """summary: the reasoning is sent as the summary, since no other one is written."""

    effort: ReasoningEffort | None = None
    summary: Summary | None = None
    generate_summary: Annotated[Summary, Meta(description="The former name of summary")] | None = None


class ResponseStreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    include_obfuscation: Annotated[bool, Meta(description="No effect: there is no padding")] | None = None


Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
]


class ResponsesRequest(OpenAIRequest, forbid_unknown_fields=True, kw_only=True):
    """Body of /v1/responses, and of /v1/responses/input_tokens, which only counts what the model reads."""

    input: str | Annotated[list[InputItem], Meta(min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=INT32)] | None = None
    max_tool_calls: (
        Annotated[int, Meta(ge=0, le=INT32, description="No effect: there are no built-in tools")] | None
    ) = None
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions | None = None
    parallel_tool_calls: Annotated[bool, Meta(description="false: at most one call")] | None = None
    text: TextConfig | None = None
    reasoning: ReasoningOptions | None = None
    include: (
        Annotated[
            list[Includable],
            Meta(max_length=16, description="Only message.output_text.logprobs has an effect"),
        ]
        | None
    ) = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    truncation: (
        Annotated[
            Literal["auto", "disabled"],
            Meta(description="auto: leave out the oldest items of an input that is longer than the context"),
        ]
        | None
    ) = None
    stream_options: ResponseStreamOptions | None = None
    thinking_token_budget: (
        Annotated[int, Meta(ge=-1, le=INT32, description="Maximum tokens of reasoning; -1: no limit")] | None
    ) = None
    chat_template_kwargs: Annotated[dict[str, TemplateValue], Meta(max_length=64)] | None = None


_STORED, _HOSTED = "Nothing is stored here, so this is", "Hosted tools are"
_WHOLE_INPUT = "Send the whole conversation in 'input'."
_OUTPUT_LIMIT = Missing("This name is", instead="Use 'max_output_tokens'.")
_OWN: Mapping[str, Missing] = {
    "previous_response_id": Missing(_STORED, instead=_WHOLE_INPUT),
    "conversation": Missing(_STORED, instead=_WHOLE_INPUT),
    "prompt": Missing("Stored prompts are", instead="Send the text in 'instructions' or 'input'."),
    "background": Missing("Running in the background is", instead="Ask for a stream."),
    "background_options": Missing("Running in the background is"),
    "context_management": Missing("Compaction is", instead="Send a shorter 'input'."),
    "moderation": Missing("Moderation is"),
    "image": Missing("Images are"),
    "n": Missing("More than one answer is", neutral=(1,)),
    "messages": Missing("This name is", instead="Use 'input', or /v1/chat/completions."),
    "max_tokens": _OUTPUT_LIMIT,
    "max_completion_tokens": _OUTPUT_LIMIT,
    "response_format": Missing("This name is", instead="Use 'text.format'."),
    "reasoning_effort": Missing("This name is", instead="Use 'reasoning.effort'."),
    "verbosity": Missing("This name is", instead="Use 'text.verbosity'."),
    "logprobs": Missing("This name is", instead="Use 'top_logprobs' with message.output_text.logprobs in 'include'."),
    "functions": Missing("This name is", instead="Use 'tools'."),
    "function_call": Missing("This name is", instead="Use 'tool_choice'."),
}
FIELDS_NOT_SUPPORTED: Mapping[str, Missing] = {
    name: missing
    for name, missing in {**NOT_SUPPORTED, **_OWN}.items()
    if name not in ResponsesRequest.__struct_fields__
}
FIELDS_IGNORED = IGNORED - set(ResponsesRequest.__struct_fields__) | {"access_programs"}
ITEM_IGNORED = frozenset(
    ("encrypted_content", "created_by", "name", "caller", "namespace", "async", "parsed_arguments")
)
TOOL_IGNORED = frozenset(("allowed_callers", "output_schema", "cache_control"))
_STORE = Missing("A store of items is", instead="Send the item itself.")
_HOSTED_TOOLS = Missing("Hosted tools are", instead="Offer a function, and call it yourself.")
_CUSTOM = Missing("Custom tools are", instead="Offer a function with one parameter.")
_COMPACTION = Missing("Compaction is")
# The types of items that are kept somewhere, and of tools, their choices, calls and outputs that OpenAI has.
STORED: Mapping[str, Missing] = {
    "item_reference": _STORE,
    "compaction": _COMPACTION,
    "compaction_trigger": _COMPACTION,
    "configuration_update": Missing("Changing the settings in a conversation is"),
    "additional_tools": Missing("Adding tools in a conversation is", instead="Send them in 'tools'."),
}
HOSTED: Mapping[str, Missing] = {
    **dict.fromkeys(("custom", "custom_tool_call", "custom_tool_call_output"), _CUSTOM),
    **dict.fromkeys(
        (
            *("file_search", "file_search_call", "web_search", "web_search_2025_08_26", "web_search_call"),
            *("web_search_preview", "web_search_preview_2025_03_11", "code_interpreter", "code_interpreter_call"),
            *("computer", "computer_use", "computer_use_preview", "computer_call", "computer_call_output"),
            *("image_generation", "image_generation_call", "mcp", "mcp_list_tools", "mcp_call"),
            *("mcp_approval_request", "mcp_approval_response", "local_shell", "local_shell_call"),
            *("local_shell_call_output", "shell", "shell_call", "shell_call_output", "apply_patch"),
            *("apply_patch_call", "apply_patch_call_output", "tool_search", "tool_search_call", "tool_search_output"),
            *("namespace", "programmatic_tool_calling", "program", "program_output"),
        ),
        _HOSTED_TOOLS,
    ),
}
