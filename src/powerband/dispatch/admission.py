"""Admission control: may a request wait, and for how long? A request that would be late is rejected at once, with a
Retry-After.

A request's deadline is its own `deadline_s`, else the operator's default, else the SLO's TTFT. The SLO counts only in
a sustained overload: the queue absorbs a spike of a few seconds, or a longer one while a replica is being replaced. In
a sustained overload, a request that has missed its SLO adds nothing to goodput and makes all others late.
"""

from __future__ import annotations

import math

from powerband.dispatch.capacity import Capacity, EstimatesByTenant, ServiceTime
from powerband.dispatch.errors import DeadlineUnreachable, PoolFull, QueueTimeout
from powerband.dispatch.options import DispatchOptions
from powerband.dispatch.queue import FairQueue
from powerband.dispatch.request import DispatchRequest, PriorityLevel

# Headroom: others may go first and measurements vary, yet nearly all admitted requests must meet their deadline.
_SAFETY_FACTOR = 1.25


class AdmissionControl:
    """Admission control of one length pool.

    slo_ttft_s: the SLO's TTFT in seconds; None: no SLO. is_overloaded: the overload has lasted long enough for the SLO
    to count as a deadline. capacity, service: of all requests; `of_tenant`: of each tenant's, by which it is admitted.
    """

    def __init__(self, options: DispatchOptions) -> None:
        self.capacity = Capacity()
        self.service = ServiceTime()
        self.of_tenant = EstimatesByTenant()
        self.slo_ttft_s: float | None = None
        self.is_overloaded = False
        self._options = options
        self._late_since_s: float | None = None
        self._incomplete_s = -math.inf  # the last time that a backend was missing

    def watch(self, queue: FairQueue, now_s: float, *, is_complete: bool) -> None:
        """Update `is_overloaded`; called several times a second. is_complete: every backend is serving."""
        if not is_complete:
            self._incomplete_s = now_s
        if self.slo_ttft_s is None:
            self._late_since_s, self.is_overloaded = None, False
            return
        allowed_s = max(self.slo_ttft_s - self.service.bound_s, 0.0)
        wait_s = self.capacity.wait_s(queue.tokens, queue.requests) if queue.requests else 0.0
        if wait_s is not None and wait_s <= (allowed_s / 2 if self.is_overloaded else allowed_s):
            self._late_since_s, self.is_overloaded = None, False
            return
        if self._late_since_s is None:
            self._late_since_s = now_s
        options = self._options
        is_recovering = now_s - self._incomplete_s < options.recovery_grace_s
        grace_s = options.recovery_grace_s if is_recovering else options.overload_grace_s
        self.is_overloaded = self.is_overloaded or now_s - self._late_since_s >= grace_s

    def record_service(self, tenant: str, seconds: float) -> None:
        """A request got its first token so long after it was sent."""
        self.service.observe(seconds)
        self.of_tenant[tenant].service.observe(seconds)

    def record_end(self, tenant: str, tokens: int, seconds: float) -> None:
        """A request ended. tokens: its upper bound. seconds: since it was sent."""
        self.capacity.ended(tokens, seconds)
        self.of_tenant[tenant].capacity.ended(tokens, seconds)

    def is_late(self, request: DispatchRequest, now_s: float) -> bool:
        """Whether the first token would miss the deadline if the request were dispatched now."""
        deadline_s = self._deadline_s(request, now_s)
        return deadline_s is not None and now_s + self.of_tenant[request.tenant].service.bound_s > deadline_s

    @property
    def is_settled(self) -> bool:
        """Whether `watch` would change nothing while no request waits."""
        return self._late_since_s is None and not self.is_overloaded

    def check_late(self, request: DispatchRequest, now_s: float) -> None:
        """Check a request that can be dispatched at once. Raises DeadlineUnreachable if its deadline has passed."""
        deadline_s = self._deadline_s(request, now_s)
        if deadline_s is not None and now_s >= deadline_s:
            raise self._infeasible(now_s - deadline_s)

    def admit(
        self, request: DispatchRequest, level: PriorityLevel, queue: FairQueue, now_s: float, waiting: tuple[int, int]
    ) -> float:
        """Admit a request to the queue. Returns the latest time at which its wait ends.

        waiting: requests and tokens in the queues of all length pools.

        Raises PoolFull and DeadlineUnreachable.
        """
        wait_s = self._predicted_wait_s(request, level, queue)
        self._check_room(request, queue, wait_s, *waiting)
        latest_s = now_s + self._options.max_queue_wait_s
        deadline_s = self._deadline_s(request, now_s)
        if deadline_s is None:
            return latest_s
        # A request that left the queue at its deadline would get its first token after the deadline.
        latest_s = min(latest_s, deadline_s - self.of_tenant[request.tenant].service.bound_s)
        late_s = now_s + _SAFETY_FACTOR * (wait_s or 0.0) - latest_s
        if late_s > 0:
            raise self._infeasible(late_s)
        return latest_s

    def timeout(self, waited_s: float) -> QueueTimeout:
        return QueueTimeout(
            f"No replica became available within {waited_s:.1f} s.",
            retry_after_s=self.capacity.retry_after_s(None),
            hint="All replicas are busy. Try again later.",
        )

    def _predicted_wait_s(self, request: DispatchRequest, level: PriorityLevel, queue: FairQueue) -> float | None:
        """Seconds until a new request would be dispatched, after all requests ahead of it; None: unknown.

        The lower of two: by the rate of all requests, after those ahead of it; and by the rate of its tenant's
        requests, after the tenant's own ones. Where the tenant has none yet, only the plan says anything.
        """
        ahead = queue.tokens_ahead(level, request.tenant)
        requests_ahead = queue.requests * ahead / queue.tokens if queue.tokens else 0.0
        own_requests, own_tokens, _ = queue.share_of(request.tenant)
        own_ahead = min(ahead, own_tokens)
        own_requests_ahead = own_requests * own_ahead / own_tokens if own_tokens else 0.0
        needed = request.prompt_tokens + request.output_tokens
        own_s = self.of_tenant[request.tenant].capacity.wait_s(own_ahead + needed, own_requests_ahead + 1)
        if own_s is None:
            return self.capacity.planned_wait_s(requests_ahead + 1)
        wait_s = self.capacity.wait_s(ahead + needed, requests_ahead + 1)
        return own_s if wait_s is None else min(own_s, wait_s)

    def _check_room(
        self, request: DispatchRequest, queue: FairQueue, wait_s: float | None, requests: int, tokens: int
    ) -> None:
        options, capacity = self._options, self.capacity
        own = request.prompt_tokens + request.output_tokens
        over = tokens + own - options.max_queued_tokens
        is_full = requests >= options.max_queued_requests
        if (is_full or over > 0) and self._is_within_share(request, queue):
            return
        if is_full:
            what = f"requests waiting: {requests}; the limit is {options.max_queued_requests}"
            until_room_s = capacity.wait_s(tokens / requests, 1)
        elif requests and over > 0:  # an empty queue takes any request
            what = f"{tokens} tokens are waiting and this takes up to {own}; the limit is {options.max_queued_tokens}"
            until_room_s = capacity.wait_s(over, requests * over / tokens)
        elif wait_s is not None and wait_s > options.max_queue_wait_s:
            what = f"the wait would be {wait_s:.0f} s; the limit is {options.max_queue_wait_s:g} s"
            until_room_s = wait_s - options.max_queue_wait_s
        else:
            return
        retry_after_s = capacity.retry_after_s(until_room_s)
        hint = f"Try again in {retry_after_s:.1f} s, or add replicas."
        raise PoolFull(f"All replicas are busy: {what}.", retry_after_s=retry_after_s, hint=hint)

    def _is_within_share(self, request: DispatchRequest, queue: FairQueue) -> bool:
        """Whether the request's tenant holds less than half of its fair share of the queue.

        Such a request is admitted even if the queue is full, so that one tenant cannot lock out the others. A tenant
        that is alone gets nothing beyond the limit.
        """
        num_requests, num_tokens, num_tenants = queue.share_of(request.tenant)
        if num_tenants < 2:
            return False
        max_requests, max_tokens = self._options.max_queued_requests, self._options.max_queued_tokens
        own = request.prompt_tokens + request.output_tokens
        return num_requests < max_requests / (2 * num_tenants) and num_tokens + own <= max_tokens / (2 * num_tenants)

    def _infeasible(self, late_s: float) -> DeadlineUnreachable:
        return DeadlineUnreachable(
            f"The first token would come {late_s:.2f} s after the deadline.",
            retry_after_s=self.capacity.retry_after_s(late_s),
            hint="Allow more time, or try again later.",
        )

    def _deadline_s(self, request: DispatchRequest, now_s: float) -> float | None:
        if request.deadline_s is not None:
            return request.deadline_s
        allowed_s = self._options.default_deadline_s
        if allowed_s is None and self.is_overloaded:
            allowed_s = self.slo_ttft_s
        return None if allowed_s is None else (request.arrival_s or now_s) + allowed_s
