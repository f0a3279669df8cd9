"""The controller's line to the gateway: sends it the routes, and hears what its pools say and what is over."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from powerband.bench.client.http import HTTPPage, get, put
from powerband.bench.client.messages import ServerAddress as Address
from powerband.gateway.request import Finished
from powerband.gateway.routes import Routes
from powerband.gateway.snapshot import PoolSnapshot, ReplicaSnapshot

POLL_INTERVAL_S = 0.4
_TIMEOUT_S = 3.0
_RATE_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class GatewaySnapshot:
    """What the gateway said at once: the routes that it has, and each pool. at_s: on time.monotonic()."""

    revision: str
    draining: frozenset[str]
    pools: tuple[PoolSnapshot, ...]
    at_s: float

    def replica(self, id: str) -> ReplicaSnapshot | None:
        return next((one for pool in self.pools for one in pool.replicas if one.id == id), None)


class _Routes(msgspec.Struct):
    """Of GET /admin/routes, what is needed here."""

    routes: dict[str, object]
    pools: tuple[PoolSnapshot, ...] = ()


class _Records(msgspec.Struct):
    next: int
    records: tuple[Finished, ...] = ()


@dataclass(slots=True)
class GatewayClient:
    """Inside a running event loop; `keep_talking` does the work, the rest is for the controller to read and to set.

    wanted: the routes that the gateway should have. fresh: what is over and was not yet taken.
    """

    admin_key: str
    url: str = ""
    wanted: Routes | None = None
    heard: GatewaySnapshot | None = None
    problem: str = ""
    fresh: list[Finished] = field(default_factory=list)
    arrivals: deque[float] = field(default_factory=deque)
    next_record: int = 0

    def turn_to(self, url: str) -> None:
        """Another gateway, or the same begun anew: nothing is known of it, and it counts from the beginning."""
        self.url, self.heard, self.next_record = url, None, 0

    def take(self) -> Sequence[Finished]:
        taken, self.fresh = self.fresh, []
        return taken

    def requests_per_s(self) -> float:
        """Of the last minute."""
        now = time.time()
        while self.arrivals and self.arrivals[0] < now - _RATE_WINDOW_S:
            self.arrivals.popleft()
        return len(self.arrivals) / _RATE_WINDOW_S

    async def keep_talking(self) -> None:
        while True:
            if self.url:
                try:
                    await self._talk()
                    self.problem = ""
                except (OSError, TimeoutError, ValueError) as problem:
                    self.problem = str(problem) or "no answer"
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _talk(self) -> None:
        url = self.url
        heard = await self._ask_routes()
        if self.wanted is not None and heard.revision != self.wanted.revision:
            _checked(await put(self._address, "/admin/routes", self.wanted.as_dict(), timeout_s=_TIMEOUT_S))
            heard = await self._ask_routes()
        if url == self.url:
            self.heard = heard
        page = await get(self._address, f"/admin/records?after={self.next_record}", timeout_s=_TIMEOUT_S)
        records = msgspec.json.decode(_checked(page).body, type=_Records)
        self.next_record = records.next
        self.fresh += records.records
        self.arrivals += (one.ended_at for one in records.records)

    async def _ask_routes(self) -> GatewaySnapshot:
        page = _checked(await get(self._address, "/admin/routes", timeout_s=_TIMEOUT_S))
        found = msgspec.json.decode(page.body, type=_Routes)
        routes = Routes.from_dict(found.routes)
        draining = frozenset(replica.id for model in routes.models for replica in model.replicas if replica.draining)
        return GatewaySnapshot(routes.revision, draining, found.pools, time.monotonic())

    @property
    def _address(self) -> Address:
        headers = {"Authorization": f"Bearer {self.admin_key}", "X-Powerband-Actor": "controller"}
        return Address(base=self.url, endpoint="completions", model="", headers=headers)


def _checked(page: HTTPPage) -> HTTPPage:
    if page.status != 200:
        raise ConnectionError(f"the gateway answered {page.status}: {page.body[:200].decode(errors='replace')}")
    return page
