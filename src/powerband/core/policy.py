"""Who is served first. A policy gives every request a key: served in that order, preempted from its end.

policy          order                                               why no request starves
fcfs            arrival                                             the oldest is always first
priority        `priority`, then arrival                            a level waits for those above it: by intent
shortest        prompt length, less what waiting has earned         a second of waiting is worth `tokens_per_s`
longest-prefix  tokens found in the prefix cache, then arrival      after `patience_s` only arrival counts
deadline        deadline; without one, arrival + `default_slack_s`  a missed deadline is renewed, and comes again
fair            tenant with the least service, then arrival         service is counted; idle tenants save up none
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from powerband.core.kv_cache import KVCacheManager
from powerband.core.request import Request
from powerband.errors import UsageError

POLICY_NAMES = ("fcfs", "priority", "shortest", "longest-prefix", "deadline", "fair")


class SchedulingPolicy(Protocol):
    """`key` is a total order (end it with the id). `dynamic`: keys change, and are asked for again each step."""

    dynamic: bool

    def key(self, r: Request, now: float, /) -> tuple[Any, ...]: ...

    def arrived(self, r: Request) -> None:
        """Called once when `r` is accepted."""

    def charge(self, r: Request, num_tokens: int) -> None:
        """Called when `num_tokens` of `r` are scheduled; only if the policy is dynamic."""

    def finished(self, r: Request) -> None:
        """Called once when `r` ends, for whatever reason."""


def make_policy(name: str, kv: KVCacheManager) -> SchedulingPolicy:
    """Return the policy of that name with its default parameters. Raises UsageError for an unknown name."""
    match name:
        case "fcfs":
            return FirstComeFirstServed()
        case "priority":
            return Priority()
        case "shortest":
            return Shortest()
        case "longest-prefix":
            return CachedPrefixFirst(kv)
        case "deadline":
            return Deadline()
        case "fair":
            return FairShare()
    raise UsageError(
        f"There is no scheduling policy {name!r}.", hint=f"Known: {', '.join(POLICY_NAMES)}.", param="scheduling_policy"
    )


class FirstComeFirstServed:
    dynamic = False

    def key(self, r: Request, _now: float, /) -> tuple[Any, ...]:
        return (r.arrival_s, r.id)

    def arrived(self, r: Request) -> None:
        """Nothing to remember."""

    def charge(self, r: Request, num_tokens: int) -> None:
        """Nothing to count."""

    def finished(self, r: Request) -> None:
        """Nothing to forget."""


class Priority(FirstComeFirstServed):
    """Strict levels, lower first: what a client asks for by number it gets, even at the expense of others.

    A running request gives way only when blocks are short; a free seat or block goes to the highest level waiting.
    """

    def key(self, r: Request, _now: float, /) -> tuple[Any, ...]:
        return (r.priority, r.arrival_s, r.id)


class Shortest(FirstComeFirstServed):
    """Short prompts first, for the least mean TTFT. All requests age alike, so the order never changes."""

    def __init__(self, tokens_per_s: float = 1000.0) -> None:
        self.tokens_per_s = tokens_per_s

    def key(self, r: Request, _now: float, /) -> tuple[Any, ...]:
        return (r.num_prompt_tokens + self.tokens_per_s * r.arrival_s, r.arrival_s, r.id)


class CachedPrefixFirst(FirstComeFirstServed):
    """Requests whose prefix is in the cache first, while it is still there."""

    dynamic = True

    def __init__(self, kv: KVCacheManager, patience_s: float = 5.0) -> None:
        self.kv = kv
        self.patience_s = patience_s

    def key(self, r: Request, now: float, /) -> tuple[Any, ...]:
        if r.running or now - r.arrival_s >= self.patience_s:
            return (0, 0, r.arrival_s, r.id)
        return (1, -len(self.kv.matching_blocks(r)), r.arrival_s, r.id)


class Deadline(FirstComeFirstServed):
    """Earliest deadline (of the first token) first.

    Under overload, plain earliest-deadline-first serves requests that are already late and so makes all others late.
    A deadline that has passed is therefore postponed by multiples of `grace_s` until it is in the future.
    """

    dynamic = True

    def __init__(self, default_slack_s: float = 60.0, grace_s: float = 10.0) -> None:
        self.default_slack_s = default_slack_s
        self.grace_s = grace_s

    def key(self, r: Request, now: float, /) -> tuple[Any, ...]:
        deadline_s = r.arrival_s + self.default_slack_s if r.deadline_s is None else r.deadline_s
        if deadline_s < now and r.num_output == 0:
            deadline_s += math.ceil((now - deadline_s) / self.grace_s) * self.grace_s
        return (deadline_s, r.arrival_s, r.id)


class FairShare(FirstComeFirstServed):
    """Equal service for tenants that want it, whatever number of requests each sends.

    Service is tokens scheduled, counted per tenant; the least served tenant is first. One that comes back after
    being idle starts level with the least served active one (virtual token counter: Sheng et al., "Fairness in
    Serving Large Language Models", OSDI 2024).
    """

    dynamic = True

    def __init__(self) -> None:
        self.service: dict[str, int] = {}  # of tenants with live requests
        self._live: dict[str, int] = {}
        self._floor = 0  # service of the tenant that became idle last

    def key(self, r: Request, _now: float, /) -> tuple[Any, ...]:
        return (self.service[r.tenant], r.arrival_s, r.id)

    def arrived(self, r: Request) -> None:
        if r.tenant not in self._live:
            self._live[r.tenant] = 0
            self.service[r.tenant] = min(self.service.values(), default=self._floor)
        self._live[r.tenant] += 1

    def charge(self, r: Request, num_tokens: int) -> None:
        self.service[r.tenant] += num_tokens

    def finished(self, r: Request) -> None:
        self._live[r.tenant] -= 1
        if self._live[r.tenant] == 0:
            del self._live[r.tenant]
            self._floor = self.service.pop(r.tenant)
