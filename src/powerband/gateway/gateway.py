"""The state of a running gateway: its models with their pools, its upstream client, and the sinks for completed
requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import msgspec
from starlette.requests import Request

from powerband.documents import read_json_table
from powerband.errors import PowerbandError
from powerband.files import make_private_folder, set_aside, write_atomically
from powerband.gateway.accounts.keys import Key
from powerband.gateway.dispatch.health import Prober
from powerband.gateway.dispatch.pool import Pool
from powerband.gateway.observability.recent_requests import RecentRequests
from powerband.gateway.request import CompletedRequest
from powerband.gateway.routes import ModelRoute, ReplicaAddress, Routes
from powerband.gateway.settings import GatewaySettings
from powerband.gateway.snapshot import PoolSnapshot
from powerband.gateway.trace_context import TraceContext, forwarded_trace
from powerband.gateway.upstream.adapters import load_adapter
from powerband.gateway.upstream.buffered_response import ResponseBudget, ResponseScanner
from powerband.gateway.upstream.client import UpstreamClient
from powerband.gateway.upstream.context_lengths import ContextLengths
from powerband.gateway.upstream.token_estimates import TokenEstimates
from powerband.web.body import read_body
from powerband.web.errors import HttpError
from powerband.web.turns import Decoding, FairTurns

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STORE_RETRY_S = 5.0
_STEPS_OF_A_TURN = 8  # of requests, in a turn of the event loop: each takes some 0.5 ms
_MAX_ROUTES_BYTES = 256 << 20


@dataclass(slots=True)
class ServedModel:
    """A model, its pool, the task that probes its replicas, and estimates of its responses' sizes.

    holders: of a LoRA adapter, the ids of the replicas that list it. The pool is its base model's.
    """

    route: ModelRoute
    pool: Pool
    probing: asyncio.Task[None]
    estimates: TokenEstimates = field(default_factory=TokenEstimates)
    context_lengths: ContextLengths = field(default_factory=ContextLengths)
    holders: frozenset[str] | None = None

    @property
    def adapter(self) -> str:
        """Its name at the replicas; '': it is no adapter."""
        return "" if self.holders is None else self.route.name

    @property
    def prefix_salt(self) -> bytes:
        """Prefix caches keep what an adapter computed apart."""
        return self.adapter.encode()

    def with_adapter(self, name: str) -> ServedModel | None:
        """An adapter of this model as a model of its own. None: no replica lists it."""
        holders = frozenset(id for id, names in self.pool.adapters.items() if name in names)
        if not holders:
            return None
        replicas = tuple(replace(one, model=name) for one in self.route.replicas if one.id in holders)
        return replace(self, route=replace(self.route, name=name, aliases=(), replicas=replicas), holders=holders)


def owner_of(request: Request) -> str:
    """Whose request it is: the id of its key; without one, the client's address."""
    key: Key | None = request.state.key
    if key is not None:
        return key.id
    return "" if request.client is None else request.client.host


