"""Which replica of a simulated deployment gets a request: bookkeeping of what was sent and answered.

policy             chooses                                       good for
least outstanding  the replica with the least unfinished work    long requests do not pile up on one replica
by prompt length   the pool for that range of prompt lengths     pools of different devices
sticky             the replica that served the session before    turns find their prefix in its cache
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, Protocol


class RoutingPolicy(Protocol):
    """Replicas are numbered from 0. Requests of one `session` extend each other's prompts; '' means no session."""

    num_replicas: int

    def choose(self, prompt_tokens: int, session: str = "") -> int: ...

    def sent(self, replica: int, tokens: int) -> None:
        """A request was dispatched. tokens: of its prompt and its expected output."""
        ...

    def answered(self, replica: int, tokens: int) -> None:
        """That request has ended, for whatever reason."""
        ...


class LeastOutstanding:
    """Ties go to the replica that was chosen least recently. unit: what counts as work."""

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
    """Pools in order of `max_prompt_tokens`, which the last one does not need: it takes any prompt.

    Replicas are numbered through all pools.
    """

    def __init__(self, max_prompt_tokens: Sequence[int], pools: Sequence[RoutingPolicy]) -> None:
        self.num_replicas = sum(pool.num_replicas for pool in pools)
        self._max_prompt_tokens, self._pools = tuple(max_prompt_tokens), tuple(pools)
        self._first = [sum(pool.num_replicas for pool in pools[:i]) for i in range(len(pools))]

    def choose(self, prompt_tokens: int, session: str = "") -> int:
        index = bisect_left(self._max_prompt_tokens, prompt_tokens)
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
    """A session stays with its replica, however busy it is; `inner` chooses for new sessions.

    Beyond `max_sessions`, the least recently used are forgotten.
    """

    def __init__(self, inner: RoutingPolicy, max_sessions: int = 100_000) -> None:
        self.num_replicas = inner.num_replicas
        self._inner, self._max_sessions = inner, max_sessions
        self._replica_of: OrderedDict[str, int] = OrderedDict()

    def choose(self, prompt_tokens: int, session: str = "") -> int:
        chosen = self._replica_of.get(session) if session else None
        if chosen is None:
            chosen = self._inner.choose(prompt_tokens, session)
        if session:
            self._replica_of[session] = chosen
            self._replica_of.move_to_end(session)
            if len(self._replica_of) > self._max_sessions:
                self._replica_of.popitem(last=False)
        return chosen

    def sent(self, replica: int, tokens: int) -> None:
        self._inner.sent(replica, tokens)

    def answered(self, replica: int, tokens: int) -> None:
        self._inner.answered(replica, tokens)
