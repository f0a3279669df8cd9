"""Reasoning between tags at the beginning of an output: <think> … </think> (DeepSeek-R1, Qwen3 and many others)."""

from __future__ import annotations

from powerband.output_parsers.text_parser import TextParser


class ThinkParser(TextParser):
    """Splits reasoning off; what follows is content, tool calls included.

    starts_open: the prompt ended with the opening tag, or the model never writes it. The opening tag may stand at the
    beginning all the same; later tags are text.
    """

    def __init__(self, open_tag: str, close_tag: str, *, starts_open: bool) -> None:
        super().__init__()
        self._open, self._close = open_tag, close_tag
        self._starts_open = starts_open
        self._blanks = ""
        self._in_reasoning = starts_open

    @property
    def in_reasoning(self) -> bool:
        return self._in_reasoning

    def _start(self) -> bool:
        before = self._at
        has_text = self._skip_space()
        self._blanks += self._text[before : self._at]
        if not has_text:
            return False
        tag = self._expect((self._open,))
        if tag is None:
            return False
        self._in_reasoning = bool(tag) or self._starts_open
        self._state = self._first_line if self._in_reasoning else self._rest
        if not self._in_reasoning:
            self._content(self._blanks)
        return True

    def _first_line(self) -> bool:
        if self._skip_space():
            self._state = self._inside
        return True

    def _inside(self) -> bool:
        if self._until(("\n" + self._close, self._close), self._reasoning):
            self._in_reasoning = False
            self._state = self._rest
            return True
        return False

    def _rest(self) -> bool:
        self._content(self._text[self._at :])
        self._at = len(self._text)
        return True

    def _finish(self, rest: str, complete: bool) -> None:
        if not complete:
            return
        if self._in_reasoning:
            self._reasoning(rest)
        else:
            self._content(self._blanks + rest if self._state == self._start else rest)
