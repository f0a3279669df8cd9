"""Whether a request may wait, and until when: refuse at once, with an honest time to come back, rather than late.

A request's deadline is the one it names, or the operator's default, or what the SLO says of the first token. The last
is no one's wish for this request: it counts only in an overload that lasts. A dip of a few seconds is sat out, a longer
one while a replica is replaced; but who waited longer than the SLO allows is of no use to goodput, and would make all
others late.
"""

from __future__ import annotations

import math

from powerband.gateway.dispatch.capacity import Capacity, ServiceTime
from powerband.gateway.dispatch.pool_errors import DeadlineInfeasible, Expired, PoolFull
from powerband.gateway.dispatch.queue import FairQueue, Level
from powerband.gateway.pool_options import PoolOptions
from powerband.gateway.request import GatewayRequest

# Others may go first, and measurements waver: nearly all that is accepted for a deadline is to be served by it.
_CAUTION = 1.25


class Admission:
    """slo_ttft_s: seconds to the first token that are promised; None: nothing is. is_overload: one that lasts."""

    def __init__(self, options: PoolOptions) -> None:
        self.capacity = Capacity()
        self.service = ServiceTime()
        self.slo_ttft_s: float | None = None
        self.is_overload = False
        self._options = options
        self._late_since_s: float | None = None
        self._broken_s = -math.inf  # when a replica was missing, last

    def watch(self, queue: FairQueue, now_s: float, *, is_whole: bool) -> None:
        """Called several times a second. is_whole: every replica takes requests."""
        if not is_whole:
            self._broken_s = now_s
        if self.slo_ttft_s is None:
            self.is_overload = False
            return
        allowed_s = max(self.slo_ttft_s - self.service.bound_s, 0.0)
        wait_s = self.capacity.wait_s(queue.tokens, queue.requests) if queue.requests else 0.0
        if wait_s is not None and wait_s <= (allowed_s / 2 if self.is_overload else allowed_s):
            self._late_since_s, self.is_overload = None, False
            return
        if self._late_since_s is None:
            self._late_since_s = now_s
        options = self._options
        is_mending = now_s - self._broken_s < options.mending_s
        patience_s = options.mending_s if is_mending else options.overload_after_s
        self.is_overload = self.is_overload or now_s - self._late_since_s >= patience_s

    def is_late(self, request: GatewayRequest, now_s: float) -> bool:
        """It waits, and its first token would come too late if it were dispatched now."""
        deadline_s = self._deadline_s(request, now_s)
        return deadline_s is not None and now_s + self.service.bound_s > deadline_s

    def check_late(self, request: GatewayRequest, now_s: float) -> None:
        """There is a place for it. Raises DeadlineInfeasible if its deadline has passed all the same."""
        deadline_s = self._deadline_s(request, now_s)
        if deadline_s is not None and now_s >= deadline_s:
            raise self._infeasible(now_s - deadline_s)

    def admit(
        self, request: GatewayRequest, level: Level, queue: FairQueue, now_s: float, waiting: tuple[int, int]
    ) -> float:
        """When it need not be served any more. waiting: requests and tokens in this and other queues of the pool.

        Raises PoolFull and DeadlineInfeasible.
        """
        wait_s = self._predicted_wait_s(request, level, queue)
        self._check_room(request, wait_s, *waiting)
        latest_s = now_s + self._options.longest_wait_s
        deadline_s = self._deadline_s(request, now_s)
        if deadline_s is None:
            return latest_s
        # What leaves the queue at the deadline has its first token after it.
        latest_s = min(latest_s, deadline_s - self.service.bound_s)
        late_s = now_s + _CAUTION * (wait_s or 0.0) - latest_s
        if late_s > 0:
            raise self._infeasible(late_s)
        return latest_s

    def expired(self, waited_s: float) -> Expired:
        return Expired(
            f"It waited {waited_s:.1f} s for a replica, in vain.",
            retry_after_s=self.capacity.retry_after_s(None),
            hint="All replicas are busy. Try again later.",
        )

    def _predicted_wait_s(self, request: GatewayRequest, level: Level, queue: FairQueue) -> float | None:
        """Until a request that came now is dispatched: all that goes before it, and itself."""
        ahead = queue.tokens_ahead(level, request.tenant)
        requests = queue.requests * ahead / queue.tokens if queue.tokens else 0.0
        return self.capacity.wait_s(ahead + request.prompt_tokens + request.output_tokens, requests + 1)

    def _check_room(self, request: GatewayRequest, wait_s: float | None, requests: int, tokens: int) -> None:
        options, capacity = self._options, self.capacity
        own = request.prompt_tokens + request.output_tokens
        over = tokens + own - options.max_queued_tokens
        if requests >= options.max_queued_requests:
            what = f"{requests} requests are waiting; the limit is {options.max_queued_requests}"
            until_room_s = capacity.wait_s(tokens / requests, 1)
        elif requests and over > 0:  # an empty queue takes any request
            what = f"{tokens} tokens are waiting and this takes up to {own}; the limit is {options.max_queued_tokens}"
            until_room_s = capacity.wait_s(over, requests * over / tokens)
        elif wait_s is not None and wait_s > options.longest_wait_s:
            what = f"the wait would be {wait_s:.0f} s; the limit is {options.longest_wait_s:g} s"
            until_room_s = wait_s - options.longest_wait_s
        else:
            return
        retry_after_s = capacity.retry_after_s(until_room_s)
        hint = f"Try again in {retry_after_s:.1f} s, or add replicas."
        raise PoolFull(f"All replicas are busy: {what}.", retry_after_s=retry_after_s, hint=hint)

    def _infeasible(self, late_s: float) -> DeadlineInfeasible:
        return DeadlineInfeasible(
            f"The first token would come {late_s:.2f} s after the deadline.",
            retry_after_s=self.capacity.retry_after_s(late_s),
            hint="Allow more time, or try again later.",
        )

    def _deadline_s(self, request: GatewayRequest, now_s: float) -> float | None:
        if request.deadline_s is not None:
            return request.deadline_s
        allowed_s = self._options.default_deadline_s
        if allowed_s is None and self.is_overload:
            allowed_s = self.slo_ttft_s
        return None if allowed_s is None else (request.arrival_s or now_s) + allowed_s
