"""What the parsers of all formats share: the text that waits, and the search for tags in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from powerband.output_parsers.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning

MAX_NAME_CHARS = 512  # of a tool, a parameter or a header: what is longer is none


class TextParser:
    """Reads a text piece by piece, however it is cut, in time proportional to its length.

    A subclass is a state machine: `_state` consumes text from `_at` on, and returns False when it needs more. What a
    state leaves waiting is bounded: the beginning of a tag, or a name.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._events: list[Event] = []
        self._state: Callable[[], bool] = self._start
        self.num_calls = 0
        self._call_is_open = False

    @property
    def in_call(self) -> bool:
        """Whether a call has begun and not ended: what comes is part of it."""
        return self._call_is_open

    @property
    def in_reasoning(self) -> bool:
        return False

    @property
    def is_waiting(self) -> bool:
        """Whether text waits, since it may be the beginning of a tag."""
        return self._at < len(self._text)

    def feed(self, text: str) -> list[Event]:
        """What is certain after this piece."""
        self._text = self._text[self._at :] + text
        self._at = 0
        while self._at < len(self._text) and self._state():
            pass
        return self._taken()

    def finish(self, *, complete: bool) -> list[Event]:
        """The rest. complete: the model ended here; otherwise the output was cut, and what may be half a tag is not
        given out."""
        rest, self._text, self._at = self._text[self._at :], "", 0
        self._finish(rest, complete)
        return self._taken()

    def _start(self) -> bool:
        raise NotImplementedError

    def _finish(self, rest: str, complete: bool) -> None:
        """rest: the text that waits."""
        raise NotImplementedError

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # ---- what states use

    def _until(self, tags: Sequence[str], emit: Callable[[str], None]) -> str:
        """Emit the text before the first of `tags`, consume the tag and return it; "": it is not there yet."""
        found = _pattern(tuple(tags)).search(self._text, self._at)
        end = found.start() if found else held_from(self._text, self._at, tags)
        if end > self._at:
            emit(self._text[self._at : end])
        self._at = found.end() if found else end
        return found[0] if found else ""

    def _expect(self, tags: Sequence[str]) -> str | None:
        """The longest of `tags` that stands here, consumed; None: more text is needed; "": none of them."""
        rest = self._text[self._at : self._at + max(map(len, tags))]
        fitting = [tag for tag in tags if rest.startswith(tag)]
        if any(len(tag) > len(rest) and tag.startswith(rest) for tag in tags):
            return None
        if not fitting:
            return ""
        tag = max(fitting, key=len)
        self._at += len(tag)
        return tag

    def _skip_space(self) -> bool:
        """Whether there is text after blanks."""
        self._at = past_space(self._text, self._at)
        return self._at < len(self._text)

    def _content(self, text: str) -> None:
        if self._events and isinstance(last := self._events[-1], Content):
            last.text += text
        elif text:
            self._events.append(Content(text))

    def _reasoning(self, text: str) -> None:
        if self._events and isinstance(last := self._events[-1], Reasoning):
            last.text += text
        elif text:
            self._events.append(Reasoning(text))

    def _call_start(self, name: str, id: str = "") -> None:
        self._events.append(CallStart(self.num_calls, name, id))
        self.num_calls += 1
        self._call_is_open = True

    def _arguments(self, text: str) -> None:
        if self._events and isinstance(last := self._events[-1], CallArguments):
            last.text += text
        elif text:
            self._events.append(CallArguments(self.num_calls - 1, text))

    def _call_end(self) -> None:
        self._events.append(CallEnd(self.num_calls - 1))
        self._call_is_open = False


def past_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def held_from(text: str, start: int, tags: Sequence[str]) -> int:
    """From where on `text` may be the beginning of a tag."""
    for at in range(max(start, len(text) - max(map(len, tags)) + 1), len(text)):
        if any(tag.startswith(text[at:]) for tag in tags):
            return at
    return len(text)


_SPACE = re.compile(r"\s+")


@lru_cache(maxsize=256)
def _pattern(tags: tuple[str, ...]) -> re.Pattern[str]:
    """Alternatives without repetition: a search takes time proportional to the text."""
    return re.compile("|".join(map(re.escape, sorted(tags, key=len, reverse=True))))
