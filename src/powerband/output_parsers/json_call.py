"""Calls that are JSON objects, read while they grow: {"name": "f", "arguments": {…}}."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from powerband.output_parsers.text_parser import MAX_NAME_CHARS, past_space

NAME_KEYS = ("name",)
ARGUMENT_KEYS = ("arguments", "parameters")
_IN_STRING = re.compile(r'[^"\\]+')
_PLAIN = re.compile(r'[^"{}\[\]]+')
_SCALAR = re.compile(r"[^\s,{}\[\]\"]+")


class JsonValue:
    """The extent of one JSON value: brackets and strings are followed, nothing else is checked."""

    def __init__(self) -> None:
        self.kind = ""  # its first character
        self.done = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str, at: int) -> int:
        """Where the value's part of text[at:] ends. The first character is the value's first, not a blank."""
        while at < len(text) and not self.done:
            char = text[at]
            if self._escaped:
                self._escaped = False
                at += 1
            elif self._in_string:
                at = self._string(text, at, char)
            elif not self.kind or self._depth:
                at = self._outside(text, at, char)
            elif found := _SCALAR.match(text, at):
                at = found.end()
            else:
                self.done = True
        return at

    def _string(self, text: str, at: int, char: str) -> int:
        if char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
            self.done = self._depth == 0
        else:
            found = _IN_STRING.match(text, at)
            return found.end() if found else at + 1
        return at + 1

    def _outside(self, text: str, at: int, char: str) -> int:
        self.kind = self.kind or char
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.done = self._depth <= 0
        elif self._depth:
            found = _PLAIN.match(text, at)
            return found.end() if found else at + 1
        return at + 1


class JsonCall:
    """One call as an object with a name and arguments, in any order.

    `on_start(name)` and then `on_arguments(text)` are called as soon as it is clear; arguments that come before the
    name wait. Arguments that are a string with JSON in it are unpacked; null and none are "{}".
    strict: other keys than those of calls make it no call, and so does a name that `is_tool` does not know.
    """

    def __init__(
        self,
        on_start: Callable[[str], None],
        on_arguments: Callable[[str], None],
        is_tool: Callable[[str], bool] | None = None,
        *,
        other_keys: Sequence[str] | None = None,
    ) -> None:
        """other_keys: that may be there beside; None: any."""
        self._on_start, self._on_arguments = on_start, on_arguments
        self._is_tool = is_tool
        self._other_keys = other_keys
        self.name = ""
        self.done = self.failed = False
        self._state: Callable[[str, int], int] = self._before
        self._key = ""
        self._value = JsonValue()
        self._kept: list[str] = []  # the value so far, where it cannot be given out yet
        self._num_kept = 0
        self._early: list[str] = []  # arguments before the name
        self._has_arguments = False

    def feed(self, text: str, at: int) -> int:
        """Where the object's part of text[at:] ends; all of it unless `done` or `failed`."""
        while at < len(text) and not (self.done or self.failed):
            at = self._state(text, at)
        return at

    def _before(self, text: str, at: int) -> int:
        at = past_space(text, at)
        if at < len(text):
            self._next("{", text[at], self._key_or_end)
            at += 1
        return at

    def _key_or_end(self, text: str, at: int) -> int:
        at = past_space(text, at)
        if at == len(text):
            return at
        if text[at] == "}":
            return self._end(at)
        if text[at] == '"':
            self._begin_value(self._in_key)
            return at
        self.failed = True
        return at

    def _begin_value(self, state: Callable[[str, int], int]) -> None:
        self._value, self._kept, self._num_kept, self._state = JsonValue(), [], 0, state

    def _in_key(self, text: str, at: int) -> int:
        at = self._keep(text, at)
        if self._value.done:
            key = _decoded("".join(self._kept))
            self._key = key if isinstance(key, str) else ""
            known = (*NAME_KEYS, *ARGUMENT_KEYS, *(self._other_keys or ()))
            self.failed = self._other_keys is not None and self._key not in known
            self._state = self._colon
        return at

    def _colon(self, text: str, at: int) -> int:
        at = past_space(text, at)
        if at < len(text):
            self._next(":", text[at], self._value_start)
            at += 1
        return at

    def _value_start(self, text: str, at: int) -> int:
        at = past_space(text, at)
        if at == len(text):
            return at
        if text[at] in ",:}]":
            self.failed = True
        elif self._key in ARGUMENT_KEYS and not self._has_arguments:
            self._has_arguments = True
            self._begin_value(self._in_object if text[at] == "{" else self._in_other_arguments)
        elif self._key in NAME_KEYS and not self.name:
            self._begin_value(self._in_name)
        else:
            self._begin_value(self._in_ignored)
        return at

    def _in_name(self, text: str, at: int) -> int:
        at = self._keep(text, at)
        if self._value.done:
            name = _decoded("".join(self._kept))
            if not isinstance(name, str) or not name or (self._is_tool and not self._is_tool(name)):
                self.failed = True
                return at
            self.name = name
            self._on_start(name)
            for piece in self._early:
                self._on_arguments(piece)
            self._early = []
            self._state = self._after_value
        return at

    def _in_object(self, text: str, at: int) -> int:
        end = self._value.feed(text, at)
        self._give(text[at:end])
        if self._value.done:
            self._state = self._after_value
        return end

    def _in_other_arguments(self, text: str, at: int) -> int:
        end = self._value.feed(text, at)
        self._kept.append(text[at:end])
        if self._value.done:
            raw = "".join(self._kept)
            decoded = _decoded(raw)
            self._give((decoded or "{}") if isinstance(decoded, str) else "{}" if raw == "null" else raw)
            self._state = self._after_value
        return end

    def _in_ignored(self, text: str, at: int) -> int:
        end = self._value.feed(text, at)
        if self._value.done:
            self._state = self._after_value
        return end

    def _after_value(self, text: str, at: int) -> int:
        at = past_space(text, at)
        if at == len(text):
            return at
        if text[at] == "}":
            return self._end(at)
        self._next(",", text[at], self._key_or_end)
        return at + 1

    def _end(self, at: int) -> int:
        self.failed = not self.name
        self.done = not self.failed
        if self.done and not self._has_arguments:
            self._on_arguments("{}")
        return at + 1

    def _next(self, wanted: str, char: str, state: Callable[[str, int], int]) -> None:
        self.failed = char != wanted
        self._state = state

    def _keep(self, text: str, at: int) -> int:
        """Keep a name or key; one that is too long is none."""
        end = self._value.feed(text, at)
        self._kept.append(text[at:end])
        self._num_kept += end - at
        self.failed = self._num_kept > MAX_NAME_CHARS
        return end

    def _give(self, text: str) -> None:
        if self.name:
            self._on_arguments(text)
        else:
            self._early.append(text)


def _decoded(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
