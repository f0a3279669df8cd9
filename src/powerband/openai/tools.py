"""Tools as requests define them, and calls of tools as messages carry them: OpenAI's types."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MAX_TOOLS = 512
MAX_TOOL_CALLS = 1024  # of one message
MAX_TOOL_NAME_CHARS = 128
# OpenAI's names, and those of MCP servers, which may have dots and slashes.
TOOL_NAME = r"^[A-Za-z0-9_.:/-]+$"

ToolName = Annotated[str, Meta(min_length=1, max_length=MAX_TOOL_NAME_CHARS, pattern=TOOL_NAME)]
CallId = Annotated[str, Meta(min_length=1, max_length=512)]


class FunctionDefinition(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """parameters: a JSON Schema of an object; left out, the function has none."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Literal["function"] = "function"
    function: FunctionDefinition


class FunctionName(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: ToolName


class NamedTool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="function"):
    """`tool_choice`: call this tool."""

    function: FunctionName


class AllowedTool(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Literal["function"] = "function"
    function: FunctionName


class AllowedToolsMode(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="allowed_tools"):
    """`tool_choice`: the model sees all tools and may call these."""

    allowed_tools: AllowedToolsMode


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """arguments: a JSON object as text. The name is the model's: it need not be that of a tool."""

    name: Annotated[str, Meta(min_length=1, max_length=512)]
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    id: CallId
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """name: with the first delta of a call; arguments: the next piece of their text."""

    name: str | None = None
    arguments: str = msgspec.field(default_factory=str)


class ToolCallDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A piece of a call in a stream. Deltas of one index are one call; the first has its id, type and name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta
