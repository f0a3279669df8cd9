"""Requests as clients of other servers write them, in the form that protocol.py knows.

Called only for bodies that the types do not take as they are, so that it costs other requests nothing.

| a field that                                  | becomes                                          |
|-----------------------------------------------|--------------------------------------------------|
| asks for something this server cannot do      | an error that names it (`unsupported_parameter`) |
| is known and changes nothing here             | ignored, and named in `X-Ignored-Fields`         |
| is unknown and null                           | left out: it asks for nothing                    |
| is unknown                                    | an error, or ignored (`--unknown-fields ignore`) |
| says the same in another form                 | our form                                         |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, get_args

import msgspec

from powerband.errors import InvalidRequest
from powerband.openai.fields import PROMPT_PATHS
from powerband.openai.tools import FunctionCall, FunctionDefinition, Tool, ToolCall
from powerband.server.protocol import (
    ALWAYS_ASKS,
    IGNORED,
    MEDIA_PARTS,
    MESSAGE_IGNORED,
    MESSAGE_NOT_SUPPORTED,
    NOT_SUPPORTED,
    OWN_FIELDS,
    PART_IGNORED,
    TOOL_IGNORED,
    ContentPart,
    Message,
    Missing,
    ReasoningEffort,
    ReasoningSwitch,
    StreamOptions,
)
from powerband.web.body import unknown_field
from powerband.web.field_types import field_names, whole_number_fields

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING_PARTS = ("thinking", "reasoning")
_REASONING_NAMES = ("reasoning", "thinking")  # of a message; ours is reasoning_content
_SWITCHES = ("thinking", "enable_thinking", "think")  # of a request; ours is reasoning
_EFFORTS = get_args(ReasoningEffort)
_MAX_IGNORED = 64  # that are named: clients may send any number of unknown fields
Path = tuple[str | int, ...]
_HINT = "The fields are listed in docs/api.md; a server with --unknown-fields ignore takes others, too."


class Amendment:
    """Amends one body. `ignored`: the fields that it left out, without indexes, as in 'messages.reasoning_details'.

    Takes time in proportion to the body's length.
    """

    def __init__(self, kind: type[Any], model: str, *, ignores_unknown: bool) -> None:
        """model: its name, for errors."""
        self._kind: Any = kind
        self._model = model
        self._ignores_unknown = ignores_unknown
        self._ignored: dict[str, None] = {}

    @property
    def ignored(self) -> list[str]:
        return list(self._ignored)

    def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body in our form, changed in place. Raises InvalidRequest for what is not supported, or unknown."""
        if "reasoning" in _names(self._kind):
            _move_switches(body)
            if isinstance(switch := body.get("reasoning"), dict):
                self._check_fields(switch, ReasoningSwitch, ("reasoning",), "reasoning.")
        self._check_fields(body, self._kind, (), "", _not_supported_by(self._kind), IGNORED - _names(self._kind))
        self._amend_values(body)
        if isinstance(options := body.get("stream_options"), dict):
            self._check_fields(options, StreamOptions, ("stream_options",), "stream_options.")
        if isinstance(messages := body.get("messages"), list):
            for index, message in enumerate(messages):
                if isinstance(message, dict):
                    self._amend_message(message, ("messages", index))
        if "tools" in _names(self._kind) and isinstance(tools := body.get("tools"), list):
            for index, tool in enumerate(tools):
                self._check_items(tool, Tool, FunctionDefinition, ("tools", index), "tools.")
        return body

    def _amend_values(self, body: dict[str, Any]) -> None:
        """What requests of all APIs have."""
        for name in _whole_numbers(self._kind):
            value = body.get(name)
            if isinstance(value, float) and value.is_integer():  # in JSON, 3.0 is 3
                body[name] = int(value)
        stop = body.get("stop")
        if stop == "":
            del body["stop"]
        elif isinstance(stop, list) and all(isinstance(text, str) for text in stop):
            body["stop"] = [text for text in stop if text]

    def _amend_message(self, message: dict[str, Any], path: Path) -> None:
        if message.get("role") == "function":  # OpenAI's name before there were tools
            message["role"] = "tool"
        if message.get("role") == "assistant":
            for name in _REASONING_NAMES:
                _move_reasoning(message, message.get(name), name)
        self._check_fields(message, Message, path, "messages.", MESSAGE_NOT_SUPPORTED, MESSAGE_IGNORED)
        if isinstance(calls := message.get("tool_calls"), list):
            for index, call in enumerate(calls):
                self._amend_call(call, (*path, "tool_calls", index))
        content = message.get("content")
        if content == []:
            message["content"] = ""
        elif isinstance(content, list):
            for index, part in enumerate(content):
                if isinstance(part, dict):
                    content[index] = self._amended_part(message, part, (*path, "content", index))

    def _amend_call(self, call: Any, path: Path) -> None:
        """Ollama's have no id, and arguments as they are."""
        if not isinstance(call, dict):
            return
        self._check_items(call, ToolCall, FunctionCall, path, "messages.tool_calls.")
        call.setdefault("id", f"call_{path[1]}_{path[-1]}")
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
            function["arguments"] = msgspec.json.encode(function["arguments"]).decode()

    def _check_items(self, item: Any, kind: Any, function_kind: Any, path: Path, place: str) -> None:
        """A tool, or a call of one."""
        if not isinstance(item, dict) or item.get("type", "function") != "function":
            return
        self._check_fields(item, kind, path, place, {}, TOOL_IGNORED)
        if isinstance(function := item.get("function"), dict):
            self._check_fields(function, function_kind, (*path, "function"), f"{place}function.", {}, TOOL_IGNORED)

    def _amended_part(self, message: dict[str, Any], part: dict[str, Any], path: Path) -> dict[str, Any]:
        kind = part.get("type")
        if not isinstance(kind, str):
            return part
        self._refuse_media(kind, path)
        if kind in _REASONING_PARTS and message.get("role") == "assistant":
            _move_reasoning(message, part.get(kind, part.get("text")))
            return {"type": "text", "text": ""}
        if kind in _TEXT_PARTS:
            if (text := part.pop(_TEXT_PARTS[kind], None)) is not None:
                part |= {"type": "text", "text": text}
            self._check_fields(part, ContentPart, path, "messages.content.", {}, PART_IGNORED)
        return part

    def _refuse_media(self, kind: str, path: Path, example: str = "text") -> None:
        """Raises InvalidRequest for a part that is no text. example: a type that is."""
        if kind in MEDIA_PARTS:
            raise InvalidRequest(
                f"'{joined(path)}' is of type {kind}. {MEDIA_PARTS[kind]} not supported: "
                f"the model '{self._model}' takes text only.",
                hint=f'Send parts like {{"type": "{example}", "text": "…"}}.',
                param=joined((*path, "type")),
                code="unsupported_parameter",
            )

    def _check_fields(
        self,
        fields: dict[str, Any],
        kind: Any,
        path: Path,
        place: str,
        not_supported: Mapping[str, Missing] | None = None,
        ignored: Collection[str] = (),
    ) -> None:
        """Leave out what asks for nothing or changes nothing. Raises InvalidRequest for the rest.

        place: the beginning of the names of ignored fields.
        """
        known = _names(kind)
        for name, value in list(fields.items()):
            missing = (not_supported or {}).get(name)
            if missing is not None:
                if asks(name, value, missing):
                    raise not_supported_error(joined((*path, name)), missing)
                del fields[name]
            elif name in ignored or name not in known:
                if value is not None:
                    if name not in ignored and not self._ignores_unknown:
                        if not path and name in PROMPT_PATHS:
                            raise unknown_field(name, "", (), f"It is for {PROMPT_PATHS[name]}.")
                        raise unknown_field(name, joined(path), known, _HINT)
                    if len(self._ignored) < _MAX_IGNORED:
                        self._ignored[place + name] = None
                del fields[name]


