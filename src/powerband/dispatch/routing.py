"""Routing: chooses one of the backends with a free slot for a request.

policy             chosen backend                                        good for
prefix             most of the prompt in its prefix cache, less its load chats, agents, shared system prompts
least-outstanding  fewest tokens left to compute                         prompts with nothing in common
session            the one that served the session, else least work      clients that name their sessions
weighted           fewest tokens sent so far, relative to its weight     replicas of different speeds

`prefix` is the default. It equals least-outstanding if prompts have nothing in common, and takes a few microseconds.
It skips backends with more than 1.5 times the mean load, so a popular prefix spreads over as many as it needs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from powerband.dispatch.backend import Backend
from powerband.dispatch.options import DispatchOptions
from powerband.dispatch.prefix import PrefixIndex
from powerband.dispatch.request import DispatchRequest

MAX_LOAD_RATIO = 1.5
_LOAD_WEIGHT = 0.5  # a load ratio higher by 1 outweighs half a cached prompt
_MIN_LOAD = 0.125  # requests per slot, below which load is not worth balancing


class Router(Protocol):
    """`free`: backends that may get the request, at least one. `serving`: those and the ones that are full now."""

    def choose(self, request: DispatchRequest, free: Sequence[Backend], serving: Sequence[Backend]) -> Backend: ...

    def affinity(self, request: DispatchRequest, backend: Backend) -> float:
        """How much the request gains from this backend's cache or session, 0 to 1."""
        ...

    def dispatched(self, request: DispatchRequest, backend: Backend) -> None: ...

    def forget(self, backend: str) -> None:
        """The backend is gone, or has lost its cache."""
        ...


def make_router(options: DispatchOptions) -> Router:
    match options.routing:
        case "prefix":
            return PrefixAware(options.max_prefix_blocks)
        case "session":
            return SessionAffinity(options.max_sessions)
        case "weighted":
            return WeightedShares()
        case _:
            return LeastOutstanding()


