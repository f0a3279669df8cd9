"""Backoff after a backend's rejections (429, 503).

accepting ── rejection ──► paused ── pause ends ──► trial: one request at a time ── not rejected ──► accepting
                             ▲                                  │
                             └──── rejected: a longer pause ────┘

A Retry-After may concern one request or one tenant alone. Pauses are therefore short at first, however long the
Retry-After is, and a tenant that is rejected while others are accepted pauses the backend no more.

A rejection without Retry-After pauses its tenant alone: that a backend is at capacity shows in its limit of requests in
flight, with which the others' requests go on (see `Backend.rejected`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

_MIN_PAUSE_S = 0.5  # also the tenant's pause after a rejection without Retry-After
_INITIAL_BACKOFF_S = 1.0  # maximum pause after the first rejection with Retry-After; it doubles with each further one
_MAX_BACKOFF_S = 60.0
_TRIAL_S = 1.0  # a trial request that was not rejected within this time counts as accepted
_EXEMPTION_S = 60.0  # how long a tenant's rejections are ignored once another tenant's request was accepted


class SentRequest(Protocol):
    @property
    def tenant(self) -> str: ...

    @property
    def sent_s(self) -> float: ...


class RejectionBackoff:
    """`paused_until_s`: the backend gets no requests until then."""

    def __init__(self) -> None:
        self.paused_until_s = 0.0
        self._num_rejections = 0  # consecutive ones with Retry-After; if any, requests are sent as trials
        self._rejected_tenant = ""
        self._exempt_until_s: dict[str, float] = {}  # by tenant: its rejections concern it alone until then
        self._tenant_paused_until_s: dict[str, float] = {}

    def allows(self, now_s: float, in_flight: Iterable[SentRequest]) -> bool:
        """Whether a request may be sent: no pause, and no trial request among those in flight is undecided."""
        if now_s < self.paused_until_s:
            return False
        return not self._num_rejections or not any(
            self._is_trial(one) and now_s - one.sent_s < _TRIAL_S for one in in_flight
        )

    def allows_tenant(self, tenant: str, now_s: float) -> bool:
        """Whether a request of this tenant may be sent, if requests may be."""
        return now_s >= self._tenant_paused_until_s.get(tenant, 0.0)

    def sent(self, request: SentRequest, in_flight: Iterable[SentRequest]) -> None:
        """A request is sent. in_flight: those sent before: a trial among them has not been rejected in time."""
        trial = next((one for one in in_flight if self._is_trial(one)), None) if self._num_rejections else None
        if trial is not None:
            self._end(trial.tenant, request.sent_s)

    def accepted(self, request: SentRequest, now_s: float) -> None:
        """The backend has begun to respond, or has completed the request."""
        if self._num_rejections and self._is_trial(request):
            self._end(request.tenant, now_s)

    def ignores(self, tenant: str, now_s: float) -> bool:
        """Whether a rejection concerns this tenant alone."""
        return now_s < self._exempt_until_s.get(tenant, 0.0)

    def rejected(self, request: SentRequest, now_s: float, retry_after_s: float) -> None:
        """retry_after_s: 0: no Retry-After."""
        if not retry_after_s:
            self._tenant_paused_until_s = _without_past(self._tenant_paused_until_s, now_s)
            self._tenant_paused_until_s[request.tenant] = now_s + _MIN_PAUSE_S
            return
        if not self._num_rejections or self._is_trial(request):  # those of requests sent before count once
            self._num_rejections, self._rejected_tenant = self._num_rejections + 1, request.tenant
        backoff_s = min(_INITIAL_BACKOFF_S * 2.0 ** min(self._num_rejections - 1, 16), _MAX_BACKOFF_S)
        pause_s = min(max(retry_after_s, _MIN_PAUSE_S), backoff_s)
        self.paused_until_s = max(self.paused_until_s, now_s + pause_s)

    def reset(self) -> None:
        """A new process has taken the backend's place."""
        self.paused_until_s, self._num_rejections = 0.0, 0
        self._tenant_paused_until_s.clear()

    def _is_trial(self, request: SentRequest) -> bool:
        """Whether the request was sent after the pause."""
        return request.sent_s >= self.paused_until_s

    def _end(self, tenant: str, now_s: float) -> None:
        """A request of this tenant was accepted."""
        self._num_rejections = 0
        if tenant != self._rejected_tenant:
            self._exempt_until_s = _without_past(self._exempt_until_s, now_s)
            self._exempt_until_s[self._rejected_tenant] = now_s + _EXEMPTION_S


def _without_past(ends_s: dict[str, float], now_s: float) -> dict[str, float]:
    return {tenant: end_s for tenant, end_s in ends_s.items() if end_s > now_s}
