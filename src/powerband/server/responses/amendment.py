"""Requests for /v1/responses as clients write them, in the form that requests.py knows; see compatibility.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from powerband.server.compatibility import Amendment, Path, check_type, not_supported_error
from powerband.server.protocol import NOT_SUPPORTED, PART_IGNORED
from powerband.server.responses.requests import (
    FIELDS_IGNORED,
    FIELDS_NOT_SUPPORTED,
    HOSTED,
    ITEM_IGNORED,
    STORED,
    TOOL_IGNORED,
    ChatText,
    FunctionCallItem,
    FunctionResultItem,
    FunctionTool,
    InputText,
    MessageItem,
    OutputTextInput,
    ReasoningItem,
    ReasoningOptions,
    RefusalInput,
    ResponseStreamOptions,
    TextConfig,
)

_ITEMS: Mapping[str, Any] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionResultItem,
    "reasoning": ReasoningItem,
}
_PARTS: Mapping[str, Any] = {
    "input_text": InputText,
    "output_text": OutputTextInput,
    "refusal": RefusalInput,
    "text": ChatText,
}
_OBJECTS: Mapping[str, Any] = {
    "text": TextConfig,
    "reasoning": ReasoningOptions,
    "stream_options": ResponseStreamOptions,
}


class ResponsesAmendment(Amendment):
    """See Amendment."""

    def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        self._check_fields(body, self._kind, (), "", FIELDS_NOT_SUPPORTED, FIELDS_IGNORED)
        self._amend_values(body)
        if isinstance(text := body.get("text"), dict) and text.get("verbosity") not in (None, "medium"):
            raise not_supported_error("text.verbosity", NOT_SUPPORTED["verbosity"])
        for name, kind in _OBJECTS.items():
            if isinstance(fields := body.get(name), dict):
                self._check_fields(fields, kind, (name,), f"{name}.")
        if isinstance(items := body.get("input"), list):
            for index, item in enumerate(items):
                if isinstance(item, dict):
                    self._amend_item(item, ("input", index))
        if isinstance(tools := body.get("tools"), list):
            for index, tool in enumerate(tools):
                if isinstance(tool, dict):
                    self._amend_tool(tool, ("tools", index))
        choice = body.get("tool_choice")
        if isinstance(choice, dict):
            check_type(choice, ("tool_choice",), ("function", "allowed_tools"), HOSTED)
        return body

    def _amend_item(self, item: dict[str, Any], path: Path) -> None:
        if item.get("type") is None and "role" in item:
            item["type"] = "message"
        kind = check_type(item, path, _ITEMS, {**STORED, **HOSTED})
        self._check_fields(item, _ITEMS[kind], path, "input.", {}, ITEM_IGNORED - {*_ITEMS[kind].__struct_fields__})
        for name in ("content", "output"):
            parts = item.get(name)
            if isinstance(parts, list) and kind != "reasoning":
                for index, part in enumerate(parts):
                    if isinstance(part, dict):
                        self._amend_part(part, (*path, name, index))

    def _amend_part(self, part: dict[str, Any], path: Path) -> None:
        if isinstance(kind := part.get("type"), str):
            self._refuse_media(kind, path, "input_text")
        kind = check_type(part, path, _PARTS, {})
        known = _PARTS[kind]
        self._check_fields(part, known, path, "input.content.", {}, PART_IGNORED - {*known.__struct_fields__})

    def _amend_tool(self, tool: dict[str, Any], path: Path) -> None:
        check_type(tool, path, ("function",), HOSTED)
        if isinstance(tool.get("function"), dict) and "name" not in tool:  # as in Chat Completions
            tool |= tool.pop("function")
        self._check_fields(tool, FunctionTool, path, "tools.", {}, TOOL_IGNORED)
