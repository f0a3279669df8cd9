"""Hermes (Nous Hermes, Qwen 2.5, Qwen3): <tool_call>{"name": "f", "arguments": {…}}</tool_call>."""

from __future__ import annotations

from powerband.output_parsers.grammar import CallRules, Grammar, any_of, json_object_call
from powerband.output_parsers.json_call import JsonCall
from powerband.output_parsers.text_parser import TextParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(TextParser):
    """A block that holds no call is text, as it was written."""

    def __init__(self) -> None:
        super().__init__()
        self._raw: list[str] = []  # of a block, until its name is known
        self._call = self._new_call()

    @property
    def in_call(self) -> bool:
        return self._state == self._in_call

    def _new_call(self) -> JsonCall:
        return JsonCall(self._call_start, self._arguments)

    def _start(self) -> bool:
        if not self._until((OPEN,), self._content):
            return False
        self._raw = [OPEN]
        self._call = self._new_call()
        self._state = self._in_call
        return True

    def _in_call(self) -> bool:
        call, begin = self._call, self._at
        self._at = call.feed(self._text, begin)
        if not call.name:
            self._raw.append(self._text[begin : self._at])
        if call.failed:
            if call.name:
                self._call_end()
            else:
                self._content("".join(self._raw))
            self._state = self._start
        elif call.done:
            self._call_end()
            self._state = self._after_call
        return True

    def _after_call(self) -> bool:
        if not self._skip_space():
            return False
        if self._expect((CLOSE,)) is None:
            return False
        self._state = self._start
        return True

    def _finish(self, rest: str, complete: bool) -> None:
        if self._state == self._start and complete:
            self._content(rest)
        elif self._state == self._in_call and self._call.name:
            self._call_end()


def hermes_grammar(grammar: Grammar, rules: CallRules) -> str:
    calls = any_of([json_object_call(tool, "arguments") for tool in rules.tools])
    return grammar.tagged_calls(OPEN, f'"\\n" {calls} "\\n" {grammar.tag(CLOSE)}', rules)
