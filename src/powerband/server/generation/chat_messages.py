"""What parsers find in a chat's output as OpenAI's message, and as the deltas of a stream."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from powerband.openai.tools import FunctionCall, FunctionDelta, ToolCall, ToolCallDelta
from powerband.output_parsers.events import CallArguments, CallStart, Content, Event, Reasoning
from powerband.server.replies import ChatMessage, Delta


class MessageBuilder:
    """The message of one choice."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[CallStart, list[str]]] = []

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

    def message(self) -> ChatMessage:
        content = "".join(self._content)
        message = ChatMessage(content=content if content or not self._calls else None)
        if self._reasoning:
            message.reasoning_content = message.reasoning = "".join(self._reasoning)
        if self._calls:
            message.tool_calls = [
                ToolCall(id=start.id, function=FunctionCall(name=start.name, arguments="".join(pieces)))
                for start, pieces in self._calls
            ]
        return message


def delta_of(events: Iterable[Event]) -> Delta:
    """One delta for all that a piece of output added, with one entry for each call: a client that has it has it all."""
    delta = Delta()
    calls: dict[int, ToolCallDelta] = {}
    for event in events:
        match event:
            case Content(text):
                delta.content = text if delta.content is msgspec.UNSET else delta.content + text
            case Reasoning(text):
                so_far = "" if delta.reasoning is msgspec.UNSET else delta.reasoning
                delta.reasoning = delta.reasoning_content = so_far + text
            case CallStart(index, name, id):
                calls[index] = ToolCallDelta(index=index, id=id, type="function", function=FunctionDelta(name=name))
            case CallArguments(index, text):
                call = calls.setdefault(index, ToolCallDelta(index=index, function=FunctionDelta()))
                call.function.arguments += text
    if calls:
        delta.tool_calls = list(calls.values())
    return delta
