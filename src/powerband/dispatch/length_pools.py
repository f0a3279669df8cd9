"""Length pools: the backends with the same maximum prompt length, their queue and their throughput.

Replicas with equal limits form one length pool.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from powerband.dispatch.admission import AdmissionControl
from powerband.dispatch.backend import Backend
from powerband.dispatch.options import DispatchOptions
from powerband.dispatch.queue import FairQueue
from powerband.dispatch.request import DispatchRequest


class LengthPool:
    """`serving`: the backends that get its requests: its own, or while none of them serves, the next longer pool's."""

    def __init__(self, max_prompt_tokens: float, options: DispatchOptions) -> None:
        self.max_prompt_tokens = max_prompt_tokens
        self.queue = FairQueue()
        self.admission = AdmissionControl(options)
        self.serving: list[Backend] = []

    def observe(self, now_s: float) -> None:
        """Update the capacity measurement after the queue or the backends have changed."""
        is_saturated = self.queue.requests > 0
        num_in_flight = sum(len(backend.in_flight) for backend in self.serving) if is_saturated else 0
        self.admission.capacity.observe(now_s, is_saturated, len(self.serving), num_in_flight)

    def observe_tenant(self, tenant: str, num_in_flight: int, now_s: float) -> None:
        """Update a tenant's capacity measurement after its queued or running requests have changed."""
        is_waiting = self.queue.share_of(tenant)[0] > 0
        self.admission.of_tenant[tenant].capacity.observe(now_s, is_waiting, len(self.serving), num_in_flight)


def _max_prompt_tokens(backend: Backend) -> float:
    limit = backend.spec.max_prompt_tokens
    return math.inf if limit is None else limit


def pool_for(request: DispatchRequest, pools: Sequence[LengthPool]) -> LengthPool:
    """The pool with the smallest limit that fits the prompt. Prompt lengths are estimates, so the last pool takes the
    rest.
    """
    for pool in pools:
        if request.prompt_tokens <= pool.max_prompt_tokens:
            return pool
    return pools[-1]


def arrange(pools: Sequence[LengthPool], backends: Iterable[Backend], options: DispatchOptions) -> list[LengthPool]:
    """Pools for these backends, smallest limit first. Moves queued requests to the pools they now belong to."""
    backends = list(backends)
    wanted = sorted({_max_prompt_tokens(backend) for backend in backends}) or [math.inf]
    if wanted != [pool.max_prompt_tokens for pool in pools]:
        known = {pool.max_prompt_tokens: pool for pool in pools}
        new = [known.get(limit) or LengthPool(limit, options) for limit in wanted]
        for pool in pools:
            for queued in tuple(pool.queue):
                if (target := pool_for(queued.request, new)) is not pool:
                    pool.queue.remove(queued)
                    target.queue.push(queued)
        pools = new
    serving: list[Backend] = []
    for pool in reversed(pools):
        own = [b for b in backends if b.is_serving and _max_prompt_tokens(b) == pool.max_prompt_tokens]
        pool.serving = serving = own or serving
    return list(pools)
