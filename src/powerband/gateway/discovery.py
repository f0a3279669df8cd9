"""Discovers what replicas serve, for a gateway that knows only their addresses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from powerband.engines.base import ServerName
from powerband.engines.openai import OPENAI
from powerband.engines.registry import ADAPTERS, find_by_owner
from powerband.errors import EnvironmentFault
from powerband.gateway.routes import ModelRoute, ReplicaAddress, Routes
from powerband.gateway.upstream.client import UpstreamClient
from powerband.http_client.request import server_url
from powerband.openai.fields import ListedModel, read_models

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0
_ASK_S = 5.0
_PAUSE_S = 0.2


async def discover(
    upstream: UpstreamClient, urls: Sequence[str], engine: ServerName | None = None, patience_s: float = PATIENCE_S
) -> Routes:
    """Routes to these replicas, under the model names that they serve. Waits for replicas that are starting.

    urls: with or without scheme and /v1. engine: what they run; None: detected from their responses, and logged.
    Raises EnvironmentFault if a replica does not answer in time, and UsageError for an invalid URL.
    """
    deadline_s = time.monotonic() + patience_s
    addresses = dict.fromkeys(server_url(url, "replica") for url in urls)
    found = await asyncio.gather(*(_ask(upstream, url, engine, deadline_s) for url in addresses))
    models: dict[str, list[ReplicaAddress]] = {}
    for replica in found:
        models.setdefault(replica.model, []).append(replica)
    return Routes(models=tuple(ModelRoute(name=name, replicas=tuple(some)) for name, some in models.items()))


async def _ask(upstream: UpstreamClient, url: str, engine: ServerName | None, deadline_s: float) -> ReplicaAddress:
    replica = ReplicaAddress(id=url.partition("://")[2], url=url, model="", engine=OPENAI.name)
    problem, reported = "", ""
    while time.monotonic() < deadline_s:
        try:
            status, body = await upstream.fetch(replica, "/v1/models", _ASK_S)
            problem = f" GET /v1/models answers {status}."
            models = read_models(body) if status == 200 else []
            if models:
                return await _identified(upstream, replica, models, engine)
            problem += " It lists no model." if status == 200 else ""
            if status in (401, 403):
                break
        except OSError as error:
            problem = f" {error}"
        if problem != reported:
            logger.info("waiting for the replica at %s:%s", url, problem)
            reported = problem
        await asyncio.sleep(_PAUSE_S)
    raise EnvironmentFault(
        f"The replica at {url} did not report which models it serves.{problem}",
        hint="Is it running? GET /v1/models must answer. Replicas that need an API key must be listed with --routes.",
        code="no_replica",
        param="replica",
    )


async def _identified(
    upstream: UpstreamClient, replica: ReplicaAddress, models: Sequence[ListedModel], engine: ServerName | None
) -> ReplicaAddress:
    """The address with its model, engine and limits. Raises OSError."""
    model, owner = models[0].id, models[0].owned_by or ""
    if engine is not None:
        adapter, why = ADAPTERS[engine], "as --replica-engine says"
    else:
        adapter = find_by_owner(owner) or OPENAI
        why = f"its models are owned by {owner!r}" if owner else "its models name no owner"
        status, _ = await upstream.fetch(replica, adapter.ready_path, _ASK_S)
        if status in (404, 405, 501) and adapter is not OPENAI:  # another server with the same `owned_by`
            adapter, why = OPENAI, f"{why}, but GET {adapter.ready_path} answers {status}"
    logger.info(
        "replica %s: engine %s (%s), model %r%s; probed at %s; %s",
        *(replica.id, adapter.name, why, model, f", the first of {len(models)}" if len(models) > 1 else ""),
        *(adapter.ready_path, adapter.resume_text),
    )
    return await _with_limit(upstream, replace(replica, model=model, engine=adapter.name))


async def _with_limit(upstream: UpstreamClient, replica: ReplicaAddress) -> ReplicaAddress:
    """The address with max_num_seqs, if the engine reports it."""
    path = replica.adapter.config_path
    if not path:
        return replica
    status, body = await upstream.fetch(replica, path, _ASK_S)
    try:
        limit = int(msgspec.json.decode(body)["engine"]["max_num_seqs"]) if status == 200 else replica.max_num_seqs
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return replica
    return replace(replica, max_num_seqs=max(1, limit))
