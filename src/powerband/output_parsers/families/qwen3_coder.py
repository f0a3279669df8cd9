"""Qwen3-Coder: calls as XML, whose values are plain text that the tool's schema gives a type.

<tool_call>
<function=name>
<parameter=key>
value
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from powerband.output_parsers.arguments_grammar import in_order, is_list_of_properties
from powerband.output_parsers.grammar import CallRules, Grammar, any_of, json_value, quoted
from powerband.output_parsers.text_parser import MAX_NAME_CHARS, TextParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"


class Qwen3CoderParser(TextParser):
    """schemas: the parameters of each tool, by its name. Texts of strings are given out as they come."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self._schemas = schemas
        self._parameters: Mapping[str, Any] = {}
        self._raw: list[str] = []  # a call without its name, or a value that is no string, so far
        self._is_string = False
        self._num_parameters = 0

    @property
    def in_call(self) -> bool:
        return self._state not in (self._start, self._after_function)

    def _start(self) -> bool:
        tag = self._until((OPEN, FUNCTION), self._content)
        if not tag:
            return False
        self._raw = [tag]
        self._state = self._function if tag == OPEN else self._name
        return True

    def _function(self) -> bool:
        before = self._at
        has_text = self._skip_space()
        self._raw.append(self._text[before : self._at])
        if not has_text:
            return False
        tag = self._expect((FUNCTION,))
        if tag is None:
            return False
        if not tag:  # no call after all
            self._content("".join(self._raw))
        self._state = self._name if tag else self._start
        return True

    def _name(self) -> bool:
        name = self._until_bracket()
        if name is None:
            return False
        if not name:
            self._content("".join(self._raw) + (FUNCTION if self._raw[0] == OPEN else ""))
            self._state = self._start
            return True
        schema = self._schemas.get(name) or {}
        properties = schema.get("properties")
        self._parameters = properties if isinstance(properties, dict) else {}
        self._num_parameters = 0
        self._call_start(name)
        self._state = self._in_function
        return True

    def _in_function(self) -> bool:
        if not self._skip_space():
            return False
        tag = self._expect((PARAMETER, END_FUNCTION, CLOSE))
        if tag is None:
            return False
        if tag == PARAMETER:
            self._state = self._key
            return True
        self._arguments("}" if self._num_parameters else "{}")
        self._call_end()
        self._state = self._start if tag == CLOSE else self._after_function
        return True

    def _key(self) -> bool:
        key = self._until_bracket()
        if key is None:
            return False
        schema = self._parameters.get(key)
        self._is_string = is_text(schema if isinstance(schema, dict) else {})
        self._arguments((", " if self._num_parameters else "{") + json.dumps(key, ensure_ascii=False) + ": ")
        self._num_parameters += 1
        self._raw = []
        self._state = self._value_start
        return True

    def _value_start(self) -> bool:
        if self._text[self._at] == "\n":
            self._at += 1
        if self._is_string:
            self._arguments('"')
        self._state = self._value
        return True

    def _value(self) -> bool:
        if not self._until(("\n" + END_PARAMETER, END_PARAMETER), self._value_piece):
            return False
        if self._is_string:
            self._arguments('"')
        else:
            self._arguments(_as_json("".join(self._raw)))
        self._state = self._in_function
        return True

    def _value_piece(self, text: str) -> None:
        if self._is_string:
            self._arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._raw.append(text)

    def _after_function(self) -> bool:
        if not self._skip_space():
            return False
        if self._expect((CLOSE,)) is None:
            return False
        self._state = self._start
        return True

    def _until_bracket(self) -> str | None:
        """The text before ">", which is consumed; None: it is not there yet; "": there is none."""
        end = self._text.find(">", self._at, self._at + MAX_NAME_CHARS)
        if end < 0:
            return None if len(self._text) - self._at < MAX_NAME_CHARS else ""
        name = self._text[self._at : end].strip()
        self._at = end + 1
        return name

    def _finish(self, rest: str, complete: bool) -> None:
        if self._state == self._start and complete:
            self._content(rest)
        elif self._state in (self._in_function, self._key, self._value_start, self._value):
            if complete and self._state == self._in_function:
                self._arguments("}" if self._num_parameters else "{}")
            self._call_end()


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether a value of this schema is a string as it stands: it can be nothing else."""
    kinds = schema.get("type")
    if kinds is None and isinstance(choices := schema.get("enum"), list) and choices:
        return all(isinstance(choice, str) for choice in choices)
    if kinds is None and "const" in schema:
        return isinstance(schema["const"], str)
    return kinds == "string" or kinds == ["string"]


def _as_json(text: str) -> str:
    """The text itself where it is JSON, Python's words for constants, else a string."""
    bare = text.strip()
    word = {"True": "true", "False": "false", "None": "null"}.get(bare)
    if word is not None:
        return word
    try:
        json.loads(bare, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return bare


def _refuse(name: str) -> None:
    raise ValueError(name)


def qwen3_coder_grammar(grammar: Grammar, rules: CallRules) -> str:
    """Strings are free up to their end unless they are an enumeration; other values are JSON of the schema."""
    for index, tool in enumerate(rules.tools):
        if is_list_of_properties(tool.schema):
            arguments = in_order(grammar, f"argument_{index}", tool.schema, partial(_argument, grammar), "")
        else:
            grammar.add("KEY", r"/[^<>\n]{1,64}/")
            value = _argument_value(grammar, {"type": "string"})
            arguments = f"({quoted(PARAMETER)} KEY {quoted('>' + chr(10))} {value})*"
        head, end = f"\n{FUNCTION}{tool.name}>\n", f"{END_FUNCTION}\n"
        grammar.add(f"call_{index}", f"{quoted(head)} {arguments} {quoted(end)} {grammar.tag(CLOSE)}")
    return grammar.tagged_calls(OPEN, any_of([f"call_{i}" for i in range(len(rules.tools))]), rules)


def _argument(grammar: Grammar, name: str, schema: dict[str, Any]) -> str:
    return f"{quoted(f'{PARAMETER}{name}>' + chr(10))} {_argument_value(grammar, schema)}"


def _argument_value(grammar: Grammar, schema: dict[str, Any]) -> str:
    end = f"\n{END_PARAMETER}\n"
    if not is_text(schema):
        return f"{json_value(schema)} {quoted(end)}"
    choices = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else None
    if choices is None:
        return grammar.until(end)
    return f"{any_of([quoted(choice) for choice in choices if isinstance(choice, str)])} {quoted(end)}"
