"""Sends a request to replicas: waits for a slot in the pool, sends it upstream, and retries elsewhere on failure."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import NoReturn

from powerband.core.request import OUTPUT_COMPLETE
from powerband.dispatch.dispatcher import NO_REPLICA_RETRY_S, Outcome
from powerband.dispatch.errors import NoReplicaAvailable
from powerband.errors import PowerbandError
from powerband.gateway.dispatch.pool import Lease, Pool
from powerband.gateway.options import Timeouts
from powerband.gateway.proxy.client_request import PATHS
from powerband.gateway.proxy.poison import MAX_CRASHES, PoisonDetector
from powerband.gateway.proxy.request_fields import UnsuitableReplica
from powerband.gateway.request import GatewayRequest
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.client import UpstreamClient
from powerband.gateway.upstream.errors import (
    InvalidUpstreamRequest,
    retry_after_s,
    with_served_name,
)
from powerband.gateway.upstream.exchange import UpstreamExchange
from powerband.gateway.upstream.failure import FailureKind, UpstreamFailure
from powerband.gateway.upstream.reported import response_failure
from powerband.openai.errors import MAX_ERROR_BYTES, read_error
from powerband.web.errors import HttpError

logger = logging.getLogger(__name__)

MAX_REJECTIONS = 8
_ERROR_BODY_S = 5.0
_MAX_FAILURES = 10  # of one request, however many tokens came in between
_CRASH_PAUSE_S = 0.1  # before a retry after a crash: others that crash for the same reason are found in the meantime
_LISTENING_S = 0.5  # a server that accepts no connection within this time has crashed
_POLL_S = 0.02
_DEAD_REPLICA_DETECTION_S = 2.0  # within which probes detect a dead replica
_MAX_RETRY_DELAY_S = 2.0  # a replica with a Retry-After up to this is tried once more
_MIN_TOKENS_OF_SUCCESS = 32  # an attempt that sent at least so many tokens resets the count of failures
# Returns the path and body to send to a replica.
BuildRequest = Callable[[ReplicaAddress], Awaitable[tuple[str, bytes]]]


class ReplicaError(PowerbandError):
    """Replicas failed, and no other replica could take over."""

    http_status = 502
    default_code = "upstream_failed"


class EndpointMissing(ReplicaError):
    """No replica offers the endpoint, or the model by this name."""


class PoisonRequest(PowerbandError):
    """Replicas that serve other requests fail with this one."""

    http_status = 400
    default_code = "request_fails"


class UpstreamAttempts:
    """`send` returns a response to read; call `handle_failure` when reading fails, and `end` in any case."""

    def __init__(self, request: GatewayRequest, pool: Pool, upstream: UpstreamClient, *, max_attempts: int) -> None:
        self.request = request
        self._pool = pool
        self._upstream = upstream
        self._max_attempts = max_attempts
        self._lease: Lease | None = None
        self._poison_detector = PoisonDetector()
        self._avoid: list[str] = []
        self._num_failures = 0
        self._num_failures_of_kind: Counter[FailureKind] = Counter()
        self._num_rejections: dict[str, int] = {}  # by replica
        self._retry_after_s = 0.0
        self._unavailable_since_s: float | None = None
        self.exchange: UpstreamExchange | None = None
        self.replica: ReplicaAddress | None = None  # of the latest attempt
        self.replicas: list[str] = []
        self.failed_attempts: list[tuple[str, str]] = []  # replica and code of failed attempts; rejections excluded
        self.queue_s = 0.0
        self.sent_s = 0.0
        self.response_started = False  # the client has received a part of the response

    async def send(self, plan: BuildRequest, timeouts: Timeouts) -> tuple[ReplicaAddress, UpstreamExchange]:
        """The replica, and its response with status 200, whose body is not read yet.

        Raises InvalidUpstreamRequest if a replica rejects the request itself, PoolError if the pool does, and
        ReplicaError after too many failures.
        """
        while True:
            lease = self._lease = await self._pool.lease(self.request, avoid=tuple(self._avoid))
            replica = lease.replica
            if self.request.adapter:
                replica = replace(replica, model=self.request.adapter)
            self.replica = replica
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
                    on_sent=partial(_bind, lease),
                )
                if exchange.status == 200:
                    return replica, exchange
                await self._raise_for_status(exchange, replica)
            except UnsuitableReplica as unsuitable:
                self.replicas.pop()
                self._avoid.append(replica.id)
                self.close("unsent")
                if not self._pool.has_others(self._avoid):
                    raise unsuitable.error from None
            except InvalidUpstreamRequest as problem:
                if not self.go_to_longer(problem):
                    self.close("ok")
                    raise
            except UpstreamFailure as problem:
                await self.handle_failure(problem)

    def go_to_longer(self, problem: InvalidUpstreamRequest) -> bool:
        """The replica rejected the request as invalid. Returns whether one that accepts longer prompts serves: the next
        attempt goes to it.

        A prompt's length is an estimate, and replicas word it differently that one is too long.
        """
        lease = self._lease
        if lease is None or problem.code == OUTPUT_COMPLETE:
            return False
        limit = lease.replica.max_prompt_tokens
        if limit is None or not self._pool.serves_longer(limit):
            return False
        self._end_exchange()
        self.close("ok")
        self.request = replace(self.request, prompt_tokens=limit + 1)
        return True

    async def _raise_for_status(self, exchange: UpstreamExchange, replica: ReplicaAddress) -> NoReturn:
        """Raise InvalidUpstreamRequest if the replica finds the request invalid, else UpstreamFailure."""
        status, body = exchange.status, b""
        with contextlib.suppress(UpstreamFailure, TimeoutError):  # without a body, the status is enough
            async with asyncio.timeout(_ERROR_BODY_S):
                body = await exchange.read_all(MAX_ERROR_BYTES)
        complaint = with_served_name(read_error(body), replica.model, self.request.model)
        problem = response_failure(
            status,
            complaint,
            retry_after_s=retry_after_s(exchange.headers),
            api_key=replica.api_key or "",
            serves_others=self._pool.are_healthy([replica.id]),
        )
        kind = problem.kind if isinstance(problem, UpstreamFailure) else None
        if kind is FailureKind.UNAUTHORIZED:
            self._log(replica, f"{problem} Is its api_key in the routes right?")
        if kind is FailureKind.UNSUPPORTED and self.request.endpoint in PATHS:  # which every engine has
            path = PATHS[self.request.endpoint]
            self._log(replica, f"It has no {path} for model {replica.model!r} (HTTP {status}).")
        raise problem

    def _log(self, replica: ReplicaAddress, what: str) -> None:
        if self._pool.may_log(replica.id):
            logger.warning("replica %s: %s", replica.id, what)

    async def handle_failure(self, problem: UpstreamFailure, num_tokens: int = 0) -> None:
        """The replica failed with the request, or rejected it. Returns if another attempt may be made, else raises.

        num_tokens: tokens that the replica sent before.
        """
        self._end_exchange()
        lease, self._lease = self._lease, None
        if lease is None:
            raise self._error(problem)
        # Powerband's Retry-After is about this request alone; that of other engines is about all requests.
        is_alone = lease.replica.adapter.retry_after_is_per_request
        lease.close(problem.policy.outcome, retry_after_s=0.0 if is_alone else problem.retry_after_s or 0.0)
        if problem.kind is FailureKind.GATEWAY_LIMIT:
            raise HttpError(503, "too_many_connections", str(problem))
        id = lease.replica.id
        if id not in self._avoid:
            self._avoid.append(id)
        if problem.kind is FailureKind.REJECTED:
            self._record_rejection(id, problem)
            return
        self.failed_attempts.append((id, problem.code))
        if problem.kind is FailureKind.UNAVAILABLE:
            self._check_unavailable(problem)
            return
        if problem.kind is FailureKind.ERROR_RESPONSE and self._poison_detector.record_failure(lease, problem.code):
            shown = f"{problem} Two replicas failed with this request in the same way ({problem.code})."
            raise self._poison(shown, hint="They answer others; another try would fail, too: change the request.")
        if await self._has_crashed(lease, problem):
            self._record_crash(lease, problem)
        self._num_failures_of_kind[problem.kind] += 1
        is_last = self._num_failures_of_kind[problem.kind] >= problem.policy.max_failures
        if is_last or (problem.policy.is_permanent and not self._pool.has_others(self._avoid)):
            raise self._error(problem)
        self._num_failures = 1 if num_tokens >= _MIN_TOKENS_OF_SUCCESS else self._num_failures + 1
        if self._num_failures >= self._max_attempts or len(self.failed_attempts) >= _MAX_FAILURES:
            self._poison_detector.confirm_failures()
            raise self._error(problem)
        if problem.policy.counts and not await self._may_retry(lease):
            raise self._error(problem)

    async def _has_crashed(self, lease: Lease, problem: UpstreamFailure) -> bool:
        """Whether the replica's process or engine crashed or hung after it got the request, not before."""
        if problem.code == "lost":
            return lease.may_have_hung_replica
        if problem.code not in ("reset", "engine_dead"):
            return False
        await asyncio.sleep(_CRASH_PAUSE_S)
        return problem.code == "engine_dead" or not await self._upstream.is_listening(lease.replica, _LISTENING_S)

    def _record_crash(self, lease: Lease, problem: UpstreamFailure) -> None:
        """Raises if the request is at fault, or has been in too many crashes."""
        detector = self._poison_detector
        is_poison, number = detector.record_crash(lease), detector.num_crashes
        if is_poison:
            times = "twice" if number == 2 else f"{number} times"
            shown = f"{problem} Replicas crashed or hung {times} while they ran this request."
            raise self._poison(shown, hint="They ran others well, so it is probably the cause: change the request.")
        if number >= MAX_CRASHES:
            raise self._error(problem)
        self.request = replace(self.request, num_crashes=number, crashed_s=self._pool.record_crash())

    def _check_unavailable(self, problem: UpstreamFailure) -> None:
        """The request reached no engine, so this is not counted as an attempt: it may wait in the pool for a replica.

        Raises once it has done so for longer than `max_queue_wait_s` in all.
        """
        now_s = time.monotonic()
        if self._unavailable_since_s is None:
            self._unavailable_since_s = now_s
        if now_s - self._unavailable_since_s > self._pool.options.max_queue_wait_s:
            raise self._error(problem)

    async def _may_retry(self, lease: Lease) -> bool:
        """Whether to retry. With the budget used up, wait for the probes: retries after a replica's death are free."""
        deadline_s = time.monotonic() + _DEAD_REPLICA_DETECTION_S
        while not (is_free := self._pool.may_retry(lease)) and time.monotonic() < deadline_s:
            await asyncio.sleep(_POLL_S)
        return is_free

    def _record_rejection(self, id: str, problem: UpstreamFailure) -> None:
        """Return if another replica, or the same one after a short Retry-After, may be tried; else raise."""
        self._num_rejections[id] = self._num_rejections.get(id, 0) + 1
        delay_s = problem.retry_after_s or 0.0
        self._retry_after_s = min(self._retry_after_s, delay_s) if self._retry_after_s else delay_s
        is_done = sum(self._num_rejections.values()) > MAX_REJECTIONS
        has_others = self._pool.has_others(self._num_rejections)
        if is_done or not (has_others or (delay_s <= _MAX_RETRY_DELAY_S and self._num_rejections[id] <= 2)):
            raise self._error(problem)

    def _error(self, problem: UpstreamFailure) -> PowerbandError:
        if problem.client_error is not None:
            return problem.client_error
        tries, replicas = len(self.replicas), len(set(self.replicas))
        where = f"{tries} {'try' if tries == 1 else 'tries'} at {replicas} replica{'s'[: replicas > 1]}"
        shown = f"{str(problem).removesuffix('.')} ({where})."
        if problem.kind is FailureKind.REJECTED:
            error = HttpError(503, "replicas_busy", shown)
            error.retry_after_s = max(1.0, self._retry_after_s)
            return error
        if problem.kind is FailureKind.UNAVAILABLE:
            return NoReplicaAvailable(shown, retry_after_s=NO_REPLICA_RETRY_S)
        if problem.kind is FailureKind.TIMEOUT:
            return HttpError(504, "upstream_timeout", shown)
        if problem.kind is FailureKind.UNSUPPORTED and self.request.adapter:  # it was unloaded just now
            return HttpError(
                404, "model_not_found", f"There is no model {self.request.model!r} any more.", param="model"
            )
        return EndpointMissing(shown) if problem.kind is FailureKind.UNSUPPORTED else ReplicaError(shown)

    def _poison(self, shown: str, *, hint: str) -> PowerbandError:
        """The error of a request that is at fault. hint: for when the replicas that failed with it served others."""
        if not self._pool.are_healthy(id for id, _ in self.failed_attempts):
            return ReplicaError(shown)
        return PoisonRequest(shown, hint=hint)

    def warn(self, what: str) -> None:
        """Log a fault of the current replica, rate-limited."""
        if self._lease is not None:
            self._log(self._lease.replica, what)

    def progress(self) -> None:
        if self._lease is not None:
            self._lease.progress()

    def first_token(self, prompt_tokens: int | None) -> None:
        self._poison_detector.confirm_failures()
        if self._lease is not None:
            self._lease.first_token(prompt_tokens)

    def close(self, outcome: Outcome, output_tokens: int = 0) -> None:
        """Free the slot at the replica. Only the first call has an effect."""
        if outcome == "ok":
            self._poison_detector.confirm_failures()
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.close(outcome, output_tokens=output_tokens)

    def end(self) -> None:
        """Free everything. The connection is reused if only the end of the response is missing."""
        exchange, self.exchange = self.exchange, None
        if exchange is not None and self._lease is None:
            self._upstream.drain(exchange)
        elif exchange is not None:
            self._upstream.end(exchange)
        self.close("cancelled")

    def _end_exchange(self) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            self._upstream.end(exchange)


def _headers(request: GatewayRequest) -> dict[str, str]:
    headers = {"X-Request-Id": request.id}
    return headers if request.trace is None else {**headers, **request.trace.headers}


def _bind(lease: Lease, exchange: UpstreamExchange) -> None:
    """Report the socket's activity to the lease, and fail the exchange when the replica is found dead or hung."""
    exchange.observer = lease
    lease.when_lost(partial(exchange.fail, "lost", "the replica hangs or is gone"))
