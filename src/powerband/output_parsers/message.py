"""The whole message that an output's events add up to."""

from __future__ import annotations

from collections.abc import Iterable

from powerband.openai.tools import FunctionCall, ToolCall
from powerband.output_parsers.events import CallArguments, CallStart, Content, Event, Reasoning


class ParsedMessage:
    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[CallStart, list[str]]] = []
        self.add(events)

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Content(text):
                    self._content.append(text)
                case Reasoning(text):
                    self._reasoning.append(text)
                case CallStart():
                    self._calls.append((event, []))
                case CallArguments(_, text):
                    self._calls[-1][1].append(text)

    @property
    def content(self) -> str | None:
        """None for calls without text."""
        content = "".join(self._content)
        return content if content or not self._calls else None

    @property
    def reasoning(self) -> str | None:
        """None: there is none."""
        return "".join(self._reasoning) or None

    @property
    def tool_calls(self) -> list[ToolCall] | None:
        """None: there are none."""
        calls = [
            ToolCall(id=start.id, function=FunctionCall(name=start.name, arguments="".join(pieces)))
            for start, pieces in self._calls
        ]
        return calls or None
