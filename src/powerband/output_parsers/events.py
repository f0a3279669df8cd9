"""What parsers find in an output: pieces of text and of reasoning, and tool calls with pieces of their arguments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(slots=True)
class Reasoning:
    """Text of the reasoning before the answer."""

    text: str


@dataclass(slots=True)
class CallStart:
    """A call of a tool begins. Calls are numbered from 0; `id` is "" where the format has none."""

    index: int
    name: str
    id: str = ""


@dataclass(slots=True)
class CallArguments:
    """The next piece of the call's arguments; all together are the JSON text of an object."""

    index: int
    text: str


@dataclass(slots=True)
class CallEnd:
    index: int


Event = Content | Reasoning | CallStart | CallArguments | CallEnd
