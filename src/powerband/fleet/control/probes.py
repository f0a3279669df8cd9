"""Readiness probes: one task per instance, so that a hung instance does not delay the probes of others."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from powerband.fleet.targets.base import Instance
from powerband.http_client.request import Response, bearer, request

PROBE_INTERVAL_S = 0.4
_TIMEOUT_S = 2.0
_PROBES_PER_METRICS_READ = 3
_MAX_NOTE_CHARACTERS = 200


@dataclass(slots=True)
class ProbeResult:
    """What the probes of an instance have found so far. Times on time.monotonic()."""

    ready_s: float | None = None  # when it last reported that it is ready
    response_s: float | None = None  # when it last responded at all
    failures: int = 0  # consecutive probes without a response
    timeouts: int = 0  # how many of the latest failures were timeouts: it may accept connections, but hang
    note: str = ""  # why it is not ready
    metrics: str = ""  # its latest /metrics page
    engine_restarts: int = 0  # how often it has started its own engine again
    engine_exit: str = ""  # why, the last time
    engine_exit_code: int | None = None  # then; 128 + the signal's number when a signal ended it


class _Ready(msgspec.Struct):
    """What a replica of ours answers when it is ready."""

    engine_restarts: int = 0
    engine_exit: str = ""
    engine_exit_code: int | None = None


class HealthProber:
    """Runs in the controller's event loop. api_key: the replicas' API key; it may be set at any time."""

    def __init__(self) -> None:
        self.api_key = ""
        self._results: dict[str, ProbeResult] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def set_targets(self, instances: Mapping[str, Instance]) -> None:
        """Probe exactly these instances from now on. instances: by id."""
        for id in self._tasks.keys() - instances.keys():
            self._tasks.pop(id).cancel()
            del self._results[id]
        for id in instances.keys() - self._tasks.keys():
            result = self._results[id] = ProbeResult()
            self._tasks[id] = asyncio.create_task(self._probe_forever(result, instances[id]), name=f"probe {id}")

    def result(self, id: str) -> ProbeResult:
        """An empty result for an instance that is not probed."""
        return self._results.get(id) or ProbeResult()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        self.set_targets({})
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _probe_forever(self, result: ProbeResult, instance: Instance) -> None:
        for count in itertools.count():
            await self._probe(result, instance)
            if instance.role == "replica" and count % _PROBES_PER_METRICS_READ == 0 and result.ready_s is not None:
                await self._read_metrics(result, instance)
            await asyncio.sleep(0.0 if result.timeouts else PROBE_INTERVAL_S)  # a timeout has waited long enough

    async def _probe(self, result: ProbeResult, instance: Instance) -> None:
        try:
            response = await self._get(instance, instance.ready_path)
        except (OSError, ValueError) as error:
            result.failures += 1
            result.timeouts = result.timeouts + 1 if isinstance(error, TimeoutError) else 0
            result.note = str(error) or "no response"
            return
        result.failures = result.timeouts = 0
        result.response_s = time.monotonic()
        if response.status == 200:
            result.ready_s = result.response_s
            if instance.role == "replica":
                _read_engine(response.body, result)
        result.note = "" if response.status == 200 else _error_message(response)

    async def _read_metrics(self, result: ProbeResult, instance: Instance) -> None:
        result.metrics = ""
        with suppress(OSError, ValueError):
            response = await self._get(instance, instance.metrics_path)
            result.metrics = response.body.decode(errors="replace") if response.status == 200 else ""

    async def _get(self, instance: Instance, path: str) -> Response:
        headers = bearer(self.api_key) if instance.role == "replica" else {}
        return await request("GET", f"{instance.url}{path}", headers=headers, timeout_s=_TIMEOUT_S)


def _read_engine(body: bytes, result: ProbeResult) -> None:
    """Other engines answer otherwise, or nothing."""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        found = msgspec.json.decode(body, type=_Ready)
        result.engine_restarts = found.engine_restarts
        result.engine_exit = found.engine_exit[:_MAX_NOTE_CHARACTERS]
        result.engine_exit_code = found.engine_exit_code


def _error_message(response: Response) -> str:
    body = response.json()
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message", "") if isinstance(error, dict) else ""
    return str(message)[:_MAX_NOTE_CHARACTERS]
