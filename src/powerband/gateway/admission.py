"""Whether a request may wait, and until when: refuse at once, with an honest time to come back, rather than late."""

from __future__ import annotations

from powerband.gateway.capacity import Capacity, ServiceTime
from powerband.gateway.pool_errors import DeadlineInfeasible, Expired, PoolFull
from powerband.gateway.pool_options import PoolOptions
from powerband.gateway.queue import FairQueue, Level
from powerband.gateway.request import GatewayRequest


class Admission:
    def __init__(self, options: PoolOptions) -> None:
        self.capacity = Capacity()
        self.service = ServiceTime()
        self._options = options

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
        late_s = now_s + (wait_s or 0.0) - latest_s
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
        if request.deadline_s is not None or self._options.default_deadline_s is None:
            return request.deadline_s
        return (request.arrival_s or now_s) + self._options.default_deadline_s