def check_type(
    fields: dict[str, Any], path: Path, known: Mapping[str, Any] | tuple[str, ...], missing: Mapping[str, Missing]
) -> str:
    """The type. Raises InvalidRequest naming it if it is not a known one; missing: what other types are."""
    kind = fields.get("type")
    if isinstance(kind, str) and kind in known:
        return kind
    place = joined(path)
    if isinstance(kind, str) and kind in missing:
        raise InvalidRequest(
            f"'{place}' is of type {kind}. {missing[kind].what} not available on this server.",
            hint=missing[kind].instead or "Leave it out.",
            param=f"{place}.type",
            code="unsupported_parameter",
        )
    shown = "missing" if kind is None else f'"{str(kind)[:60]}"'
    named = ", ".join(f'"{one}"' for one in known)
    raise InvalidRequest(f"'{place}.type' is {shown}: it must be one of {named}.", param=f"{place}.type")


def asks(name: str, value: Any, missing: Missing) -> bool:
    """Whether a field of a feature that is not supported asks for it."""
    if name in ALWAYS_ASKS:
        return value is not None
    return not (_is_nothing(value) or value in missing.neutral)


def _is_nothing(value: Any) -> bool:
    """null, false, "", "none", [], and objects of these: their server's default, which is not to do it."""
    if isinstance(value, dict):
        return all(map(_is_nothing, value.values()))
    return value is None or value is False or value in ("", "none", [])


