"""What replicas serve, asked of them: for a gateway that was only told where they are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from powerband.errors import EnvironmentFault
from powerband.gateway.proxy.upstream import Upstream
from powerband.gateway.routes import ModelRoute, ReplicaAddress, Routes
from powerband.spec.deployment import ENGINES, EngineName

PATIENCE_S = 60.0
_ASK_S = 5.0
_PAUSE_S = 0.2


async def discover(upstream: Upstream, urls: Sequence[str], patience_s: float = PATIENCE_S) -> Routes:
    """Routes to these replicas, under the names that they serve. Waits for those that are starting.

    Raises EnvironmentFault when one does not answer in time, and UsageError for what is no URL.
    """
    deadline_s = time.monotonic() + patience_s
    found = await asyncio.gather(*(_ask(upstream, url.rstrip("/"), deadline_s) for url in dict.fromkeys(urls)))
    models: dict[str, list[ReplicaAddress]] = {}
    for replica in found:
        models.setdefault(replica.model, []).append(replica)
    return Routes(models=tuple(ModelRoute(name=name, replicas=tuple(some)) for name, some in models.items()))


async def _ask(upstream: Upstream, url: str, deadline_s: float) -> ReplicaAddress:
    replica = ReplicaAddress(id=url.partition("://")[2], url=url, model="")
    problem = ""
    while time.monotonic() < deadline_s:
        try:
            card = await _first_card(upstream, replica)
            if card is not None:
                engine = _engine(str(card.get("owned_by", "")))
                asked = ReplicaAddress(id=replica.id, url=url, model=str(card["id"]), engine=engine)
                return await _with_limit(upstream, asked)
        except OSError as error:
            problem = f" {error}"
        await asyncio.sleep(_PAUSE_S)
    raise EnvironmentFault(
        f"The replica at {url} does not say what it serves.{problem}",
        hint="Is it started? GET /v1/models must answer.",
        code="no_replica",
        param="replica",
    )


async def _first_card(upstream: Upstream, replica: ReplicaAddress) -> dict[str, Any] | None:
    status, body = await upstream.fetch(replica, "/v1/models", _ASK_S)
    try:
        cards = msgspec.json.decode(body)["data"] if status == 200 else []
        return next((card for card in cards if isinstance(card.get("id"), str)), None)
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return None


async def _with_limit(upstream: Upstream, replica: ReplicaAddress) -> ReplicaAddress:
    """Our own engine says how many requests it computes at once."""
    if replica.engine != "powerband":
        return replica
    status, body = await upstream.fetch(replica, "/admin/config", _ASK_S)
    try:
        limit = int(msgspec.json.decode(body)["engine"]["max_num_seqs"]) if status == 200 else replica.max_num_seqs
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return replica
    return ReplicaAddress(
        id=replica.id, url=replica.url, model=replica.model, engine=replica.engine, max_num_seqs=max(1, limit)
    )


def _engine(owner: str) -> EngineName:
    return next((name for name in ENGINES if name == owner), "powerband")
