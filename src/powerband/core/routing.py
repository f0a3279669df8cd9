"""Which replica a request goes to. Pure bookkeeping of what was sent and answered; the gateway and the simulator ask.

policy             next                                        good for
round robin        the next one                                equal requests
least outstanding  the one with the least work left to answer  anything else: long requests do not pile up
by prompt length   a pool for each range of lengths            replicas of different devices
sticky             the one that the session was sent to last   turns that find their prefix in its cache
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, Protocol


class RoutingPolicy(Protocol):
    """Replicas are numbered from 0. `session`: requests with the same one build on each other; '': alone."""

    num_replicas: int

    def choose(self, prompt_tokens: int, session: str = "") -> int: ...

    def sent(self, replica: int, tokens: int) -> None:
        """A request of so many tokens, prompt and awaited answer together, is on its way."""
        ...

    def answered(self, replica: int, tokens: int) -> None:
        """It has ended, for whatever reason."""
        ...


class RoundRobin:
    def __init__(self, num_replicas: int) -> None:
        self.num_replicas = num_replicas
        self._last = -1

    def choose(self, prompt_tokens: int, session: str = "") -> int:  # noqa: ARG002 (all are alike)
        self._last = (self._last + 1) % self.num_replicas
        return self._last

    def sent(self, replica: int, tokens: int) -> None:
        """Nothing to count."""

    def answered(self, replica: int, tokens: int) -> None:
        """Nothing to count."""


class LeastOutstanding:
    """Of those with equally little to do, the one that was chosen longest ago. unit: what is counted."""

    def __init__(self, num_replicas: int, unit: Literal["tokens", "requests"] = "tokens") -> None:
        self.num_replicas = num_replicas
        self.outstanding = [0] * num_replicas
        self._unit = unit
        self._turns = list(range(num_replicas))  # when each was chosen last
        self._turn = num_replicas

    def choose(self, prompt_tokens: int, session: str = "") -> int:  # noqa: ARG002 (all are alike)
        chosen = min(range(self.num_replicas), key=lambda i: (self.outstanding[i], self._turns[i]))
        self._turns[chosen] = self._turn
        self._turn += 1
        return chosen

    def sent(self, replica: int, tokens: int) -> None:
        self.outstanding[replica] += tokens if self._unit == "tokens" else 1

    def answered(self, replica: int, tokens: int) -> None:
        self.outstanding[replica] -= tokens if self._unit == "tokens" else 1


class ByPromptLength:
    """Pools in order of the longest prompt they take; replicas are numbered through all of them.

    longest: of every pool but the last, which takes any.
    """

    def __init__(self, longest: Sequence[int], pools: Sequence[RoutingPolicy]) -> None:
        self.num_replicas = sum(pool.num_replicas for pool in pools)
        self._longest, self._pools = tuple(longest), tuple(pools)
        self._first = [sum(pool.num_replicas for pool in pools[:i]) for i in range(len(pools))]

    def choose(self, prompt_tokens: int, session: str = "") -> int:
        index = bisect_left(self._longest, prompt_tokens)
        return self._first[index] + self._pools[index].choose(prompt_tokens, session)

    def sent(self, replica: int, tokens: int) -> None:
        pool, own = self._pool_of(replica)
        pool.sent(own, tokens)

    def answered(self, replica: int, tokens: int) -> None:
        pool, own = self._pool_of(replica)
        pool.answered(own, tokens)

    def _pool_of(self, replica: int) -> tuple[RoutingPolicy, int]:
        index = next(i for i in reversed(range(len(self._first))) if self._first[i] <= replica)
        return self._pools[index], replica - self._first[index]


class Sticky:
    """A session stays with its replica, whatever that one has to do; `inner` chooses for new ones.

    most_sessions: beyond these, those used longest ago are forgotten.
    """

    def __init__(self, inner: RoutingPolicy, most_sessions: int = 100_000) -> None:
        self.num_replicas = inner.num_replicas
        self._inner, self._most = inner, most_sessions
        self._replica_of: OrderedDict[str, int] = OrderedDict()

    def choose(self, prompt_tokens: int, session: str = "") -> int:
        chosen = self._replica_of.get(session) if session else None
        if chosen is None:
            chosen = self._inner.choose(prompt_tokens, session)
        if session:
            self._replica_of[session] = chosen
            self._replica_of.move_to_end(session)
            if len(self._replica_of) > self._most:
                self._replica_of.popitem(last=False)
        return chosen

    def sent(self, replica: int, tokens: int) -> None:
        self._inner.sent(replica, tokens)

    def answered(self, replica: int, tokens: int) -> None:
        self._inner.answered(replica, tokens)
