"""Requests for /v1/messages as clients write them, in the form that requests.py knows; see compatibility.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from powerband.errors import InvalidRequest
from powerband.server.compatibility import Amendment, Path, check_type, joined
from powerband.server.messages.requests import (
    BLOCK_IGNORED,
    FIELDS_IGNORED,
    FIELDS_NOT_SUPPORTED,
    MESSAGE_IGNORED,
    TOOL_IGNORED,
    AnyChoice,
    AutoChoice,
    MessageInput,
    NoneChoice,
    OutputConfig,
    RedactedThinkingInput,
    RequestMetadata,
    TextInput,
    ThinkingConfig,
    ThinkingInput,
    ToolChoiceByName,
    ToolDefinition,
    ToolResultInput,
    ToolUseInput,
)
from powerband.server.protocol import Missing

_BLOCKS: Mapping[str, Any] = {
    "text": TextInput,
    "tool_use": ToolUseInput,
    "tool_result": ToolResultInput,
    "thinking": ThinkingInput,
    "redacted_thinking": RedactedThinkingInput,
}
_TEXT: Mapping[str, Any] = {"text": TextInput}
_CHOICES: Mapping[str, Any] = {"auto": AutoChoice, "any": AnyChoice, "tool": ToolChoiceByName, "none": NoneChoice}
_OBJECTS: Mapping[str, Any] = {
    "thinking": ThinkingConfig,
    "output_config": OutputConfig,
    "metadata": RequestMetadata,
}
_SERVER_TOOLS = Missing("Anthropic's own tools are", instead="Offer a tool with an input_schema.")
_RESULTS = "_tool_result"  # the end of the types of server tools' results
_OTHER_BLOCKS: Mapping[str, Missing] = {
    "server_tool_use": _SERVER_TOOLS,
    "search_result": Missing("Search results as blocks are", instead="Write them into a text."),
    "container_upload": Missing("Files are"),
    "fallback": Missing("Falling back to other models is"),
    "compaction": Missing("Compaction is"),
}


class MessagesAmendment(Amendment):
    """See Amendment."""

    def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        self._check_fields(body, self._kind, (), "", FIELDS_NOT_SUPPORTED, FIELDS_IGNORED)
        self._amend_values(body)
        texts = body.get("stop_sequences")
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            body["stop_sequences"] = [text for text in texts if text]
        for name, kind in _OBJECTS.items():
            if isinstance(fields := body.get(name), dict):
                self._check_fields(fields, kind, (name,), f"{name}.")
        self._amend_blocks(body, ("system",), _TEXT)
        if isinstance(messages := body.get("messages"), list):
            for index, message in enumerate(messages):
                if isinstance(message, dict):
                    path = ("messages", index)
                    self._check_fields(message, MessageInput, path, "messages.", {}, MESSAGE_IGNORED)
                    self._amend_blocks(message, (*path, "content"), _BLOCKS)
        if isinstance(tools := body.get("tools"), list):
            for index, tool in enumerate(tools):
                if isinstance(tool, dict):
                    self._amend_tool(tool, ("tools", index))
        if isinstance(choice := body.get("tool_choice"), dict):
            kind = check_type(choice, ("tool_choice",), _CHOICES, {})
            self._check_fields(choice, _CHOICES[kind], ("tool_choice",), "tool_choice.")
        return body

    def _amend_blocks(self, fields: dict[str, Any], path: Path, known: Mapping[str, Any]) -> None:
        """The blocks of the field at the end of `path`."""
        blocks = fields.get(str(path[-1]))
        for index, block in enumerate(blocks if isinstance(blocks, list) else ()):
            if not isinstance(block, dict):
                continue
            place = (*path, index)
            if isinstance(name := block.get("type"), str):
                self._refuse_media(name, place)
                if name.endswith(_RESULTS):
                    block["type"] = name = "server_tool_use"
            kind = known[check_type(block, place, known, _OTHER_BLOCKS)]
            self._check_fields(block, kind, place, "messages.content.", {}, BLOCK_IGNORED - set(kind.__struct_fields__))
            if kind is ToolResultInput:
                self._amend_blocks(block, (*place, "content"), _TEXT)

    def _amend_tool(self, tool: dict[str, Any], path: Path) -> None:
        kind = tool.get("type")
        if isinstance(kind, str) and kind != "custom":
            raise InvalidRequest(
                f"'{joined(path)}' is of type {kind[:60]}. {_SERVER_TOOLS.what} not available on this server.",
                hint=_SERVER_TOOLS.instead,
                param=f"{joined(path)}.type",
                code="unsupported_parameter",
            )
        self._check_fields(tool, ToolDefinition, path, "tools.", {}, TOOL_IGNORED)