class Gateway:
    """Call `start`, then `close`. Used by one event loop only."""

    def __init__(self, settings: GatewaySettings, routes_file: Path | None = None) -> None:
        self.settings = settings
        self.upstream = UpstreamClient(settings.stream_timeouts)
        self.response_budget = ResponseBudget()
        self.response_scanner = ResponseScanner()
        self.turns = FairTurns(_STEPS_OF_A_TURN)
        self._decoding = Decoding(self.turns)
        self.recent = RecentRequests()
        self.routes = Routes()
        self.draining = False
        self.num_active = 0
        self.trace: Callable[[Mapping[str, str]], TraceContext | None] = forwarded_trace
        self.routes_changed: Callable[[], None] = lambda: None
        self.sinks: list[Callable[[CompletedRequest], None]] = [self.recent.append]
        self._routes_file = routes_file
        self._storing: asyncio.TimerHandle | None = None  # retries writing the routes
        self._served: dict[str, ServedModel] = {}
        self._names: dict[str, ServedModel] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def start(self) -> None:
        self.upstream.start()

    async def close(self) -> None:
        if self._storing is not None:
            self._storing.cancel()
        for served in self._served.values():
            served.pool.close()
            served.probing.cancel()
        await asyncio.gather(*(served.probing for served in self._served.values()), return_exceptions=True)
        await self.upstream.close()
        self._decoding.close()

    # ---- routes

    def stored_routes(self) -> Routes | None:
        """The routes that an earlier process stored. None: there are none, or the file was damaged and is set aside."""
        if self._routes_file is None or not self._routes_file.exists():
            return None
        try:
            return Routes.from_dict(read_json_table(self._routes_file, "routes file", max_bytes=_MAX_ROUTES_BYTES))
        except PowerbandError as problem:
            with contextlib.suppress(OSError):
                kept = set_aside(self._routes_file)
                logger.error("%s It is kept as %s. Set the routes with --routes or PUT /admin/routes.", problem, kept)
            return None

    def set_routes(self, routes: Routes, *, store: bool = True) -> None:
        """Replace all routes. Replicas that stay keep their state; running requests at removed replicas finish."""
        self.routes = routes
        if store:
            self._store_routes()
        kept = {model.name for model in routes.models}
        for name in [name for name in self._served if name not in kept]:
            gone = self._served.pop(name)
            gone.pool.close()
            gone.probing.cancel()
        for model in routes.models:
            served = self._served.get(model.name)
            if served is None:
                self._served[model.name] = self._serve(model)
            else:
                served.route = model
                served.pool.update(model)
            wanted = {one.name: one.path for one in routes.adapters if one.model == model.name}
            self._served[model.name].pool.wanted_adapters = wanted
        self._names = {
            name: served for served in self._served.values() for name in (served.route.name, *served.route.aliases)
        }
        self.routes_changed()
        self.upstream.close_others({replica.url for model in routes.models for replica in model.replicas})

    def _store_routes(self) -> None:
        """For the next start. The routes are in effect even if they cannot be written now; that is retried."""
        if self._storing is not None:
            self._storing.cancel()
            self._storing = None
        if self._routes_file is None:
            return
        try:
            make_private_folder(self._routes_file.parent)
            # Private, because the file contains the replicas' API keys.
            write_atomically(self._routes_file, msgspec.json.encode(self.routes.as_dict()), private=True)
        except OSError as problem:
            logger.warning("The routes are in effect, but could not be written to %s: %s.", self._routes_file, problem)
            self._storing = asyncio.get_running_loop().call_later(_STORE_RETRY_S, self._store_routes)

    def drain_replica(self, id: str, *, draining: bool = True) -> None:
        """Send it no new requests, or (False) send it requests again. Raises HttpError 404."""
        known = {one.id for model in self.routes.models for one in model.replicas}
        if id not in known:
            raise HttpError(404, "replica_not_found", f"There is no replica {id[:80]!r}.", param="replica")

        def changed(one: ReplicaAddress) -> ReplicaAddress:
            return replace(one, draining=draining) if one.id == id else one

        models = tuple(
            replace(model, replicas=tuple(changed(one) for one in model.replicas)) for model in self.routes.models
        )
        self.set_routes(replace(self.routes, models=models))

    def _serve(self, model: ModelRoute) -> ServedModel:
        pool = Pool(self.settings.pool)
        pool.update(model)
        prober = Prober(pool, self.upstream.fetch, self._load_adapter)
        return ServedModel(model, pool, asyncio.create_task(prober.run(), name=f"probe {model.name}"))

    async def _load_adapter(self, address: ReplicaAddress, name: str, path: str) -> None:
        await load_adapter(self.upstream, address, name, path)

    def served(self, name: str | None) -> ServedModel:
        """By name or alias, or by the name of an adapter; None: the only model. Raises HttpError 404."""
        if name is None and len(self._served) == 1:
            return next(iter(self._served.values()))
        found = self._names.get(name or "") or self._adapter(name or "")
        if found is None:
            shown = (
                f"There is no model {name[:80]!r}." if name else "The request names no model, and there are several."
            )
            if not self._served:
                shown = "No model is served yet."
            hint = f"Served: {', '.join(sorted(self._names)[:8])}." if self._names else ""
            raise HttpError(404, "model_not_found", shown, param="model", hint=hint)
        return found

    def _adapter(self, name: str) -> ServedModel | None:
        found = (served.with_adapter(name) for served in self._served.values())
        return next((one for one in found if one is not None), None)

    def adapters(self) -> set[str]:
        """The names of LoRA adapters that are no model's."""
        pools = [served.pool for served in self._served.values()]
        return {name for pool in pools for names in pool.adapters.values() for name in names} - self._names.keys()

    def names(self) -> list[str]:
        return list(self._names)

    def snapshots(self) -> tuple[PoolSnapshot, ...]:
        return tuple(served.pool.snapshot() for served in self._served.values())

    def unready(self) -> str:
        """Why the gateway is not ready; '': some model has a ready replica."""
        if self.draining:
            return "The gateway is draining."
        if not self._served:
            return "No model is served yet."
        ready = any(one.state == "ready" for pool in self.snapshots() for one in pool.replicas)
        return "" if ready else "No replica is ready."

    # ---- requests

    async def read(self, request: Request, decode: Callable[[bytes], T]) -> T:
        """What `decode` makes of the body. Raises HttpError, and what `decode` raises."""
        return await self.decode(request, await self.read_body(request), decode)

    async def read_body(self, request: Request) -> bytes:
        """Raises HttpError."""
        return await read_body(request, self.settings.max_body_bytes)

    async def decode(self, request: Request, data: bytes, decode: Callable[[bytes], T]) -> T:
        """What `decode` makes of the data, once it is its client's turn. Raises what `decode` raises."""
        return await self._decoding.decode(owner_of(request), data, decode)

    def begin(self) -> None:
        """Count a new request until `end`. Raises HttpError while the gateway drains."""
        if self.draining:
            error: PowerbandError = HttpError(503, "draining", "The gateway is shutting down.")
            error.retry_after_s = 1.0
            raise error
        self.num_active += 1
        self._idle.clear()

    def end(self) -> None:
        self.num_active -= 1
        if not self.num_active:
            self._idle.set()

    def note(self, finished: CompletedRequest) -> None:
        """Pass a completed request to all sinks. The failure of one does not affect the others."""
        finished.request.prefix_keys = ()  # not needed any more; frees memory
        for sink in self.sinks:
            try:
                sink(finished)
            except Exception:
                logger.exception("The sink %r failed for a completed request.", sink)

    async def drain(self, timeout_s: float) -> bool:
        """Stop accepting requests. Returns whether all running ones finished in time."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
