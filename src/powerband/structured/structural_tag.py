"""Structural tags, as vLLM and xgrammar have them: free text with parts that have a form, in llguidance's Lark syntax.

    {"type": "structural_tag", "format": FORMAT}                               a tree of formats
    {"structures": [{"begin", "schema", "end"}, …], "triggers": ["<f", …]}     the older form: triggered tags

| format              | what it writes                                                                              |
|---------------------|---------------------------------------------------------------------------------------------|
| const_string        | `value`                                                                                     |
| json_schema         | JSON of `json_schema`                                                                       |
| regex               | a text that `pattern` matches                                                               |
| any_text            | any text; inside a tag, up to the tag's end                                                 |
| sequence, or        | `elements` one after the other; one of them                                                 |
| tag                 | `begin`, `content` (a format), `end`                                                        |
| triggered_tags      | any text, but after one of `triggers` the rest of one of `tags`                             |
| tags_with_separator | `tags` with `separator` between them                                                        |

The last two have `at_least_one` and `stop_after_first`, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from powerband.errors import InvalidRequest
from powerband.structured.regex import portable

MAX_DEPTH = 32
MAX_PARTS = 2048


class StructuralTag:
    """Writes one. `json_rule` makes a rule's body of a schema at a place; it raises InvalidRequest."""

    def __init__(self, place: str, json_rule: Callable[[Any, str], str]) -> None:
        self._place = place
        self._json_rule = json_rule
        self._rules: list[str] = []

    def write(self, tag: Any) -> str:
        """The grammar. Raises InvalidRequest naming the place."""
        if not isinstance(tag, dict):
            raise self._error("", "must be an object")
        if "structures" in tag:
            tags = [
                {**one, "content": {"type": "json_schema", "json_schema": one.get("schema")}}
                for one in self._list(tag, "structures", "")
                if isinstance(one, dict)
            ]
            start = self._triggered({"triggers": tag.get("triggers"), "tags": tags}, "structures", 0)
        else:
            start = self._format(tag.get("format"), "format", 0)
        return "\n".join([f"start: {start}", "TEXT: /(?s:.*)/", *self._rules])

    def _format(self, format: Any, path: str, depth: int) -> str:
        """What stands for a format in a rule."""
        if depth > MAX_DEPTH or len(self._rules) > MAX_PARTS:
            raise self._error(path[:200], f"has more than {MAX_PARTS} parts, or is nested more than {MAX_DEPTH} deep")
        if not isinstance(format, dict):
            raise self._error(path, "must be an object")
        match format.get("type"):
            case "const_string":
                return _quoted(self._text(format, "value", path))
            case "json_schema":
                return self._json_rule(format.get("json_schema"), f"{self._place}.{path}.json_schema")
            case "regex":
                return self._rule("/" + portable(self._text(format, "pattern", path)).replace("/", r"\/") + "/")
            case "any_text":
                return "TEXT"
            case "sequence":
                return self._sequence(format, path, depth)
            case "or":
                elements = self._list(format, "elements", path)
                parts = [self._format(one, f"{path}.elements.{i}", depth + 1) for i, one in enumerate(elements)]
                return f"({' | '.join(parts)})"
            case "tag":
                return self._tag(format, path, depth)
            case "triggered_tags":
                return self._triggered(format, path, depth)
            case "tags_with_separator":
                return self._separated(format, path, depth)
        raise self._error(f"{path}.type", "is none of the formats that are supported")

    def _sequence(self, format: dict[str, Any], path: str, depth: int) -> str:
        elements = self._list(format, "elements", path)
        return " ".join(self._format(one, f"{path}.elements.{i}", depth + 1) for i, one in enumerate(elements))

    def _tag(self, tag: Any, path: str, depth: int, trigger: str = "") -> str:
        """A tag, without the trigger with which it begins."""
        if not isinstance(tag, dict):
            raise self._error(path, "must be an object")
        begin, end = (
            self._text(tag, "begin", path).removeprefix(trigger),
            self._text(tag, "end", path, may_be_empty=True),
        )
        content = tag.get("content")
        is_free = isinstance(content, dict) and content.get("type") == "any_text"
        head = _quoted(begin) if begin else ""
        if is_free and end:
            return f"{head} {self._until(end)}"
        return f"{head} {self._format(content, f'{path}.content', depth + 1)} {_quoted(end) if end else ''}"

    def _triggered(self, format: dict[str, Any], path: str, depth: int) -> str:
        triggers = self._list(format, "triggers", path)
        tags = self._list(format, "tags", path)
        parts: list[str] = []
        for i, tag in enumerate(tags):
            begin = self._text(tag, "begin", f"{path}.tags.{i}") if isinstance(tag, dict) else ""
            trigger = next((one for one in triggers if isinstance(one, str) and one and begin.startswith(one)), None)
            if trigger is None:
                raise self._error(f"{path}.tags.{i}.begin", "begins with none of the triggers")
            rest = self._tag(tag, f"{path}.tags.{i}", depth + 1, trigger)
            parts.append(self._rule(f"{self._until(trigger)} {rest}"))
        one_of = f"({' | '.join(parts)})"
        if format.get("stop_after_first"):
            return one_of if format.get("at_least_one") else f"({one_of} | TEXT)"
        return f"{one_of}{'+' if format.get('at_least_one') else '*'} TEXT"

    def _separated(self, format: dict[str, Any], path: str, depth: int) -> str:
        tags = self._list(format, "tags", path)
        parts = [self._tag(tag, f"{path}.tags.{i}", depth + 1) for i, tag in enumerate(tags)]
        separator = self._text(format, "separator", path, may_be_empty=True)
        one = self._rule(" | ".join(parts))
        several = one if format.get("stop_after_first") else f"{one} ({_quoted(separator) if separator else ''} {one})*"
        return f"({several})" if format.get("at_least_one") else f"({several})?"

    def _until(self, text: str) -> str:
        """Any text, up to the first place where `text` ends."""
        name = f"until_{len(self._rules)}"
        self._rules.append(f"{name}[lazy]: TEXT {_quoted(text)}")
        return name

    def _rule(self, body: str) -> str:
        name = f"part_{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _text(self, fields: dict[str, Any], name: str, path: str, *, may_be_empty: bool = False) -> str:
        value = fields.get(name)
        if isinstance(value, list) and len(value) == 1:  # xgrammar takes several ends
            value = value[0]
        if not isinstance(value, str) or not (value or may_be_empty):
            raise self._error(f"{path}.{name}", "must be a text" + ("" if may_be_empty else " that is not empty"))
        return value

    def _list(self, fields: dict[str, Any], name: str, path: str) -> list[Any]:
        value = fields.get(name)
        if not isinstance(value, list) or not value or len(value) > MAX_PARTS:
            raise self._error(f"{path}.{name}".lstrip("."), f"must be a list of 1 to {MAX_PARTS} entries")
        return value

    def _error(self, path: str, what: str) -> InvalidRequest:
        place = f"{self._place}.{path}".rstrip(".")[:400]
        return InvalidRequest(f"'{place}' {what}.", param=place, code="invalid_grammar")


def _quoted(text: str) -> str:
    return json.dumps(text)
