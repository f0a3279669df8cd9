"""Grammars that keep tool calls in their form: llguidance's Lark syntax, built from the parts of a family's format.

Text before a call is free. As soon as the opening of a call is seen, the rest of it is constrained by the tool's
schema. A tag may be one token of the vocabulary or be spelled in several; both are the same tag.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from powerband.core.structured_outputs import MAX_SPECIFICATION_BYTES
from powerband.errors import InvalidRequest

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# JSON as chat templates write it, and models that were trained with them. No \\u: with it, an object could name a
# property twice, in two spellings.
_STYLE = {
    **{"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False},
    **{"json_allowed_escapes": 'nrbtf\\"', "lenient": False, "coerce_one_of": False},
}
_HEAD = "%llguidance {}\n"


@dataclass(frozen=True, slots=True)
class CallableTool:
    """A tool that may be called. schema: of its arguments, an object. place: the schema's in the request."""

    name: str
    schema: dict[str, Any]
    strict: bool = False
    place: str = "tools"


@dataclass(frozen=True, slots=True)
class CallRules:
    """What an output may hold. required: at least one call, and no text. parallel: more than one."""

    tools: Sequence[CallableTool]
    required: bool = False
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class ThinkTags:
    """Reasoning that comes first. starts_open: the prompt has the opening tag."""

    open_tag: str
    close_tag: str
    starts_open: bool


class Grammar:
    """Collects rules. `token_id` gives the id of a text that is one token of its own in the vocabulary.

    answer: the form of an answer that is no call; "": any text.
    """

    def __init__(
        self, token_id: Callable[[str], int | None], thinking: ThinkTags | None = None, answer: str = ""
    ) -> None:
        self._token_id = token_id
        self.answer = answer
        self._num_chars = 0
        self._rules: dict[str, str] = {"TEXT": r"/(?s:.*)/", "WS": r"/[ \n]{1,4}/"}
        self.reasoning = self._reasoning(thinking) if thinking else ""

    def write(self, start: str) -> str:
        """The whole grammar."""
        rules = {"start": start, **self._rules}
        return _HEAD + "".join(f"{name}: {body}\n" for name, body in rules.items())

    def add(self, name: str, body: str) -> str:
        """A rule, or a terminal if its name is in capitals. Returns its name. Raises InvalidRequest for too many."""
        self._num_chars += len(body)
        check_size(self._num_chars)
        self._rules[name] = body
        return name

    def tag(self, text: str) -> str:
        id = self._token_id(text)
        return quoted(text) if id is None else f"(<[{id}]> | {quoted(text)})"

    def until(self, tag: str) -> str:
        """Any text, and then the tag."""
        name = "until_" + tag.encode().hex()
        spelled = self.add(name + "_spelled[lazy]", f"TEXT {quoted(tag)}").partition("[")[0]
        id = self._token_id(tag)
        return self.add(name, spelled if id is None else f"TEXT <[{id}]> | {spelled}")

    def tagged_calls(self, opening: str, call: str, rules: CallRules) -> str:
        """The grammar of a format in which a tag opens each call. call: what comes after it."""
        if rules.required or self.answer:
            one = f"WS? {self.tag(opening)} {call}"
            calls = f"({one})+" if rules.parallel else one
            return self.write(f"{self.reasoning} {calls if rules.required else f'({calls} | WS? {self.answer})'}")
        self.add("call", f"{self.until(opening)} {call}")
        return self.write(f"{self.reasoning} {'call*' if rules.parallel else 'call?'} TEXT")

    def _reasoning(self, thinking: ThinkTags) -> str:
        if thinking.starts_open:
            return self.add("reasoning", self.until(thinking.close_tag))
        return f"(WS? {self.tag(thinking.open_tag)} {self.until(thinking.close_tag)})?"


def check_size(num_chars: int) -> None:
    """Raise InvalidRequest if the tools' schemas are more than can be enforced."""
    if num_chars > MAX_SPECIFICATION_BYTES:
        raise InvalidRequest(
            f"The schemas of 'tools' have more than {MAX_SPECIFICATION_BYTES} characters together, as JSON or as a "
            "grammar, so that they cannot be enforced.",
            hint="Send fewer or smaller ones, or leave 'strict' out.",
            param="tools",
            code="grammar_limit",
        )


def quoted(text: str) -> str:
    return json.dumps(text)


def regex(*parts: str) -> str:
    return f"/{''.join(parts)}/"


def escaped(text: str) -> str:
    """A text in a regular expression."""
    return re.escape(text).replace("/", r"\/").replace('"', r"\"")


def any_of(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"({' | '.join(choices)})"


def json_value(schema: dict[str, Any] | bool) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return "%json " + json.dumps({"x-guidance": _STYLE, **schema})


def form_of_answer(grammar: str) -> str:
    """A grammar of structured output as a part of another one. Raises ValueError for one of several grammars."""
    if not grammar.startswith("{"):
        return f"%lark {{\n{grammar.removeprefix(_HEAD)}\n}}"
    [only] = json.loads(grammar)["grammars"]
    if "json_schema" in only:
        return "%json " + json.dumps(only["json_schema"])
    return f"%lark {{\n{only['lark_grammar'].removeprefix(_HEAD)}\n}}"


def json_object_call(tool: CallableTool, key: str) -> str:
    """{"name": "f", "arguments": {…}}"""
    head = f'{{"name": "{tool.name}", "{key}": '
    return f"{quoted(head)} {json_value(tool.schema)} {quoted('}')}"
