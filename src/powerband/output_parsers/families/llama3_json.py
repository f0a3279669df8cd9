"""Llama 3.x: the output is {"name": "f", "parameters": {…}}, after <|python_tag|> or bare, several with ";" between."""

from __future__ import annotations

from collections.abc import Callable

from powerband.output_parsers.grammar import CallRules, Grammar, any_of, escaped, json_value, regex
from powerband.output_parsers.json_call import JsonCall
from powerband.output_parsers.text_parser import TextParser

TAG = "<|python_tag|>"
GEMMA_FENCE = ("```json", "```")
_OTHER_KEYS = ("type", "id")


class Llama3JsonParser(TextParser):
    """Calls stand at the beginning or after the tag. An object that calls no tool of the request is text.

    tag: what may stand before a call, and is no text. With `end` it is the fence before the first call, which ends with
    that, and else is text.
    """

    def __init__(self, is_tool: Callable[[str], bool], tag: str = TAG, end: str = "") -> None:
        super().__init__()
        self._is_tool = is_tool
        self._tag = tag
        self._is_fence = bool(end)
        self._after_calls = (end or tag,)
        self._raw: list[str] = []  # since the last call, until it is clear what it is
        self._call = self._new_call()

    def _new_call(self) -> JsonCall:
        return JsonCall(self._call_start, self._arguments, self._is_tool, other_keys=_OTHER_KEYS)

    def _start(self) -> bool:
        """Where a call may begin."""
        begin = self._at
        self._skip_space()
        self._raw.append(self._text[begin : self._at])
        if self._at == len(self._text):
            return False
        char = self._text[self._at]
        if char in ";," and self.num_calls:
            self._at += 1
            return True
        if char == "{":
            self._call = self._new_call()
            self._state = self._in_call
            return True
        tag = self._expect(self._after_calls if self.num_calls else (self._tag,))
        if tag == "":
            self._give_up()
        elif tag and self._is_fence and not self.num_calls:
            self._raw.append(tag)
        return tag is not None

    def _in_call(self) -> bool:
        call, begin = self._call, self._at
        self._at = call.feed(self._text, begin)
        if not call.name:
            self._raw.append(self._text[begin : self._at])
        if call.failed and not call.name:
            self._give_up()
        elif call.failed or call.done:
            self._call_end()
            self._raw = []
            self._state = self._start if call.done else self._rest
        return True

    def _give_up(self) -> None:
        self._content("".join(self._raw))
        self._raw = []
        self._state = self._rest

    def _rest(self) -> bool:
        if self._is_fence:
            self._content(self._text[self._at :])
            self._at = len(self._text)
            return True
        if self._until((self._tag,), self._content):
            self._raw = []
            self._state = self._start
            return True
        return False

    def _finish(self, rest: str, complete: bool) -> None:
        if self._state == self._in_call and self._call.name:
            self._call_end()
        elif complete:
            self._content("".join(self._raw) + rest)


def llama3_json_grammar(grammar: Grammar, rules: CallRules) -> str:
    """A text may not begin as a call does, but for calls."""
    blank = r"[ \n]{0,2}"  # bounded: a model that has lost its way writes blanks until it is cut off
    name = r'\s*\{\s*("type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*'
    for index, tool in enumerate(rules.tools):
        grammar.add(
            f"OPEN_{index}",
            regex(f'{name}"{escaped(tool.name)}"', r'\s*,\s*"parameters"\s*:\s*').replace(r"\s*", blank),
        )
        grammar.add(f"call_{index}", f'OPEN_{index} {json_value(tool.schema)} "}}"')
    call = any_of([f"call_{index}" for index in range(len(rules.tools))])
    calls = f"{grammar.tag(TAG)}? {call}" + (f' ("; " {call})*' if rules.parallel else "")
    if rules.required:
        return grammar.write(f"{grammar.reasoning} WS? {calls}")
    if grammar.answer:
        return grammar.write(f"{grammar.reasoning} WS? ({calls} | {grammar.answer})")
    names = "|".join(f'"{escaped(tool.name)}"' for tool in rules.tools)
    grammar.add("PLAIN", "TEXT & ~" + regex(name, f"({names})", "(?s:.*)"))
    return grammar.write(f"{grammar.reasoning} (WS? {calls} | PLAIN)")