def not_supported_error(param: str, missing: Missing) -> InvalidRequest:
    return InvalidRequest(
        f"'{param}' is not supported. {missing.what} not available on this server.",
        hint=missing.instead or "Leave it out.",
        param=param,
        code="unsupported_parameter",
    )


def joined(path: Path) -> str:
    return ".".join(map(str, path))


def _move_reasoning(message: dict[str, Any], text: Any, name: str = "") -> None:
    """Reasoning under another name becomes `reasoning_content`, unless the message has that."""
    if not isinstance(text, str) and text is not None:
        return
    message.pop(name, None)
    if text and not message.get("reasoning_content"):
        message["reasoning_content"] = text


def _move_switches(body: dict[str, Any]) -> None:
    """What DeepSeek, Qwen, Anthropic and Ollama have for it becomes `reasoning`, which is OpenRouter's."""
    switch: dict[str, Any] = {}
    for name in _SWITCHES:
        match body.get(name):
            case bool(value):
                switch["enabled"] = value
            case str(value) if value in _EFFORTS:
                switch["effort"] = value
            case {"type": "enabled" | "disabled" | "adaptive" | "auto" as kind, **more}:
                if kind in ("enabled", "disabled"):
                    switch["enabled"] = kind == "enabled"
                if isinstance(budget := more.get("budget_tokens"), int):
                    switch["max_tokens"] = budget
            case _:
                continue
        del body[name]
    budget = body.get("thinking_budget")
    if isinstance(budget, int) and budget >= 0:
        switch["max_tokens"] = body.pop("thinking_budget")
    own = body.get("reasoning")
    if isinstance(own, bool):
        own = body["reasoning"] = {"enabled": own}
    elif isinstance(own, str) and own in _EFFORTS:
        own = body["reasoning"] = {"effort": own}
    if switch and (own is None or isinstance(own, dict)):
        body["reasoning"] = {**switch, **(own or {})}


@cache
def _names(kind: Any) -> frozenset[str]:
    """Also the name of the field that says which type of several it is."""
    tag = kind.__struct_config__.tag_field
    return frozenset([*field_names(kind), *([tag] if tag else [])])


@cache
def _not_supported_by(kind: Any) -> Mapping[str, Missing]:
    own = OWN_FIELDS & _names(kind)
    return {name: missing for name, missing in NOT_SUPPORTED.items() if name not in own}


@cache
def _whole_numbers(kind: Any) -> tuple[str, ...]:
    return tuple(whole_number_fields(kind))
