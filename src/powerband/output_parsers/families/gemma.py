"""Gemma 3, whose guide has two formats: [f(a=1)], also fenced as ```tool_code, and {"name": "f", "parameters": {…}}."""

from __future__ import annotations

from collections.abc import Callable

from powerband.output_parsers.families.llama3_json import GEMMA_FENCE, Llama3JsonParser
from powerband.output_parsers.families.pythonic import GEMMA_TAGS, PythonicParser
from powerband.output_parsers.text_parser import TextParser


class GemmaParser(TextParser):
    """Takes the format that the output begins with."""

    def __init__(self, is_tool: Callable[[str], bool]) -> None:
        super().__init__()
        self._is_tool = is_tool
        self._chosen: TextParser | None = None
        self._blanks: list[str] = []

    @property
    def in_call(self) -> bool:
        return self._chosen is not None and self._chosen.in_call

    def _start(self) -> bool:
        before = self._at
        has_text = self._skip_space()
        self._blanks.append(self._text[before : self._at])
        at = self._at
        if has_text and (tag := self._expect(("{", GEMMA_FENCE[0]))) is not None:
            self._chosen = (
                Llama3JsonParser(self._is_tool, *GEMMA_FENCE)
                if tag
                else PythonicParser(self._is_tool, GEMMA_TAGS, bare=True)
            )
            self._events += self._chosen.feed("".join(self._blanks))
            self._state = self._pass_on
        self._at = at
        return self._chosen is not None

    def _pass_on(self) -> bool:
        if self._chosen is not None:
            self._events += self._chosen.feed(self._text[self._at :])
            self.num_calls = self._chosen.num_calls
        self._at = len(self._text)
        return True

    def _finish(self, rest: str, complete: bool) -> None:
        if self._chosen is not None:
            self._events += self._chosen.finish(complete=complete)
        elif complete:
            self._content("".join(self._blanks) + rest)
