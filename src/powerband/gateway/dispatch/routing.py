"""Which of the replicas with a free place gets a request.

policy             next                                                good for
prefix             most of the prompt in its cache, against its load   chats, agents, shared system prompts
least-outstanding  the least work left to answer                       prompts with nothing in common
session            the one that has the session; else the least work   clients that name their sessions
weighted           the least work sent so far, by weight               replicas of different strength

`prefix` is the default because it is least-outstanding where prompts have nothing in common, costs some microseconds,
and passes over replicas with more than 1.5 times the mean load: one popular prefix spreads over as many as it needs.

planner.routing numbers the replicas of a fleet that never changes, and may queue at each of them without end. Here they
come and go, are full or at fault, and have names; that is why this is not the same code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from powerband.gateway.dispatch.member import Member
from powerband.gateway.dispatch.prefix import PrefixIndex
from powerband.gateway.pool_options import PoolOptions
from powerband.gateway.request import GatewayRequest

MOST_OF_MEAN = 1.5
_LOAD_WEIGHT = 0.5  # a mean load more is worth half a prompt in the cache
_SMALL_SHARE = 0.125  # of a replica's seats: less than that taken on each is no load worth balancing


class Router(Protocol):
    """`free` is never empty; those in it may get the request. `serving`: they, and those that are full just now."""

    def choose(self, request: GatewayRequest, free: Sequence[Member], serving: Sequence[Member]) -> Member: ...

    def suits(self, request: GatewayRequest, member: Member) -> float:
        """How much is gained, 0 to 1, if this replica gets it and no other does."""
        ...

    def sent(self, request: GatewayRequest, member: Member) -> None: ...

    def forget(self, replica: str) -> None:
        """It is gone, or has lost its cache."""
        ...


def make_router(options: PoolOptions) -> Router:
    match options.routing:
        case "prefix":
            return PrefixAware(options.prefix_blocks)
        case "session":
            return Session(options.most_sessions)
        case "weighted":
            return Weighted()
        case _:
            return LeastOutstanding()


class LeastOutstanding:
    """For each of its seats (max_num_seqs); of those with equally little to do, the one that was chosen longest ago."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, _request: GatewayRequest, free: Sequence[Member], _serving: Sequence[Member]) -> Member:
        if len(free) == 1:
            return free[0]
        return min(free, key=_by_outstanding)

    def suits(self, _request: GatewayRequest, _member: Member) -> float:
        return 0.0

    def sent(self, _request: GatewayRequest, member: Member) -> None:
        self._turn += 1
        member.turn = self._turn

    def forget(self, _replica: str) -> None:
        """Nothing is known of it."""


def _by_outstanding(member: Member) -> tuple[float, int]:
    return member.outstanding / member.seats, member.turn


class Weighted(LeastOutstanding):
    """Shares of all tokens by weight; a replica with weight 0 gets what nobody else can take."""

    def choose(self, _request: GatewayRequest, free: Sequence[Member], serving: Sequence[Member]) -> Member:
        # One that has just come does not make up for the past of the others.
        floor = min((m.sent_tokens / m.address.weight for m in serving if m.address.weight and m.turn), default=0.0)
        for member in free:
            member.sent_tokens = max(member.sent_tokens, floor * member.address.weight if not member.turn else 0.0)
        return min(free, key=_weighted_order)

    def sent(self, request: GatewayRequest, member: Member) -> None:
        super().sent(request, member)
        member.sent_tokens += request.prompt_tokens + request.output_tokens


def _weighted_order(member: Member) -> tuple[bool, float, int]:
    weight = member.address.weight
    return (not weight, member.sent_tokens / weight if weight else member.outstanding, member.turn)


class Session(LeastOutstanding):
    """A session stays with its replica while that one has a place; most_sessions: beyond, the oldest are forgotten."""

    def __init__(self, most_sessions: int) -> None:
        super().__init__()
        self._most = most_sessions
        self._replica_of: OrderedDict[str, str] = OrderedDict()

    def choose(self, request: GatewayRequest, free: Sequence[Member], serving: Sequence[Member]) -> Member:
        kept = self._replica_of.get(_session(request)) if request.session else None
        for member in free:
            if member.id == kept:
                return member
        return super().choose(request, free, serving)

    def suits(self, request: GatewayRequest, member: Member) -> float:
        return float(bool(request.session) and self._replica_of.get(_session(request)) == member.id)

    def sent(self, request: GatewayRequest, member: Member) -> None:
        super().sent(request, member)
        if request.session:
            session = _session(request)
            self._replica_of[session] = member.id
            self._replica_of.move_to_end(session)
            if len(self._replica_of) > self._most:
                self._replica_of.popitem(last=False)


def _session(request: GatewayRequest) -> str:
    """Two tenants may use the same name."""
    return f"{request.tenant} {request.session}"


def _loads(request: GatewayRequest, serving: Sequence[Member]) -> Callable[[Member], float]:
    """Of a replica in means: of the tokens before it, or of the requests it has, whichever is more; for each seat."""
    seats = sum(member.seats for member in serving)
    mean_tokens = sum(member.outstanding for member in serving) / seats
    mean_requests = sum(len(member.stays) for member in serving) / seats
    tokens = max(mean_tokens, (request.prompt_tokens + request.output_tokens) * len(serving) / seats)
    requests = max(mean_requests, _SMALL_SHARE)
    return lambda member: max(member.outstanding / tokens, len(member.stays) / requests) / member.seats


class PrefixAware(LeastOutstanding):
    """Cached share of the prompt less half the load in means, among those with at most 1.5 times the mean load."""

    def __init__(self, most_blocks: int) -> None:
        super().__init__()
        self._index = PrefixIndex(most_blocks)
        self.looked_up = 0  # prompts with keys
        self.found = 0.0  # shares of them, summed

    def choose(self, request: GatewayRequest, free: Sequence[Member], serving: Sequence[Member]) -> Member:
        keys = request.prefix_keys
        if not keys or len(serving) == 1:
            return super().choose(request, free, serving)
        load = _loads(request, serving)
        chosen = super().choose(request, free, serving)
        best_score = self._index.share(chosen.id, keys) - _LOAD_WEIGHT * load(chosen)
        for member in free:
            if member is not chosen and (own_load := load(member)) <= MOST_OF_MEAN:
                share = self._index.share(member.id, keys)
                if share and share - _LOAD_WEIGHT * own_load > best_score:
                    chosen, best_score = member, share - _LOAD_WEIGHT * own_load
        return chosen

    def suits(self, request: GatewayRequest, member: Member) -> float:
        return self._index.share(member.id, request.prefix_keys)

    def sent(self, request: GatewayRequest, member: Member) -> None:
        super().sent(request, member)
        if request.prefix_keys:
            self.looked_up += 1
            self.found += self._index.share(member.id, request.prefix_keys)
            self._index.sent(member.id, request.prefix_keys)

    def forget(self, replica: str) -> None:
        self._index.forget(replica)
