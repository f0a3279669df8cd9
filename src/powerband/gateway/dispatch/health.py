"""Active health checks: probes every replica twice a second, and detects hung ones by the silence of their streams.

engine      probe                            evidence of progress
powerband   /readyz                          the probe itself: steps advance, or there is no work
others      /health, and /metrics            the replica's token counters, and bytes on the gateway's streams
unknown     /v1/models, nonempty             bytes on the gateway's streams

A probe that times out does not count as failed while bytes arrive. After a timeout that counts, the next probe has half
the timeout: a replica that freezes is detected within 2 s (0.5 s until the probe, 1 s and 0.5 s timeouts).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from powerband.dispatch.backend import Backend, ReplicaLoad
from powerband.engines.base import EngineAdapter
from powerband.engines.metrics import first_total
from powerband.errors import PowerbandError
from powerband.gateway.dispatch.pool import Pool
from powerband.gateway.options import NO_DESCRIPTORS
from powerband.gateway.routes import ReplicaAddress
from powerband.openai.fields import read_models

logger = logging.getLogger(__name__)

Fetch = Callable[[ReplicaAddress, str, float], Awaitable[tuple[int, bytes]]]
LoadAdapter = Callable[[ReplicaAddress, str, str], Awaitable[None]]
_TICK_S = 0.05
_HELD_UP_S = 0.4  # a longer gap between two steps means that this process itself was stalled
_LOAD_TIMEOUT_S = 2.0
_ADAPTERS_INTERVAL_S = 2.0
_ADAPTER_RETRY_S = 30.0  # after a replica could not load one


class _Ready(msgspec.Struct):
    """The fields of Powerband's own /readyz that are read here."""

    engine_restarts: int = 0


class _Models(msgspec.Struct):
    data: list[msgspec.Raw] | None = None


