"""What parsers find in a chat's output as OpenAI's message, and as the deltas of a stream."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from powerband.openai.tools import FunctionDelta, ToolCallDelta
from powerband.output_parsers.events import CallArguments, CallStart, Content, Event, Reasoning
from powerband.output_parsers.message import ParsedMessage
from powerband.server.replies import ChatMessage, Delta


def reply_of(message: ParsedMessage) -> ChatMessage:
    reply = ChatMessage(content=message.content)
    if message.reasoning is not None:
        reply.reasoning_content = reply.reasoning = message.reasoning
    if message.tool_calls is not None:
        reply.tool_calls = message.tool_calls
    return reply


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
