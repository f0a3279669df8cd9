"""A pool in virtual time, with replicas that a test moves by hand."""

from __future__ import annotations

import asyncio
from typing import Any

from powerband.gateway.dispatch.pool import Pool
from powerband.gateway.options import PoolOptions
from powerband.gateway.request import GatewayRequest
from powerband.gateway.routes import ModelRoute, ReplicaAddress
from virtual_loop import VirtualLoop


def replica(name: str, max_num_seqs: int = 4, **more: Any) -> ReplicaAddress:
    return ReplicaAddress(id=name, url=f"http://{name}:1", model="m", max_num_seqs=max_num_seqs, **more)


def make_pool(loop: VirtualLoop, *replicas: ReplicaAddress, ready: bool = True, **options: Any) -> Pool:
    pool = Pool(PoolOptions(**options), clock=loop.time)
    pool.update(ModelRoute(name="m", replicas=replicas))
    if ready:
        make_ready(pool)
    return pool


def make_ready(pool: Pool, *names: str) -> None:
    for backend in pool.backends:
        if not names or backend.id in names:
            backend.probe_succeeded(pool.clock())
            pool.changed(backend)


def request(name: str = "r", **more: Any) -> GatewayRequest:
    given = {"prompt_tokens": 10, "output_tokens": 10, "stream": True} | more
    return GatewayRequest(id=name, endpoint="chat", model="m", **given)


async def settle() -> None:
    """Let everything run that can run now."""
    for _ in range(5):
        await asyncio.sleep(0)
