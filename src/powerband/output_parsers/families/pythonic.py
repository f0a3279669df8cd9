"""Calls as Python writes them: [f(a=1, b="x"), g()] (Llama 3.2 and 4, Gemma 3), bare or between tags."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from powerband.output_parsers.arguments_grammar import in_order, is_list_of_properties
from powerband.output_parsers.grammar import CallRules, Grammar, any_of, escaped, json_value, quoted, regex
from powerband.output_parsers.python_literal import PythonLiteral
from powerband.output_parsers.text_parser import MAX_NAME_CHARS, TextParser

LLAMA_TAGS = (("<|python_start|>", "<|python_end|>"), ("<|python_tag|>", ""))
GEMMA_TAGS = (("```tool_code", "```"), ("```python", "```"))
_NAME = re.compile(r"[^\s()\[\],='\"]*")


class PythonicParser(TextParser):
    """Calls stand at the beginning of the output. What calls no tool of the request is text, as it was written.

    tags: openings that may stand before the calls, with their ends. bare: one call may stand without brackets.
    """

    def __init__(
        self, is_tool: Callable[[str], bool], tags: Sequence[tuple[str, str]] = LLAMA_TAGS, *, bare: bool = False
    ) -> None:
        super().__init__()
        self._is_tool = is_tool
        self._closing = dict(tags)
        self._openings = ("[", *self._closing)
        self._bare = bare
        self._raw: list[str] = []  # until it is clear that a call begins
        self._end = ""  # the tag that ends the calls
        self._in_brackets = False
        self._key = ""
        self._num_arguments = 0
        self._literal = PythonLiteral(self._arguments)

    def _start(self) -> bool:
        if not self._skip_space_kept():
            return False
        tag = self._expect(self._openings if not self._end else ("[",))
        if tag is None:
            return False
        self._raw.append(tag)
        if tag in self._closing:
            self._end = self._closing[tag]
            return True
        self._in_brackets = tag == "["
        if not tag and not (self._bare or self._end):
            return self._give_up()
        self._state = self._name
        return True

    def _name(self) -> bool:
        if not self._skip_space_kept():
            return False
        found = _NAME.match(self._text, self._at)
        end = found.end() if found else self._at
        name = self._text[self._at : end]
        if end == len(self._text) and len(name) <= MAX_NAME_CHARS:
            return False
        if end == len(self._text) or self._text[end] != "(" or not self._is_tool(name):
            return self._give_up()
        self._at = end + 1
        self._raw = []
        self._call_start(name)
        self._num_arguments = 0
        self._state = self._keyword
        return True

    def _keyword(self) -> bool:
        if not self._skip_space():
            return False
        if self._text[self._at] == ")":
            return self._end_call()
        found = _NAME.match(self._text, self._at)
        end = found.end() if found else self._at
        if end == len(self._text) and end - self._at <= MAX_NAME_CHARS:
            return False
        if end == self._at or end == len(self._text):
            return self._break_off()
        self._key, self._at = self._text[self._at : end], end
        self._state = self._equals
        return True

    def _equals(self) -> bool:
        if not self._skip_space():
            return False
        if self._text[self._at] != "=":
            return self._break_off()
        self._at += 1
        self._arguments((", " if self._num_arguments else "{") + json.dumps(self._key, ensure_ascii=False) + ": ")
        self._num_arguments += 1
        self._literal = PythonLiteral(self._arguments)
        self._state = self._value
        return True

    def _value(self) -> bool:
        self._at = self._literal.feed(self._text, self._at)
        if self._literal.failed:
            return self._break_off()
        if self._literal.done:
            self._state = self._after_value
        return True

    def _after_value(self) -> bool:
        if not self._skip_space():
            return False
        if self._text[self._at] == ")":
            return self._end_call()
        if self._text[self._at] != ",":
            return self._break_off()
        self._at += 1
        self._state = self._keyword
        return True

    def _end_call(self) -> bool:
        self._at += 1
        self._arguments("}" if self._num_arguments else "{}")
        self._call_end()
        self._state = self._after_call
        return True

    def _after_call(self) -> bool:
        if not self._skip_space():
            return False
        char = self._text[self._at]
        if char in ",;":
            self._at += 1
            self._state = self._name
            return True
        self._at += char == "]" and self._in_brackets
        self._state = self._after_calls
        return True

    def _after_calls(self) -> bool:
        if self._end:
            if not self._skip_space():
                return False
            if self._expect((self._end,)) is None:
                return False
        self._state = self._rest
        return True

    def _rest(self) -> bool:
        self._content(self._text[self._at :])
        self._at = len(self._text)
        return True

    def _broken(self) -> bool:
        """After a call that breaks off: the rest of it is no text."""
        self._at = len(self._text)
        return True

    def _skip_space_kept(self) -> bool:
        before = self._at
        found = self._skip_space()
        self._raw.append(self._text[before : self._at])
        return found

    def _give_up(self) -> bool:
        if not self.num_calls:
            self._content("".join(self._raw))
        self._raw = []
        self._state = self._broken if self.num_calls else self._rest
        return True

    def _break_off(self) -> bool:
        self._call_end()
        self._state = self._broken
        return True

    def _finish(self, rest: str, complete: bool) -> None:
        if self._state in (self._keyword, self._equals, self._value, self._after_value):
            self._call_end()
        elif complete and self._state in (self._start, self._name) and not self.num_calls:
            self._content("".join(self._raw) + rest)


def pythonic_grammar(grammar: Grammar, rules: CallRules) -> str:
    """Values are JSON, which is a literal here, too; a text may not begin as a call does."""
    return _pythonic_grammar(grammar, rules, r"\s*(<\|python_start\|>|<\|python_tag\|>)?\s*\[\s*")


def gemma_grammar(grammar: Grammar, rules: CallRules) -> str:
    return _pythonic_grammar(grammar, rules, r"\s*(```(tool_code|python)?\s*)?(\[\s*)?")


def _pythonic_grammar(grammar: Grammar, rules: CallRules, before: str) -> str:
    grammar.add("STRING", r"""/'([^'\\\x00-\x1f]|\\[nrtbf\\'"])*'/""")
    for index, tool in enumerate(rules.tools):
        grammar.add(f"OPEN_{index}", regex(r"[ \n]{0,2}\[", escaped(tool.name), r"\("))
        if is_list_of_properties(tool.schema):
            arguments = in_order(grammar, f"argument_{index}", tool.schema, _keyword_argument, ", ")
        else:
            grammar.add("NAME", r"/[A-Za-z_][A-Za-z0-9_]*/")
            grammar.add("any_argument", f'NAME "=" {json_value({})}')
            arguments = '(any_argument (", " any_argument)*)?'
        grammar.add(f"arguments_{index}", f'{arguments} ")"')
    numbers = range(len(rules.tools))
    first = any_of([f"OPEN_{i} arguments_{i}" for i in numbers])
    more = any_of([f"{quoted(rules.tools[i].name + '(')} arguments_{i}" for i in numbers])
    calls = f'{first} (", " {more})* "]"' if rules.parallel else f'{first} "]"'
    if rules.required:
        return grammar.write(f"{grammar.reasoning} {calls}")
    if grammar.answer:
        return grammar.write(f"{grammar.reasoning} ({calls} | WS? {grammar.answer})")
    names = "|".join(escaped(tool.name) for tool in rules.tools)
    grammar.add("PLAIN", "TEXT & ~" + regex(before, f"({names})", r"\((?s:.*)"))
    return grammar.write(f"{grammar.reasoning} ({calls} | PLAIN)")


def _keyword_argument(name: str, schema: dict[str, Any]) -> str:
    is_truth = schema.get("type") == "boolean" and not {"enum", "const"} & schema.keys()
    value = '("True" | "False")' if is_truth else json_value(schema)
    if schema == {"type": "string"}:
        value = f"({value} | STRING)"
    return f"{quoted(name + '=')} {value}"
