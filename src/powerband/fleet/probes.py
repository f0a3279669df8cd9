"""Asking every member whether it is ready, each at its own pace, so that a silent one delays nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from powerband.bench.http import get
from powerband.bench.messages import Target as Address

EVERY_S = 0.4
_TIMEOUT_S = 2.0


@dataclass(slots=True)
class Sight:
    """What is known of a member. Times on time.monotonic(). ready_s: it last said that it is; heard_s: it last said
    anything. silences: requests in a row without an answer. says: why it is not ready.
    """

    ready_s: float | None = None
    heard_s: float | None = None
    silences: int = 0
    says: str = ""


class Watching(Protocol):
    """Something that looks at members."""

    def follow(self, members: Mapping[str, str]) -> None:
        """Look at exactly these from now on: the address to ask by id."""
        ...

    def sight(self, id: str) -> Sight:
        """Of a member; nothing is known of one that is not followed."""
        ...


class Probes:
    """Over HTTP, inside a running event loop."""

    def __init__(self) -> None:
        self._sights: dict[str, Sight] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def follow(self, members: Mapping[str, str]) -> None:
        for id in self._tasks.keys() - members.keys():
            self._tasks.pop(id).cancel()
            del self._sights[id]
        for id in members.keys() - self._tasks.keys():
            self._sights[id] = Sight()
            self._tasks[id] = asyncio.create_task(self._look(self._sights[id], members[id]), name=f"probe {id}")

    def sight(self, id: str) -> Sight:
        return self._sights.get(id) or Sight()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self.follow({})
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self, sight: Sight, url: str) -> None:
        while True:
            await self._ask(sight, url)
            await asyncio.sleep(EVERY_S)

    async def _ask(self, sight: Sight, url: str) -> None:
        try:
            page = await get(Address(base=url, endpoint="completions", model=""), url, timeout_s=_TIMEOUT_S)
        except (OSError, TimeoutError, ValueError) as problem:
            sight.silences += 1
            sight.says = str(problem) or "no answer"
            return
        sight.silences = 0
        sight.heard_s = time.monotonic()
        sight.says = ""
        if page.status == 200:
            sight.ready_s = sight.heard_s
            return
        told = page.json()
        with suppress(KeyError, TypeError):
            sight.says = str(told["error"]["message"])[:200]  # type: ignore[index] # whatever it is not is suppressed
