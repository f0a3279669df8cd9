"""A request's place with a replica, as the one who relays its answer holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from powerband.gateway.dispatch.member import Member, Stay
from powerband.gateway.dispatch.queue import Level
from powerband.gateway.request import GatewayRequest
from powerband.gateway.routes import ReplicaAddress

Outcome = Literal["ok", "failed", "suspected", "refused", "absent", "left"]


class Holder(Protocol):
    """The pool, as a lease sees it."""

    clock: Callable[[], float]

    def first_token_came(self, lease: Lease, ttft_s: float) -> None: ...

    def release(self, lease: Lease, outcome: Outcome, output_tokens: int) -> None: ...

    def blame(self, lease: Lease) -> None: ...


class Lease:
    """A request's place with a replica, from dispatch until `close`."""

    # fmt: off
    __slots__ = (
        "_has_begun",
        "_holder",
        "_is_closed",
        "is_suspected",
        "is_trial",
        "level",
        "member",
        "prompt_tokens",
        "queue_s",
        "request",
        "since_s",
        "stay",
        "tokens",
    )
    # fmt: on

    def __init__(self, holder: Holder, member: Member, request: GatewayRequest, level: Level, now_s: float) -> None:
        self._holder, self.since_s, self._has_begun, self._is_closed = holder, now_s, False, False
        self.member, self.request, self.level = member, request, level
        self.prompt_tokens = request.prompt_tokens
        self.tokens = request.prompt_tokens + request.output_tokens  # at most
        self.stay = Stay(request.stream, now_s, self.tokens)
        self.is_trial = member.breaker.sent()
        self.is_suspected = False  # closed so: the request may be at fault
        self.queue_s = 0.0

    @property
    def replica(self) -> ReplicaAddress:
        return self.member.address

    @property
    def lost(self) -> bool:
        """The replica was found dead or hung while this ran: nothing more will come."""
        return self.stay.lost

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call back once, from the event loop; at once if that is so already. One callback at most."""
        if self.stay.lost:
            callback()
        else:
            self.stay.on_lost = callback

    def progress(self) -> None:
        """Bytes came."""
        self.member.progressed(self.stay, self._holder.clock())

    def first_token(self, prompt_tokens: int | None = None) -> None:
        """The prompt is computed. prompt_tokens: as the replica counted them."""
        now_s = self._holder.clock()
        self.member.progressed(self.stay, now_s)
        if not self._has_begun and not self._is_closed:
            self._has_begun = True
            self.prompt_tokens = self.request.prompt_tokens if prompt_tokens is None else prompt_tokens
            self._holder.first_token_came(self, now_s - self.since_s)

    def close(self, outcome: Outcome, *, output_tokens: int = 0, pause_s: float = 0.0) -> None:
        """Exactly once. It is answered ("ok"); broke through the replica's fault ("failed"), or maybe through its own
        ("suspected": `blame` may follow); was turned away by the replica with 429 or 503 ("refused"); found nothing
        there that could have run it ("absent"); its client left. output_tokens: that were generated.
        pause_s: nothing is sent to the replica for so long.
        """
        if not self._is_closed:
            self._is_closed = True
            self.is_suspected = outcome == "suspected"
            if pause_s:
                self.member.busy_until_s = max(self.member.busy_until_s, self._holder.clock() + pause_s)
            self.stay.on_lost = None
            self._holder.release(self, outcome, output_tokens)

    def blame(self) -> None:
        """It was closed as suspected, and the replica was at fault."""
        self._holder.blame(self)

    @property
    def is_without_replica(self) -> bool:
        """Whether the replica is known to be of no use now."""
        return not self.member.takes_new or not self.member.breaker.is_closed
