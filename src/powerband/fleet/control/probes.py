"""Asking every member whether it is ready, each at its own pace, so that a silent one delays nobody."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from powerband.bench.client.http import get
from powerband.bench.client.messages import ServerAddress as Address
from powerband.fleet.targets.base import Instance

PROBE_INTERVAL_S = 0.4
_TIMEOUT_S = 2.0
_PROBES_PER_METRICS_READ = 3  # looks until /metrics is read again


@dataclass(slots=True)
class ProbeResult:
    """What is known of a member. Times on time.monotonic(). ready_s: it last said that it is; heard_s: it last said
    anything. silences: requests in a row without an answer; unanswered: of these in a row those for which it took a
    connection. says: why it is not ready. metrics: its /metrics, lately.
    """

    ready_s: float | None = None
    heard_s: float | None = None
    silences: int = 0
    unanswered: int = 0
    says: str = ""
    metrics: str = ""


class ProbeSource(Protocol):
    """Something that looks at members. key: what replicas want to be asked with."""

    key: str

    def follow(self, members: Mapping[str, Instance]) -> None:
        """Look at exactly these from now on, by id."""
        ...

    def sight(self, id: str) -> ProbeResult:
        """Of a member; nothing is known of one that is not followed."""
        ...


class HealthProber:
    """Over HTTP, inside a running event loop. key: what replicas want; it may be set later."""

    def __init__(self) -> None:
        self.key = ""
        self._sights: dict[str, ProbeResult] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def follow(self, members: Mapping[str, Instance]) -> None:
        for id in self._tasks.keys() - members.keys():
            self._tasks.pop(id).cancel()
            del self._sights[id]
        for id in members.keys() - self._tasks.keys():
            self._sights[id] = ProbeResult()
            self._tasks[id] = asyncio.create_task(self._look(self._sights[id], members[id]), name=f"probe {id}")

    def sight(self, id: str) -> ProbeResult:
        return self._sights.get(id) or ProbeResult()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self.follow({})
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self, sight: ProbeResult, member: Instance) -> None:
        for turn in itertools.count():
            await self._ask(sight, member)
            if member.role == "replica" and turn % _PROBES_PER_METRICS_READ == 0 and sight.ready_s is not None:
                await self._read_metrics(sight, member)
            await asyncio.sleep(0.0 if sight.unanswered else PROBE_INTERVAL_S)  # a time-out was pause enough

    async def _ask(self, sight: ProbeResult, member: Instance) -> None:
        try:
            page = await get(self._address(member), member.ready_path, timeout_s=_TIMEOUT_S)
        except (OSError, TimeoutError, ValueError) as problem:
            sight.silences += 1
            sight.unanswered = sight.unanswered + 1 if isinstance(problem, TimeoutError) else 0
            sight.says = str(problem) or "no answer"
            return
        sight.silences = sight.unanswered = 0
        sight.heard_s = time.monotonic()
        sight.says = ""
        if page.status == 200:
            sight.ready_s = sight.heard_s
            return
        told = page.json()
        with suppress(KeyError, TypeError):
            sight.says = str(told["error"]["message"])[:200]  # type: ignore[index] # whatever it is not is suppressed

    async def _read_metrics(self, sight: ProbeResult, member: Instance) -> None:
        sight.metrics = ""
        with suppress(OSError, TimeoutError, ValueError):
            page = await get(self._address(member), "/metrics", timeout_s=_TIMEOUT_S)
            sight.metrics = page.body.decode(errors="replace") if page.status == 200 else ""

    def _address(self, member: Instance) -> Address:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key and member.role == "replica" else {}
        return Address(base=member.url, endpoint="completions", model="", headers=headers)
