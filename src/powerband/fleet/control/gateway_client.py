"""The controller's client of the gateway: sends it the routes, and reads its pools and completed requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import msgspec

from powerband.gateway.request import CompletedRequest
from powerband.gateway.routes import ModelRoute, Routes
from powerband.gateway.snapshot import PoolSnapshot, ReplicaSnapshot
from powerband.http_client.request import Response, bearer, request

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.4
_TIMEOUT_S = 3.0
_RATE_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class GatewaySnapshot:
    """What the gateway reported of one model: its current route, and its pool."""

    route_revision: str  # '': the gateway has no route to the model
    draining: frozenset[str]  # ids of the replicas to which it dispatches no new requests
    pools: tuple[PoolSnapshot, ...]
    taken_s: float  # time.monotonic()

    def replica(self, id: str) -> ReplicaSnapshot | None:
        return next((one for pool in self.pools for one in pool.replicas if one.id == id), None)


class _Replica(msgspec.Struct):
    id: str
    draining: bool


class _Model(msgspec.Struct):
    name: str
    replicas: tuple[_Replica, ...]
    revision: str = ""  # not in the version before


class _Routes(msgspec.Struct):
    revision: str
    models: tuple[_Model, ...]


class _RoutesPage(msgspec.Struct):
    """The fields of GET /admin/routes that all versions share."""

    routes: _Routes
    pools: tuple[PoolSnapshot, ...] = ()


class _RecordsPage(msgspec.Struct):
    """The response to GET /admin/records."""

    next: int
    records: tuple[CompletedRequest, ...] = ()


@dataclass(slots=True)
class GatewayClient:
    """`poll_forever` runs in the controller's event loop; the controller reads and sets the fields in between."""

    admin_key: str
    url: str = ""  # '': no gateway runs
    model: str = ""  # the served name, of which routes and requests are read; others are of other services
    desired_route: ModelRoute | None = None
    is_withdrawn: bool = False  # the gateway is to forget the model
    is_owner: bool = True  # False: the gateway is another service's
    snapshot: GatewaySnapshot | None = None  # None: the gateway has not responded yet
    error: str = ""  # of the last poll
    next_record: int = 0
    _completed: list[CompletedRequest] = field(default_factory=list)
    _completed_at: deque[float] = field(default_factory=deque)  # time.time()

    def connect_to(self, url: str) -> None:
        """Switch to a gateway that has just been started: drop all state, and read its records from 0."""
        self.url, self.snapshot, self.next_record = url, None, 0

    def take_completed(self) -> Sequence[CompletedRequest]:
        """Requests that completed since the last call."""
        taken, self._completed = self._completed, []
        return taken

    def requests_per_s(self) -> float:
        """Completed requests per second over the last minute."""
        now = time.time()
        while self._completed_at and self._completed_at[0] < now - _RATE_WINDOW_S:
            self._completed_at.popleft()
        return len(self._completed_at) / _RATE_WINDOW_S

    async def poll_forever(self) -> None:
        while True:
            if self.url:
                try:
                    await self._poll()
                    self.error = ""
                except (OSError, ValueError) as error:
                    text = f"Cannot read the gateway's requests and routes: {str(error) or 'no response'}"
                    if text != self.error:
                        logger.warning("%s", text)
                    self.error = text
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _poll(self) -> None:
        url = self.url
        snapshot = await self._read_snapshot()
        if self.is_withdrawn and snapshot.route_revision:
            await self._request("DELETE", self._route_path)
            snapshot = await self._read_snapshot()
        elif self.desired_route is not None and snapshot.route_revision != self.desired_route.revision:
            await self._put(self.desired_route)
            snapshot = await self._read_snapshot()
        if url == self.url:  # no other gateway was started in the meantime
            self.snapshot = snapshot
        response = await self._request("GET", f"/admin/records?after={self.next_record}")
        page = msgspec.json.decode(response.body, type=_RecordsPage)
        self.next_record = page.next
        records = [one for one in page.records if one.request.model == self.model]
        self._completed += records
        self._completed_at += (one.ended_at for one in records)

    @property
    def _route_path(self) -> str:
        return f"/admin/routes/{quote(self.model, safe='')}"

    async def _put(self, route: ModelRoute) -> None:
        response = await self._send("PUT", self._route_path, route.as_dict())
        if response.status == 404 and self.is_owner:
            # A gateway of the previous version serves one model, and knows only the old names.
            values = Routes(models=(route,), revision=route.revision).as_dict(old_names=True)
            values["models"][0].pop("revision")
            response = await self._send("PUT", "/admin/routes", values)
        _check(response)

    async def _read_snapshot(self) -> GatewaySnapshot:
        response = await self._request("GET", "/admin/routes")
        page = msgspec.json.decode(response.body, type=_RoutesPage)
        model = next((one for one in page.routes.models if one.name == self.model), None)
        replicas = model.replicas if model is not None else ()
        draining = frozenset(replica.id for replica in replicas if replica.draining)
        pools = tuple(pool for pool in page.pools if pool.model == self.model)
        # Set as a whole, routes have one revision; a model without any has some other route than the desired one.
        revision = "" if model is None else model.revision or page.routes.revision or "none"
        return GatewaySnapshot(revision, draining, pools, time.monotonic())

    async def _request(self, method: str, path: str) -> Response:
        """Raises OSError, also for any status but 200."""
        return _check(await self._send(method, path))

    async def _send(self, method: str, path: str, body: object = None) -> Response:
        headers = {**bearer(self.admin_key), "X-Powerband-Actor": "controller"}
        return await request(method, f"{self.url}{path}", json=body, headers=headers, timeout_s=_TIMEOUT_S)


def _check(response: Response) -> Response:
    """Raises OSError for any status but 200."""
    if response.status != 200:
        text = response.body[:200].decode(errors="replace")
        raise ConnectionError(f"the gateway responded with {response.status}: {text}")
    return response