class Prober:
    """fetch(replica, path, timeout_s): status and body; raises OSError (TimeoutError is one)."""

    def __init__(self, pool: Pool, fetch: Fetch, load_adapter: LoadAdapter | None = None) -> None:
        """load_adapter(replica, name, path): raises OSError and PowerbandError."""
        self._pool, self._fetch, self._load_adapter = pool, fetch, load_adapter
        self._due_s: dict[str, float] = {}
        self._load_due_s: dict[str, float] = {}
        self._adapters_due_s: dict[str, float] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._step_s = pool.clock()
        self._held_up_s = 0.0  # when this process was last found stalled

    async def run(self) -> None:
        """Probe until cancelled."""
        try:
            while True:
                try:
                    self.step()
                except Exception:  # probing must go on whatever happens
                    logger.exception("probing of %s", self._pool.model)
                await asyncio.sleep(_TICK_S)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def step(self) -> None:
        """Start the probes and load reports that are due, and check for hung replicas."""
        pool, options, now_s = self._pool, self._pool.options, self._pool.clock()
        self._note_delay(now_s)
        backends = {backend.id: backend for backend in pool.backends}
        for due_s in (self._due_s, self._load_due_s, self._adapters_due_s):
            for gone in due_s.keys() - backends.keys():
                del due_s[gone]
        for backend in backends.values():
            probe_due_s = self._due_s.get(backend.id, 0.0)
            # After a crash, retries wait for replicas to show life.
            is_awaited = probe_due_s - options.probe_interval_s <= pool.crashed_s
            if (is_awaited or now_s >= probe_due_s) and self._begin("probe", backend, self._probe):
                self._due_s[backend.id] = now_s + options.probe_interval_s
            is_due = backend.is_ready and now_s >= self._load_due_s.get(backend.id, 0.0)
            if is_due and self._begin("load", backend, self._read_load):
                self._load_due_s[backend.id] = now_s + options.metrics_interval_s
            is_due = backend.is_ready and now_s >= self._adapters_due_s.get(backend.id, 0.0)
            if is_due and self._begin("adapters", backend, self._read_adapters):
                self._adapters_due_s[backend.id] = now_s + _ADAPTERS_INTERVAL_S
            # A long step is no fault: Powerband's own /readyz distinguishes it from a hung engine.
            is_trusted = pool.address(backend).adapter.ready_shows_progress and backend.is_ready
            # After a stall, this process needs time to read what arrived meanwhile.
            is_awake = now_s - self._held_up_s > options.probe_timeout_s
            # Without another replica, failing its streams would not help; each stream has its own timeouts.
            has_others = pool.has_others((backend.id,))
            if is_awake and not is_trusted and has_others and backend.is_silent(now_s):
                logger.warning(
                    "replica %s is silent; %d requests were running at it", backend.id, len(backend.in_flight)
                )
                pool.hung(backend)

    def _note_delay(self, now_s: float) -> None:
        """Record a stall of this process: silence during it says nothing about the replicas."""
        if now_s - self._step_s > _HELD_UP_S:
            self._held_up_s = now_s
        self._step_s = now_s

    def _begin(
        self, what: str, backend: Backend, function: Callable[[Backend, ReplicaAddress], Coroutine[Any, Any, None]]
    ) -> bool:
        """Start a task unless the previous one still runs. Returns whether it was started."""
        name = (what, backend.id)
        if name in self._tasks:
            return False
        task = self._tasks[name] = asyncio.create_task(function(backend, self._pool.address(backend)))
        task.add_done_callback(partial(self._ended, name))
        return True

    def _ended(self, name: tuple[str, str], task: asyncio.Task[None]) -> None:
        del self._tasks[name]
        if not task.cancelled() and (problem := task.exception()) is not None:
            logger.error("%s of replica %s: %r", *name, problem)

    async def _probe(self, backend: Backend, address: ReplicaAddress) -> None:
        pool, adapter = self._pool, address.adapter
        sent_s, timeout_s = pool.clock(), pool.options.probe_timeout_s / (2 if backend.is_in_doubt else 1)
        try:
            status, body = await self._fetch(address, adapter.ready_path, timeout_s)
        except OSError as problem:
            if isinstance(problem, TimeoutError) or getattr(problem, "code", "") == "timeout":
                self._timed_out(backend, sent_s)
            elif getattr(problem, "code", "") == NO_DESCRIPTORS:
                pass  # says nothing about the replica
            elif backend.probe_failed(pool.clock(), type(problem).__name__):
                self._gone(backend, "unreachable")
        else:
            if status == 200 and not (adapter.ready_path == "/v1/models" and _is_empty_list(body)):
                self._succeeded(backend, address, body)
                return
            self._explain(backend, address, status)
            if backend.probe_failed(pool.clock(), f"http_{status}"):
                logger.warning("replica %s is not ready (HTTP %d)", backend.id, status)
                pool.changed(backend)  # its running requests may still finish

    def _explain(self, backend: Backend, address: ReplicaAddress, status: int) -> None:
        """Log why waiting will not make a replica ready."""
        now_s, path = self._pool.clock(), address.adapter.ready_path
        if status in (401, 403) and backend.may_log(now_s):
            logger.warning("replica %s rejects the gateway's key: GET %s answers %d", backend.id, path, status)
        elif status in (404, 405, 501) and backend.may_log(now_s):
            logger.warning(
                "replica %s is not ready: GET %s answers %d; is its engine %r? 'openai' is any server",
                *(backend.id, path, status, address.engine),
            )

    def _succeeded(self, backend: Backend, address: ReplicaAddress, body: bytes) -> None:
        if address.adapter.ready_shows_progress:
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
                restarts = msgspec.json.decode(body, type=_Ready).engine_restarts
                if backend.restarts not in (None, restarts):
                    self._pool.restarted(backend)
                backend.restarts = restarts
        if backend.probe_succeeded(self._pool.clock(), is_needed=not self._pool.is_ready):
            logger.info("replica %s is ready", backend.id)
            self._pool.changed(backend)

    def _timed_out(self, backend: Backend, sent_s: float) -> None:
        now_s = self._pool.clock()
        self._note_delay(now_s)
        if self._held_up_s >= sent_s:
            return  # it may have answered in time
        if backend.in_flight and now_s - backend.bytes_s < self._pool.options.probe_timeout_s / 2:
            return  # slow to answer, but making progress
        if backend.probe_failed(now_s, "probe_timeout"):
            self._gone(backend, "stopped")

    def _gone(self, backend: Backend, why: str) -> None:
        """The replica is unreachable or frozen: fail all its requests in flight."""
        logger.warning("replica %s is %s; %d requests were running at it", backend.id, why, len(backend.in_flight))
        self._pool.changed(backend)
        backend.fail_in_flight()

    async def _read_load(self, backend: Backend, address: ReplicaAddress) -> None:
        adapter = address.adapter
        if not adapter.metrics_path:
            return
        try:
            status, page = await self._fetch(address, adapter.metrics_path, _LOAD_TIMEOUT_S)
        except OSError:
            return  # failures are left to the probe
        if status == 200:
            load = read_load(page, adapter)
            if load.tokens is not None and (backend.load.tokens or 0.0) < load.tokens:
                backend.bytes_s = max(backend.bytes_s, self._pool.clock() - _LOAD_TIMEOUT_S)
            self._pool.reported(backend, load)

    async def _read_adapters(self, backend: Backend, address: ReplicaAddress) -> None:
        if not address.adapter.lists_adapters:
            return
        try:
            status, body = await self._fetch(address, "/v1/models", _LOAD_TIMEOUT_S)
        except OSError:
            return  # failures are left to the probe
        if status == 200:
            listed = read_models(body)
            names = {model.id for model in listed if model.parent == address.model and model.id != address.model}
            self._pool.adapters[backend.id] = frozenset(names)
            await self._load_missing(backend, address, names)

    async def _load_missing(self, backend: Backend, address: ReplicaAddress, listed: set[str]) -> None:
        """Load what every replica should have, at one that started or restarted later."""
        for name, path in self._pool.wanted_adapters.items():
            if name in listed or self._load_adapter is None:
                continue
            try:
                await self._load_adapter(address, name, path)
            except (OSError, PowerbandError) as problem:
                logger.warning("replica %s has no adapter %r: %s", backend.id, name, problem)
                self._adapters_due_s[backend.id] = self._pool.clock() + _ADAPTER_RETRY_S
            else:
                self._pool.lists_adapter(backend.id, name)


def read_load(page: bytes, adapter: EngineAdapter) -> ReplicaLoad:
    """Parse a page of the engine's metrics. Takes 0.1 ms for 100 kB."""
    names = adapter.metrics
    running, waiting = (first_total(page, names.get(name, ())) for name in ("running", "waiting"))
    counts = [first_total(page, names.get(name, ())) for name in ("prompt_tokens", "output_tokens")]
    known = [count for count in counts if count is not None]
    return ReplicaLoad(
        running=None if running is None else int(running),
        waiting=None if waiting is None else int(waiting),
        kv_usage=first_total(page, names.get("kv_usage", ())),
        tokens=sum(known) if known else None,
    )


def _is_empty_list(body: bytes) -> bool:
    """Whether a list of models is empty: the server is up, but has loaded no model."""
    try:
        return not msgspec.json.decode(body, type=_Models).data
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
