"""A request's way to replicas: a place in the pool, the exchange, and another try elsewhere when that fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal

import msgspec

from powerband.errors import PowerbandError
from powerband.gateway.dispatch.pool import NO_REPLICA_RETRY_S, Lease, NoReplica, Pool
from powerband.gateway.proxy.connection import Exchange, UpstreamFailure
from powerband.gateway.proxy.events import NO_JSON
from powerband.gateway.proxy.upstream import Upstream
from powerband.gateway.proxy.verdict import Verdict
from powerband.gateway.request import GatewayRequest
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.timeouts import Timeouts
from powerband.web.errors import ErrorBody, HttpError

MAX_REFUSALS = 8
MAX_ERROR_BYTES = 64 << 10
_SHORTEST_PAUSE_S = 0.02
_VERDICT_S = 2.0  # by when probes have found out that a replica is dead
# Codes of our own replicas that take nothing now: the request has not reached an engine.
_ABSENT = ("starting", "not_ready", "draining", "engine_unavailable")
# The path and body that a replica is to be sent.
Plan = Callable[[ReplicaAddress], Awaitable[tuple[str, bytes]]]
_BODY = msgspec.json.Decoder(ErrorBody)


class ReplicaError(PowerbandError):
    """Replicas failed, and nobody else could take over."""

    http_status = 502
    default_code = "upstream_failed"


class PoisonRequest(PowerbandError):
    """Replicas that answer others fail with this request."""

    http_status = 400
    default_code = "request_fails"


class Trip:
    """`go` until there is an exchange to read; `failed` when it breaks; `close` at the end, whatever that is."""

    def __init__(self, request: GatewayRequest, pool: Pool, upstream: Upstream, *, max_tries: int) -> None:
        self.request = request
        self._pool = pool
        self._upstream = upstream
        self._max_tries = max_tries
        self._lease: Lease | None = None
        self._verdict = Verdict()
        self._avoid: list[str] = []
        self._num_failures = 0
        self._num_refusals = 0
        self._absent_since_s: float | None = None
        self.exchange: Exchange | None = None
        self.replicas: list[str] = []
        self.broken: list[tuple[str, str]] = []  # replica and code of tries that failed, without refusals
        self.queue_s = 0.0
        self.sent_s = 0.0
        self.has_begun = False  # the client has a part of the answer: from then on the budget alone counts tries

    async def go(self, plan: Plan, timeouts: Timeouts) -> tuple[ReplicaAddress, Exchange]:
        """With the head of an answer that is the client's: any status but those of a replica in trouble.

        Raises what the pool refuses with, and ReplicaError when enough replicas failed.
        """
        while True:
            lease = self._lease = await self._pool.lease(self.request, avoid=tuple(self._avoid))
            replica = lease.replica
            self.queue_s += lease.queue_s
            self.replicas.append(replica.id)
            try:
                path, body = await plan(replica)
                self.sent_s = self.sent_s or time.monotonic()
                exchange = self.exchange = await self._upstream.open(
                    replica,
                    path,
                    body,
                    timeouts,
                    headers=_headers(self.request),
                    on_sent=partial(_tie, lease),
                )
                status = exchange.status
                if status < 429 or 429 < status < 500:
                    self._verdict.settle()
                    return replica, exchange
                await self._raise_trouble(exchange)
            except UpstreamFailure as problem:
                await self.failed(problem)

    async def _raise_trouble(self, exchange: Exchange) -> None:
        status = exchange.status
        try:
            error = _BODY.decode(await exchange.read_all(MAX_ERROR_BYTES)).error
            code, message = error.code or "", error.message
        except (*NO_JSON, UpstreamFailure):
            code, message = "", ""
        is_refusal = status == 429 or (status == 503 and code != "engine_dead")
        is_absence = is_refusal and code in _ABSENT
        raise UpstreamFailure(
            code or f"http_{status}",
            message[:500] or f"HTTP {status}.",
            is_refusal=is_refusal and not is_absence,
            is_absence=is_absence,
        )

    async def failed(self, problem: UpstreamFailure) -> None:
        """The replica failed with this request, or refused it. Returns when another may be tried; else raises."""
        self._end_exchange()
        lease, self._lease = self._lease, None
        if lease is None:
            raise _error(problem, len(self.replicas))
        if problem.is_refusal:
            lease.close("refused")
        else:
            self.broken.append((lease.replica.id, problem.code))
            if problem.is_absence:
                lease.close("absent")
            elif self._verdict.failed(lease, problem.code):
                raise _poison(problem, are_well=self._pool.are_well(id for id, _ in self.broken))
        if lease.replica.id not in self._avoid:
            self._avoid.append(lease.replica.id)
        if problem.is_absence:
            self._check_absence(problem)
            return
        if problem.is_refusal:
            self._num_refusals += 1
            if self._num_refusals > MAX_REFUSALS:
                raise _error(problem, len(self.replicas))
            if self._num_refusals > 1:  # all are as full; the pool learns from each refusal
                await asyncio.sleep(_SHORTEST_PAUSE_S * 2**self._num_refusals)
            return
        self._num_failures += 1
        is_enough = self._num_failures >= self._max_tries and not self.has_begun
        if is_enough or not await self._may_retry(lease):
            raise _error(problem, len(self.replicas))

    def _check_absence(self, problem: UpstreamFailure) -> None:
        """Nothing was run, so that this is no try. The pool knows now, and the request waits there for a replica, but
        in all no longer than any request may wait."""
        now_s = time.monotonic()
        if self._absent_since_s is None:
            self._absent_since_s = now_s
        if now_s - self._absent_since_s > self._pool.options.longest_wait_s:
            raise _error(problem, len(self.replicas))

    async def _may_retry(self, lease: Lease) -> bool:
        """Where the budget is used up, probes have the last word: the victims of a replica that has died are free."""
        deadline_s = time.monotonic() + _VERDICT_S
        while not (is_free := self._pool.may_retry(lease)) and time.monotonic() < deadline_s:
            await asyncio.sleep(_SHORTEST_PAUSE_S)
        return is_free

    def progress(self) -> None:
        if self._lease is not None:
            self._lease.progress()

    def first_token(self, prompt_tokens: int | None) -> None:
        if self._lease is not None:
            self._lease.first_token(prompt_tokens)

    def close(self, outcome: Literal["ok", "failed", "refused", "left"], output_tokens: int = 0) -> None:
        """Free the place at the replica. The first call counts."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.close(outcome, output_tokens=output_tokens)

    def end(self) -> None:
        """Free everything. The connection is kept when nothing but the end of the answer is missing."""
        exchange, self.exchange = self.exchange, None
        if exchange is not None and self._lease is None:
            self._upstream.let_end(exchange)
        elif exchange is not None:
            self._upstream.end(exchange)
        self._verdict.settle()
        self.close("left")

    def _end_exchange(self) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            self._upstream.end(exchange)


