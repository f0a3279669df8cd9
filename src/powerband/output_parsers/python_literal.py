"""Python's literals as JSON, read while they grow. Nothing is evaluated."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

from powerband.output_parsers.text_parser import past_space

_MAX_DEPTH = 64
_MAX_WORD_CHARS = 1024  # of a number or a constant
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_WORD = re.compile(r"[A-Za-z0-9_.+-]+")
_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PLAIN = {quote: re.compile(rf"[^\\{quote}]+") for quote in "'\""}
_ESCAPES = {
    **{"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0"},
    **{char: char for char in "\\'\""},
}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_CLOSE = {"[": "]", "(": ")", "{": "}"}


class PythonLiteral:
    """One literal: strings, numbers, True, False, None, lists, tuples and dictionaries. Calls `give` with its JSON."""

    def __init__(self, give: Callable[[str], None]) -> None:
        self._give = give
        self.done = self.failed = False
        self._state: Callable[[str, int], int] = self._value
        self._open: list[str] = []  # brackets
        self._is_key = False
        self._first = True  # no value yet in the innermost bracket
        self._quote = ""
        self._escape = ""
        self._word = ""

    def feed(self, text: str, at: int) -> int:
        """Where the literal's part of text[at:] ends; all of it unless `done` or `failed`."""
        while at < len(text) and not (self.done or self.failed):
            at = self._state(text, at)
        return at

    def _value(self, text: str, at: int) -> int:
        at = past_space(text, at)
        if at == len(text):
            return at
        char = text[at]
        if self._open and char == _CLOSE[self._open[-1]]:  # empty, or after a last comma
            return self._close(at)
        if self._open and not self._first and (self._open[-1] != "{" or self._is_key):
            self._give(", ")
        if char in "'\"":
            self._quote, self._state = char, self._string
            self._give('"')
            return at + 1
        if char in _CLOSE:
            if self._is_key or len(self._open) == _MAX_DEPTH:
                self.failed = True
                return at
            self._open.append(char)
            self._give("{" if char == "{" else "[")
            self._is_key, self._first = char == "{", True
            return at + 1
        self._word, self._state = "", self._in_word
        if not _WORD.match(text, at):
            self.failed = True
        return at

    def _in_word(self, text: str, at: int) -> int:
        found = _WORD.match(text, at)
        end = found.end() if found else at
        self._word += text[at:end]
        if len(self._word) > _MAX_WORD_CHARS:
            self.failed = True
        elif end < len(text):
            written = _constant(self._word)
            self.failed = written is None
            self._give(f'"{written}"' if self._is_key else written or "")
            self._ended()
        return end

    def _string(self, text: str, at: int) -> int:
        char = text[at]
        if char == self._quote:
            self._give('"')
            self._ended()
            return at + 1
        if char == "\\":
            self._escape, self._state = "", self._in_escape
            return at + 1
        found = _PLAIN[self._quote].match(text, at)
        end = found.end() if found else at + 1
        self._give(json.dumps(text[at:end], ensure_ascii=False)[1:-1])
        return end

    def _in_escape(self, text: str, at: int) -> int:
        char = text[at]
        self._escape += char
        kind, digits = self._escape[0], self._escape[1:]
        if kind in _HEX_DIGITS:
            if digits and char not in "0123456789abcdefABCDEF":
                self.failed = True
            elif len(digits) == _HEX_DIGITS[kind]:
                code = int(digits, 16)
                self.failed = code > 0x10FFFF
                self._give("" if self.failed else json.dumps(chr(code))[1:-1])
                self._state = self._string
            return at + 1
        if kind != "\n":  # a line that goes on
            unknown = "\\" + kind
            self._give(json.dumps(_ESCAPES.get(kind, unknown), ensure_ascii=False)[1:-1])
        self._state = self._string
        return at + 1

    def _ended(self) -> None:
        """A value, or a key, has ended."""
        if not self._open:
            self.done = True
            return
        self._first = False
        self._state = self._colon if self._is_key else self._comma

    def _colon(self, text: str, at: int) -> int:
        at = past_space(text, at)
        if at == len(text):
            return at
        self.failed = text[at] != ":"
        self._give(": ")
        self._is_key, self._state = False, self._value
        return at + 1

    def _comma(self, text: str, at: int) -> int:
        at = past_space(text, at)
        if at == len(text):
            return at
        if text[at] == _CLOSE[self._open[-1]]:
            return self._close(at)
        self.failed = text[at] != ","
        self._is_key, self._state = self._open[-1] == "{", self._value
        return at + 1

    def _close(self, at: int) -> int:
        if self._open[-1] == "{" and not self._is_key and self._state == self._value:
            self.failed = True  # a key without a value
            return at
        self._give("}" if self._open.pop() == "{" else "]")
        self._is_key = False
        self._ended()
        return at + 1


def _constant(word: str) -> str | None:
    if word in _WORDS:
        return _WORDS[word]
    if _JSON_NUMBER.fullmatch(word):
        return word
    try:
        if (number := word.replace("_", "")).lower().lstrip("+-").startswith(("0x", "0o", "0b")):
            return str(int(number, 0))
        if number.lstrip("+-").isdigit():
            return str(int(number))
        value = float(number)
    except ValueError:
        return None
    return json.dumps(value) if math.isfinite(value) else None
