"""Content blocks and events from the pieces of an answer. A whole message is what the events of a stream add up to."""

from __future__ import annotations

from typing import Any

import msgspec

from powerband.openai.events import named_event
from powerband.server.messages.objects import (
    BlockDelta,
    BlockStart,
    BlockStop,
    ContentBlock,
    End,
    InputJsonDelta,
    MessageDelta,
    MessageEvent,
    MessageObject,
    MessageStart,
    MessageStop,
    MessageUsage,
    Ping,
    Stop,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)


class BlockWriter:
    """Writes one message. At most one block is open at a time: what belongs to another one closes it.

    `take` gives the events since it was last called, as bytes to send.
    """

    def __init__(self, message: MessageObject, *, writes_events: bool) -> None:
        self.message = message
        self._writes_events = writes_events
        self._events: list[bytes] = []
        self._texts: list[str] = []  # of the open block
        self._open: ContentBlock | None = None

    def take(self) -> bytes:
        data = b"".join(self._events)
        self._events.clear()
        return data

    def begin(self, usage: MessageUsage) -> None:
        self.message.usage = usage
        self._emit(MessageStart(self.message))
        self._emit(Ping())

    def add_reasoning(self, text: str) -> None:
        if not isinstance(self._open, ThinkingBlock):
            self._add_block(ThinkingBlock())
        self._texts.append(text)
        self._emit(BlockDelta(self._index, ThinkingDelta(text)))

    def add_text(self, text: str) -> None:
        if not isinstance(self._open, TextBlock):
            self._add_block(TextBlock())
        self._texts.append(text)
        self._emit(BlockDelta(self._index, TextDelta(text)))

    def begin_call(self, id: str, name: str) -> None:
        self._add_block(ToolUseBlock(id=id, name=name))

    def add_arguments(self, text: str) -> None:
        """To the call that was begun last."""
        self._texts.append(text)
        self._emit(BlockDelta(self._index, InputJsonDelta(text)))

    def end(self, reason: Stop, stop_sequence: str | None, usage: MessageUsage) -> None:
        message = self.message
        if not message.content:
            self._add_block(TextBlock())
        self._close_block()
        message.stop_reason, message.stop_sequence, message.usage = reason, stop_sequence, usage
        self._emit(MessageDelta(End(stop_reason=reason, stop_sequence=stop_sequence), usage))
        self._emit(MessageStop())

    @property
    def _index(self) -> int:
        return len(self.message.content) - 1

    def _add_block(self, block: ContentBlock) -> None:
        self._close_block()
        self._open = block
        self.message.content.append(block)
        self._emit(BlockStart(self._index, block))

    def _close_block(self) -> None:
        block = self._open
        if block is None:
            return
        text = "".join(self._texts)
        if isinstance(block, TextBlock):
            block.text = text
        elif isinstance(block, ThinkingBlock):
            block.thinking = text
        else:
            block.input = _object(text)
        self._emit(BlockStop(self._index))
        self._texts, self._open = [], None

    def _emit(self, event: MessageEvent) -> None:
        if self._writes_events:
            type = str(event.__struct_config__.tag)
            self._events.append(named_event(type, msgspec.json.encode(event)))


def _object(arguments: str) -> dict[str, Any]:
    """The arguments of a call; {} unless they are a whole object."""
    try:
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {}