def _headers(request: GatewayRequest) -> dict[str, str]:
    told = {"X-Request-Id": request.id}
    return told if request.trace is None else {**told, **request.trace.headers}


def _tie(lease: Lease, exchange: Exchange) -> None:
    """The exchange fails when the replica is found to hang or to be gone."""
    lease.when_lost(partial(exchange.fail, "lost", "The replica hangs or is gone."))


def _poison(problem: UpstreamFailure, *, are_well: bool) -> PowerbandError:
    """For a request with which two replicas fail in the same way. are_well: they answer others meanwhile."""
    shown = f"{problem} Two replicas failed with this request in the same way ({problem.code})."
    if not are_well:
        return ReplicaError(shown)
    return PoisonRequest(shown, hint="They answer others; another try would fail, too: change the request.")


def _error(problem: UpstreamFailure, tries: int) -> PowerbandError:
    told = f"{problem} ({'1 replica was' if tries == 1 else f'{tries} replicas were'} tried.)"
    if problem.is_refusal:
        error = HttpError(503, "replicas_busy", told)
        error.retry_after_s = 1.0
        return error
    if problem.is_absence:
        return NoReplica(told, retry_after_s=NO_REPLICA_RETRY_S)
    if problem.code == "timeout":
        return HttpError(504, "upstream_timeout", told)
    return ReplicaError(told)
