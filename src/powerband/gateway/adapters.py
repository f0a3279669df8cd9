"""LoRA adapters of served models: loaded at every replica, those that start later included, until they are unloaded.

    POST /v1/load_lora_adapter ──► all ready replicas ──► routes (`adapters`), stored ──► prober: replicas that lack one

The routes say what replicas should have; what they list in /v1/models is what requests are sent to.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from powerband.errors import InvalidRequest, PowerbandError
from powerband.gateway.accounts.accounts import Accounts, actor_of
from powerband.gateway.gateway import Gateway, ServedModel
from powerband.gateway.routes import MAX_NAME, AdapterRoute, ReplicaAddress
from powerband.gateway.upstream.adapters import load_adapter, unload_adapter
from powerband.web.access import refuse_browsers
from powerband.web.body import decode, read_body
from powerband.web.errors import HttpError, json_response

logger = logging.getLogger(__name__)


class LoadAdapterBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """model: a served one; it may be left out if there is only one. lora_path: as the replicas see it."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    model: str | None = None


class UnloadAdapterBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    lora_name: str


class GatewayAdapterRoutes:
    """vLLM's routes, for administrators."""

    def __init__(self, gateway: Gateway, accounts: Accounts) -> None:
        self._gateway = gateway
        self._accounts = accounts
        self._changing = asyncio.Lock()

    async def load(self, request: Request) -> Response:
        """Load an adapter at every replica of a model; answered when all that are ready have it. If one refuses, no
        replica keeps it.
        """
        refuse_browsers(request)
        body = decode(await read_body(request, self._gateway.settings.max_body_bytes), LoadAdapterBody)
        async with self._changing:
            served = self._base(body)
            addresses = self._ready(served)
            load = [self._load(one, body) for one in addresses]
            results = await asyncio.gather(*load, return_exceptions=True)
            refused = next((one for one in results if isinstance(one, PowerbandError)), None)
            if refused is not None:
                done = [one for one, result in zip(addresses, results, strict=True) if result is None]
                await asyncio.gather(*(self._unload(one, body.lora_name) for one in done), return_exceptions=True)
                raise refused
            if all(result is not None for result in results):
                raise HttpError(
                    503, "no_replica", f"No replica could load it now: {results[0]}", hint="Try again later."
                )
            route = AdapterRoute(name=body.lora_name, path=body.lora_path, model=served.route.name)
            self._gateway.set_routes(self._gateway.routes.with_adapter(route))
            for address, result in zip(addresses, results, strict=True):
                if result is None:
                    served.pool.lists_adapter(address.id, route.name)
                else:
                    logger.warning("The adapter %r is loaded at %s later: %s", route.name, address.id, result)
            what = {"adapter": route.name, "path": route.path, "model": route.model}
            self._accounts.audit(actor_of(request), "adapters.load", what)
        loaded = sum(result is None for result in results)
        return json_response({"id": route.name, "object": "model", "parent": route.model, "replicas": loaded})

    async def unload(self, request: Request) -> Response:
        """Unload an adapter at every replica that lists it; requests that run end with it."""
        refuse_browsers(request)
        body = decode(await read_body(request, self._gateway.settings.max_body_bytes), UnloadAdapterBody)
        name, gateway = body.lora_name, self._gateway
        async with self._changing:
            known = gateway.routes.adapter(name)
            if known is None and name not in gateway.adapters():
                raise HttpError(404, "adapter_not_found", f"There is no adapter {name[:100]!r}.", param="lora_name")
            served = gateway.served(known.model if known is not None else name)
            gateway.set_routes(gateway.routes.without_adapter(name))
            holders = [one for one in served.pool.addresses if name in served.pool.adapters.get(one.id, ())]
            results = await asyncio.gather(*(self._unload(one, name) for one in holders), return_exceptions=True)
            for address, result in zip(holders, results, strict=True):
                if result is None:
                    served.pool.lists_adapter(address.id, name, listed=False)
            self._accounts.audit(actor_of(request), "adapters.unload", {"adapter": name})
        failed = [f"{one.id}: {result}" for one, result in zip(holders, results, strict=True) if result is not None]
        if failed:
            shown = "; ".join(failed)[:500]
            hint = "Send it again, or end these replicas."
            raise HttpError(502, "adapter_not_unloaded", f"Not every replica unloaded {name!r}: {shown}", hint=hint)
        return json_response({"id": name, "object": "model", "deleted": True})

    def _base(self, body: LoadAdapterBody) -> ServedModel:
        """The model that gets the adapter. Raises PowerbandError."""
        name, gateway = body.lora_name, self._gateway
        if not (0 < len(name) <= MAX_NAME and name.isprintable()):
            raise InvalidRequest(f"'lora_name' has 1 to {MAX_NAME} printable characters.", param="lora_name")
        if name in gateway.names():
            raise InvalidRequest(f"{name!r} is a model's name.", hint="Choose another.", param="lora_name")
        served = gateway.served(body.model)
        if served.adapter:
            raise InvalidRequest(f"{body.model!r} is an adapter.", hint=f"Name {served.pool.model!r}.", param="model")
        lacking = [one for one in served.route.replicas if not one.adapter.lists_adapters]
        if lacking or not served.route.replicas:
            shown = f"has a replica of {lacking[0].adapter.display_name}" if lacking else "has no replicas"
            hint = "Replicas of Powerband and vLLM load adapters."
            raise InvalidRequest(f"The model {served.route.name!r} {shown}.", hint=hint, param="model")
        if (known := gateway.routes.adapter(name)) is not None and known.model != served.route.name:
            hint = "Unload it first, or choose another name."
            raise InvalidRequest(f"{name!r} is an adapter of {known.model!r}.", hint=hint, param="lora_name")
        return served

    def _ready(self, served: ServedModel) -> Sequence[ReplicaAddress]:
        ready = {backend.id for backend in served.pool.backends if backend.is_ready}
        found = [one for one in served.pool.addresses if one.id in ready]
        if not found:
            raise HttpError(
                503, "no_replica", f"No replica of {served.route.name!r} is ready.", hint="Try again later."
            )
        return found

    async def _load(self, address: ReplicaAddress, body: LoadAdapterBody) -> None:
        name, path = body.lora_name, body.lora_path
        await load_adapter(self._gateway.upstream, address, name, path, in_place=body.load_inplace)

    async def _unload(self, address: ReplicaAddress, name: str) -> None:
        await unload_adapter(self._gateway.upstream, address, name)
