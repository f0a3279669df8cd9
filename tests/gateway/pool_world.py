"""A pool in virtual time: an event loop whose clock jumps to the next timer, replicas that a test moves by hand."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from powerband.gateway.dispatch.pool import Pool
from powerband.gateway.pool_options import PoolOptions
from powerband.gateway.request import GatewayRequest
from powerband.gateway.routes import ModelRoute, ReplicaAddress

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Never waits: when nothing is ready, its time jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__(_NoWait(self))
        self.now_s = 1000.0

    def time(self) -> float:
        return self.now_s


class _NoWait(selectors.DefaultSelector):  # type: ignore[misc, valid-type]  # the class differs by platform
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout:
            self._loop.now_s += timeout
        return super().select(0)


def virtually(test: Callable[[VirtualLoop], Awaitable[T]], *, within_s: float = 3600.0) -> T:
    """Run a test in virtual time; it must end within so many virtual seconds."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(asyncio.wait_for(test(loop), within_s))
    finally:
        loop.close()


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
            backend.probed_well(pool.clock())
            pool.changed(backend)


def request(name: str = "r", **more: Any) -> GatewayRequest:
    given = {"prompt_tokens": 10, "output_tokens": 10, "stream": True} | more
    return GatewayRequest(id=name, endpoint="chat", model="m", **given)


async def settle() -> None:
    """Let everything run that can run now."""
    for _ in range(5):
        await asyncio.sleep(0)
