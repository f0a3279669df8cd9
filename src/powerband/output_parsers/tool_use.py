"""What a request says of tools: which there are, which may be called, whether one must be. For HTTP and LLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from powerband.errors import InvalidRequest
from powerband.openai.tools import AllowedTools, FunctionDefinition, NamedTool, Tool, ToolChoice
from powerband.output_parsers.grammar import NO_PARAMETERS, CallableTool, CallRules


@dataclass(frozen=True, slots=True)
class ToolUse:
    """rules: None where the model may not call any."""

    tools: Sequence[FunctionDefinition]
    rules: CallRules | None

    @property
    def for_template(self) -> list[dict[str, Any]]:
        """The tools as chat templates read them. Without those that cannot be called the model does not try to."""
        if self.rules is None:
            return []
        return [
            {"type": "function", "function": {key: value for key, value in fields.items() if key != "strict"}}
            for fields in map(msgspec.to_builtins, self.tools)
        ]

    @property
    def schemas(self) -> Mapping[str, Mapping[str, Any]]:
        return {tool.name: tool.parameters or {} for tool in self.tools}


def tool_use(tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolUse | None:
    """None without tools. Raises InvalidRequest naming the place."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("'tool_choice' asks for a call, but there are no tools.", param="tool_choice")
        return None
    functions = [tool.function for tool in tools]
    places: dict[str, int] = {}
    for index, function in enumerate(functions):
        place = f"tools.{index}.function"
        if function.name in places:
            raise InvalidRequest(
                f"'{place}.name' is {function.name!r}, which is the name of tools.{places[function.name]}, too.",
                hint="Give every tool a name of its own.",
                param=f"{place}.name",
            )
        places[function.name] = index
        if function.parameters and function.parameters.get("type", "object") != "object":
            raise InvalidRequest(
                f"'{place}.parameters' has the type {function.parameters['type']!r}; arguments are an object.",
                hint='Write {"type": "object", "properties": {…}}.',
                param=f"{place}.parameters.type",
            )
    allowed, required = _chosen(functions, choice, places)
    rules = None
    if allowed:
        callable_tools = [
            CallableTool(
                tool.name, _object_schema(tool), tool.strict is True, f"tools.{places[tool.name]}.function.parameters"
            )
            for tool in allowed
        ]
        several = parallel is not False and not isinstance(choice, NamedTool)
        rules = CallRules(callable_tools, required=required, parallel=several)
    return ToolUse(functions, rules)


def _chosen(
    functions: Sequence[FunctionDefinition], choice: ToolChoice | None, places: Mapping[str, int]
) -> tuple[list[FunctionDefinition], bool]:
    """The tools that may be called, and whether one must be."""
    if isinstance(choice, NamedTool):
        return [functions[_place(choice.function.name, places, "tool_choice.function.name")]], True
    if isinstance(choice, AllowedTools):
        asked = choice.allowed_tools
        chosen = {
            _place(tool.function.name, places, f"tool_choice.allowed_tools.tools.{index}.function.name")
            for index, tool in enumerate(asked.tools)
        }
        return [functions[place] for place in sorted(chosen)], asked.mode == "required"
    return ([] if choice == "none" else list(functions)), choice == "required"


def _place(name: str, places: Mapping[str, int], param: str) -> int:
    if name not in places:
        known = ", ".join(list(places)[:10]) + (", …" if len(places) > 10 else "")
        raise InvalidRequest(
            f"'{param}' is {name!r}, which is no tool of the request.", hint=f"Its tools are {known}.", param=param
        )
    return places[name]


def _object_schema(tool: FunctionDefinition) -> dict[str, Any]:
    return {"type": "object", **tool.parameters} if tool.parameters else NO_PARAMETERS
