"""Commands from `LLM` to the engine's loop, which run in the same thread; their order, and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Sequence
from types import FrameType
from typing import Any

from powerband.core.loop import Command
from powerband.engine.offline.results import Answer, PromptGroup

Item = tuple[PromptGroup, Answer]


class LocalInbox:
    """Commands for a loop that runs in the same thread: it never waits."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    def poll(self, now: float) -> list[Command]:  # noqa: ARG002 (whatever is here is due)
        commands, self.commands = self.commands, []
        return commands

    def next_time(self) -> float | None:
        return None

    def wait(self, until: float | None) -> None:
        """Return at once."""


class RequestFeed:
    """The order in which answers start, and how many may be with the engine at once.

    With a prefix cache the further answers to a prompt wait for the first one's first token: then they find the prompt
    computed.
    """

    def __init__(self, groups: Sequence[PromptGroup], *, max_live: int, share_prompts: bool) -> None:
        self.live: dict[str, Item] = {}
        self.num_left = 0
        self._max_live = max_live
        self._is_full = False
        self._ready: deque[Item] = deque()
        self._held: dict[str, list[Item]] = {}
        for group in groups:
            items = [(group, answer) for answer in group.answers if not answer.finished]
            self.num_left += len(items)
            self._ready += items[:1] if share_prompts else items
            if share_prompts:
                self._held[group.id] = items[1:]

    def take(self) -> list[Answer]:
        """Answers to start now."""
        taken = []
        while self._ready and len(self.live) < self._max_live and not self._is_full:
            group, answer = self._ready.popleft()
            self.live[answer.request.id] = (group, answer)
            taken.append(answer)
        return taken

    def continue_as(self, id: str, answer: Answer) -> None:
        """Another request of the same answer takes the place of this one."""
        group, _ = self.live.pop(id)
        self.live[answer.request.id] = (group, answer)

    def refuse(self, ids: Sequence[str]) -> None:
        """The engine's queue was full: these start again once something has finished."""
        if ids:
            self._ready.extendleft(reversed([self.live.pop(id) for id in ids]))
            self._is_full = bool(self.live)

    def advance(self, group: PromptGroup, answer: Answer) -> None:
        """`answer` has a first token, or has finished."""
        self._ready.extendleft(reversed(self._held.pop(group.id, [])))
        if answer.finished:
            del self.live[answer.request.id]
            self.num_left -= 1
            self._is_full = False


class InterruptGuard:
    """Ctrl-C while steps run is noted, so that no step is cut in half. A second one interrupts at once."""

    def __init__(self) -> None:
        self.num_seen = 0
        self._previous: Any = None

    def __enter__(self) -> InterruptGuard:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (the signal module's signature)
        self.num_seen += 1
        if self.num_seen > 1:
            raise KeyboardInterrupt