class LeastOutstanding:
    """The fewest outstanding tokens per slot (max_num_seqs); ties go to the least recently chosen backend."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, _request: DispatchRequest, free: Sequence[Backend], _serving: Sequence[Backend]) -> Backend:
        if len(free) == 1:
            return free[0]
        return min(free, key=_by_outstanding)

    def affinity(self, _request: DispatchRequest, _backend: Backend) -> float:
        return 0.0

    def dispatched(self, _request: DispatchRequest, backend: Backend) -> None:
        self._turn += 1
        backend.turn = self._turn

    def forget(self, _backend: str) -> None:
        """Do nothing: this policy keeps no state per backend."""


def _by_outstanding(backend: Backend) -> tuple[float, int]:
    return backend.outstanding / backend.max_num_seqs, backend.turn


class WeightedShares(LeastOutstanding):
    """Distributes tokens in proportion to weights. A backend with weight 0 is used only when no other is free."""

    def choose(self, _request: DispatchRequest, free: Sequence[Backend], serving: Sequence[Backend]) -> Backend:
        # A new backend does not catch up on tokens that the others got before it was added.
        floor = min((b.sent_tokens / b.spec.weight for b in serving if b.spec.weight and b.turn), default=0.0)
        for backend in free:
            backend.sent_tokens = max(backend.sent_tokens, floor * backend.spec.weight if not backend.turn else 0.0)
        return min(free, key=_weighted_order)

    def dispatched(self, request: DispatchRequest, backend: Backend) -> None:
        super().dispatched(request, backend)
        backend.sent_tokens += request.prompt_tokens + request.output_tokens


def _weighted_order(backend: Backend) -> tuple[bool, float, int]:
    weight = backend.spec.weight
    return (not weight, backend.sent_tokens / weight if weight else backend.outstanding, backend.turn)


class SessionAffinity(LeastOutstanding):
    """Keeps a session on its backend while that has a free slot. Evicts the oldest sessions beyond max_sessions."""

    def __init__(self, max_sessions: int) -> None:
        super().__init__()
        self._max_sessions = max_sessions
        self._backend_of: OrderedDict[str, str] = OrderedDict()

    def choose(self, request: DispatchRequest, free: Sequence[Backend], serving: Sequence[Backend]) -> Backend:
        kept = self._backend_of.get(_session_key(request)) if request.session else None
        for backend in free:
            if backend.id == kept:
                return backend
        return super().choose(request, free, serving)

    def affinity(self, request: DispatchRequest, backend: Backend) -> float:
        return float(bool(request.session) and self._backend_of.get(_session_key(request)) == backend.id)

    def dispatched(self, request: DispatchRequest, backend: Backend) -> None:
        super().dispatched(request, backend)
        if request.session:
            session = _session_key(request)
            self._backend_of[session] = backend.id
            self._backend_of.move_to_end(session)
            if len(self._backend_of) > self._max_sessions:
                self._backend_of.popitem(last=False)


def _session_key(request: DispatchRequest) -> str:
    """The session with its tenant, since two tenants may use the same name."""
    return f"{request.tenant} {request.session}"


def _loads(request: DispatchRequest, serving: Sequence[Backend]) -> Callable[[Backend], float]:
    """Returns the load ratio of a backend: its load per slot over the mean, by tokens or requests, the higher one."""
    places = sum(backend.max_num_seqs for backend in serving)
    mean_tokens = sum(backend.outstanding for backend in serving) / places
    mean_requests = sum(len(backend.in_flight) for backend in serving) / places
    tokens = max(mean_tokens, (request.prompt_tokens + request.output_tokens) * len(serving) / places)
    requests = max(mean_requests, _MIN_LOAD)
    return lambda backend: max(backend.outstanding / tokens, len(backend.in_flight) / requests) / backend.max_num_seqs


class PrefixAware(LeastOutstanding):
    """Highest cached fraction of the prompt minus half the load ratio, among backends below 1.5 times the mean load."""

    def __init__(self, max_blocks: int) -> None:
        super().__init__()
        self._index = PrefixIndex(max_blocks)

    def choose(self, request: DispatchRequest, free: Sequence[Backend], serving: Sequence[Backend]) -> Backend:
        keys = request.prefix_keys
        if not keys or len(serving) == 1:
            return super().choose(request, free, serving)
        load = _loads(request, serving)
        chosen = super().choose(request, free, serving)
        best_score = self._index.cached_share(chosen.id, keys) - _LOAD_WEIGHT * load(chosen)
        for backend in free:
            if backend is not chosen and (own_load := load(backend)) <= MAX_LOAD_RATIO:
                share = self._index.cached_share(backend.id, keys)
                if share and share - _LOAD_WEIGHT * own_load > best_score:
                    chosen, best_score = backend, share - _LOAD_WEIGHT * own_load
        return chosen

    def affinity(self, request: DispatchRequest, backend: Backend) -> float:
        return self._index.cached_share(backend.id, request.prefix_keys)

    def dispatched(self, request: DispatchRequest, backend: Backend) -> None:
        super().dispatched(request, backend)
        if request.prefix_keys:
            self._index.add(backend.id, request.prefix_keys)

    def forget(self, backend: str) -> None:
        self._index.forget(backend)


def without(avoid: Collection[str], free: list[Backend], serving: list[Backend]) -> list[Backend]:
    """The free backends without those to avoid; all free backends if every serving one is to be avoided."""
    if not avoid:
        return free
    if all(backend.id in avoid for backend in serving):
        return free
    return [backend for backend in free if backend.id not in avoid]


def open_to(
    request: DispatchRequest, avoid: Collection[str], free: list[Backend], serving: list[Backend], now_s: float
) -> list[Backend]:
    """The free backends that can serve the request, without those to avoid and those that pause its tenant.

    After a crash, only those that have shown life since: if several crash for a common reason, such as a power cut, a
    retry at another one that is dead would look as if the request had crashed that one, too.
    """
    if (able := request.backends) is not None:
        free, serving = ([one for one in some if one.id in able] for some in (free, serving))
    among = [
        backend for backend in without(avoid, free, serving) if backend.backoff.allows_tenant(request.tenant, now_s)
    ]
    if (crashed_s := request.crashed_s) is not None:
        among = [backend for backend in among if backend.alive_s > crashed_s]
    return [backend for backend in among if not backend.has_quarantined] if request.is_quarantined else among
