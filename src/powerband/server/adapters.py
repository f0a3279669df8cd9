"""The LoRA adapters of a replica: served under names of their own, loaded and unloaded while it runs."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

import msgspec

from powerband.engine.client.messages import AdapterInfo, EngineInfo
from powerband.engine.client.supervisor import EngineProcess
from powerband.errors import InvalidRequest, PowerbandError
from powerband.web.errors import HttpError

logger = logging.getLogger(__name__)

_LOAD_TIMEOUT_S = 600.0  # an adapter may have to be fetched
# What an engine raises for files that are not there: here, it is the request that names them.
_REQUEST_IS_WRONG = ("adapter_not_found", "pickled_weights", "bad_weights")


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    info: AdapterInfo
    created_s: int = field(default_factory=lambda: int(time.time()))


class ServedAdapters:
    """The engine has the weights; here is decided which names requests may use. Belongs to one event loop."""

    def __init__(self) -> None:
        self._served: dict[str, ServedAdapter] = {}
        self._restoring: dict[str, str] = {}  # name → source, of those that an engine lost when it died
        self._task: asyncio.Task[None] | None = None

    def all(self) -> list[ServedAdapter]:
        return list(self._served.values())

    def find(self, name: str) -> ServedAdapter | None:
        """None: there is none of this name. Raises HttpError 503 while it is loaded again after the engine died."""
        if name in self._restoring:
            hint = "Try again in a moment."
            raise HttpError(503, "engine_unavailable", f"The adapter {name!r} is being loaded again.", hint=hint)
        return self._served.get(name)

    async def load(self, engine: EngineProcess, name: str, source: str, *, replace: bool = False) -> ServedAdapter:
        """Load an adapter; requests with others go on. Raises the engine's refusal."""
        try:
            value = await engine.call(
                "load_adapter", timeout_s=_LOAD_TIMEOUT_S, name=name, source=source, replace=replace
            )
        except PowerbandError as error:
            if error.code in _REQUEST_IS_WRONG:
                raise InvalidRequest(error.message, hint=error.hint, code=error.code, param="lora_path") from error
            raise
        adapter = ServedAdapter(msgspec.convert(value, AdapterInfo))
        self._restoring.pop(name, None)
        self._served[name] = adapter
        return adapter

    async def unload(self, engine: EngineProcess, name: str) -> None:
        """Take no further requests for it; those that run keep its weights until they end. Raises HttpError 404."""
        known = self._served.pop(name, None) is not None or self._restoring.pop(name, None) is not None
        if not known:
            raise HttpError(404, "adapter_not_found", f"There is no adapter {name[:100]!r}.", param="lora_name")
        await engine.call("unload_adapter", name=name)

    def engine_started(self, info: EngineInfo) -> None:
        self._served = {one.name: ServedAdapter(one) for one in info.adapters}

    def engine_restarted(self, engine: EngineProcess, info: EngineInfo) -> None:
        """A new engine has what its settings name: make that what was served when the old one died."""
        wanted = {name: adapter.info.source for name, adapter in self._served.items()} | self._restoring
        there = {one.name: one for one in info.adapters}
        self._served = {name: ServedAdapter(one) for name, one in there.items() if wanted.get(name) == one.source}
        self._restoring = {name: source for name, source in wanted.items() if name not in self._served}
        not_wanted = [name for name in there if name not in wanted]
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.create_task(self._restore(engine, not_wanted), name="adapters")

    async def _restore(self, engine: EngineProcess, not_wanted: list[str]) -> None:
        for name in not_wanted:
            await engine.call("unload_adapter", name=name)
        for name, source in list(self._restoring.items()):
            try:
                await self.load(engine, name, source, replace=True)
            except PowerbandError as error:
                if error.code.startswith("engine"):
                    return  # it has died again
                self._restoring.pop(name, None)
                logger.error("The adapter %r is not served any more: %s", name, error)
