"""/v1/chat/completions and /v1/completions: from a client's request to the end of the response and its usage record.

limits ─► pool (the only queue) ─► replica ─► client        in any case: settle limits, free the slot, record usage
                 ▲                   │
                 └── on failure ◄────┘
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar, NoReturn

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from powerband.core.loop import error_info
from powerband.core.request import OUTPUT_COMPLETE
from powerband.dispatch.prefix import prefix_keys
from powerband.engines.base import CannotResume
from powerband.errors import PowerbandError
from powerband.gateway.accounts.accounts import Accounts
from powerband.gateway.accounts.keys import Key, KeyLimits
from powerband.gateway.accounts.limits import Reservation, price_from
from powerband.gateway.gateway import Gateway, ServedModel, owner_of
from powerband.gateway.proxy.attempts import BuildRequest, ReplicaError, UpstreamAttempts
from powerband.gateway.proxy.client_request import COMPLETION_TOKENS, ClientRequest
from powerband.gateway.proxy.interfaces import ProxiedRequest, ResponseState
from powerband.gateway.proxy.relay import Relay
from powerband.gateway.proxy.resume import Resumer
from powerband.gateway.proxy.stream_state import StreamState
from powerband.gateway.request import ANONYMOUS, CompletedRequest, Endpoint, GatewayRequest
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.buffered_response import (
    INSIDE_CHOICES,
    BudgetShare,
    BufferedResponse,
    PiecesResponse,
    ResponseBudgetExceeded,
    ResponseTooLarge,
)
from powerband.gateway.upstream.errors import InvalidUpstreamRequest
from powerband.gateway.upstream.exchange import UpstreamExchange
from powerband.gateway.upstream.failure import UpstreamFailure
from powerband.metrics.record import Outcome, RequestRecord
from powerband.openai.events import MAX_EVENT_BYTES, event
from powerband.web.client_connection import (
    ClientConnection,
    ClientDisconnected,
    cancel_this_task,
    client_connection,
    while_connected,
)
from powerband.web.errors import error_body
from powerband.web.middleware import pass_on_ignored_fields
from powerband.web.streaming import STREAM_HEADERS

_WITHOUT_STREAM = "Ask for it without stream, or for fewer log-probabilities."


class GenerationRoutes:
    def __init__(self, gateway: Gateway, accounts: Accounts) -> None:
        self._gateway = gateway
        self._accounts = accounts

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, as one response or as a stream of chunks."""
        return await self._take(request, "chat")

    async def completions(self, request: Request) -> Response:
        """Continue one or several texts, as one response or as a stream of chunks."""
        return await self._take(request, "completions")

    async def _take(self, request: Request, endpoint: Endpoint) -> Response:
        with while_connected(request.scope):
            client_request = await self._gateway.read(request, lambda data: ClientRequest(data, endpoint))
        served = self._gateway.served(client_request.fields.model)
        gateway_request, key = admit(self._gateway, served, request, client_request)
        gateway_request.prefix_keys = prefix_keys(
            endpoint, client_request.prompt, gateway_request.tenant, client_request.prompt_salt + served.prefix_salt
        )
        return GenerationResponse(self._gateway, self._accounts, served, client_request, gateway_request, key)


def admit(
    gateway: Gateway, served: ServedModel, request: Request, client_request: ProxiedRequest
) -> tuple[GatewayRequest, Key | None]:
    """The request for queue and limits, and its key. Raises HttpError if the client's bodies take too much memory."""
    key: Key | None = request.state.key
    if request.client is not None:
        client_connection(request.scope).keep_body(client_request.size, owner_of(request))
    gateway_request = client_request.request(
        request.state.request_id,
        served.route.name,
        ANONYMOUS if key is None else key.id,
        request.headers,
        gateway.settings.default_output_tokens,
        KeyLimits().priority if key is None else key.limits.priority,  # without a key: the default
    )
    gateway_request.output_tokens = served.estimates.output.likely(
        gateway_request.output_tokens, gateway_request.num_sequences
    )
    gateway_request.adapter, gateway_request.backends = served.adapter, served.holders
    gateway_request.trace = gateway.trace(request.headers)
    return gateway_request, key


class ProxiedResponse(Response, ABC):
    """One running request. As a Response, it is called with the client's ASGI channels."""

    def __init__(
        self,
        gateway: Gateway,
        accounts: Accounts,
        served: ServedModel,
        client_request: ProxiedRequest,
        request: GatewayRequest,
        key: Key | None,
    ) -> None:
        self.background = None
        self._gateway = gateway
        self._accounts = accounts
        self._served = served
        self._client_request = client_request
        self._request = request
        self._key = key
        self._attempts = UpstreamAttempts(
            request,
            served.pool,
            gateway.upstream,
            max_attempts=gateway.settings.max_attempts,
        )
        self._state = self._new_state()
        self._reservation: Reservation | None = None
        self._connection: ClientConnection | None = None
        self._scope: Scope = {"state": {}}
        self._status = 500
        self._outcome = Outcome.ERROR
        self._error = ""
        self._resumed = 0
        self._buffered = BudgetShare(gateway.response_budget, request.tenant)
        self._is_prompt_counted = False

    _buffered_depth: ClassVar[int] = INSIDE_CHOICES  # see BufferedResponse
    _is_private = False  # its texts are not stored

    @abstractmethod
    def _new_state(self) -> ResponseState:
        """The state before the first event."""

    @abstractmethod
    def _plan_resume(self) -> BuildRequest:
        """The request of each further attempt, after the client has received a part of the response.

        Raises CannotResume.
        """

    @abstractmethod
    def _error_event(self, error: PowerbandError) -> bytes:
        """The last event of a stream that failed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._gateway.begin()
        scope["state"]["finished"] = True  # it will be recorded, however it ends
        self._scope = scope
        connection = self._connection = client_connection(scope)
        try:
            connection.when_lost(cancel_this_task())
            await self._reserve()
            await (self._stream(send) if self._client_request.is_stream else self._whole(scope, receive, send))
        except asyncio.CancelledError:
            if self._error or not connection.is_lost:
                self._fail(Outcome.ABORTED, self._error or "shut_down", self._status or 503)
                raise
            self._fail(Outcome.ABORTED, "client_left", 499)
            raise ClientDisconnected from None
        except PowerbandError as error:
            self._record_error(error)
            raise
        finally:
            connection.when_lost(None)
            self._buffered.release()
            try:
                self._finish()
            finally:
                self._gateway.end()

    # ---- responses that are not streamed

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        attempts, timeouts = self._attempts, self._gateway.settings.whole_timeouts
        while True:
            replica, exchange = await attempts.send(self._first_request, timeouts)
            try:
                await self._turn()
                pieces = self._read_whole(await self._collect(exchange), replica)
                pass_on_ignored_fields(scope, exchange.headers)
                break
            except InvalidUpstreamRequest as problem:
                if not attempts.go_to_longer(problem):
                    raise
            except UpstreamFailure as problem:
                await attempts.handle_failure(problem)
                self._state = self._new_state()  # nothing of it was sent
        self._settle_status(200)
        attempts.close("ok", self._state.tokens.num_output)
        await PiecesResponse(pieces)(scope, receive, send)

    async def _collect(self, exchange: UpstreamExchange) -> BufferedResponse:
        """Receive a response. Raises UpstreamFailure, and ResponseTooLarge, against which no other replica helps."""
        self._buffered.release()
        response = BufferedResponse(self._buffered_depth)
        while piece := await exchange.read():
            try:
                await self._gateway.response_scanner.add(response, piece, self._request.tenant)
                self._buffered.add(len(piece), response.size)
            except ResponseTooLarge as error:
                self._raise_too_large(exchange, error)
            except ResponseBudgetExceeded:
                exchange.close()
                self._attempts.close("ok")
                raise
        return response

    def _raise_too_large(self, exchange: UpstreamExchange, error: ResponseTooLarge) -> NoReturn:
        """A response, or an event of it, is larger than the gateway buffers: the replica's fault if no right one is."""
        if (max_bytes := self._client_request.max_response_bytes) < error.max_bytes:
            raise UpstreamFailure("garbage", f"{error.message} A right one has at most {max_bytes} bytes.") from None
        exchange.close()
        self._attempts.close("ok")
        raise error from None

    def _read_whole(self, response: BufferedResponse, replica: ReplicaAddress) -> list[bytes]:
        """Count the tokens, and return the response with the served model name. Raises UpstreamFailure."""
        tokens = self._state.tokens
        pieces = self._state.read_whole(response, replica)
        if tokens.num_output:
            tokens.times_s.append(time.monotonic())
            tokens.counts.append(tokens.num_output)
        return pieces

    async def _first_request(self, replica: ReplicaAddress) -> tuple[str, bytes]:
        return self._client_request.path, self._client_request.upstream_body(replica, self._request.tenant)

    # ---- streams

    async def _stream(self, send: Send) -> None:
        """Stream events to the end. A failure before the first byte raises; after it, the failure is the last event."""
        try:
            await self._relay(send)
        except (PowerbandError, CannotResume) as problem:
            if not self._attempts.response_started:
                if isinstance(problem, CannotResume):
                    raise ReplicaError("The replica failed.") from None
                raise
            error = problem if isinstance(problem, PowerbandError) else _stream_lost()
            self._record_error(error, status=200)
            self._attempts.close("cancelled")  # before sending, because the client may be slow to read
            await send({"type": "http.response.body", "body": self._error_event(error), "more_body": False})
            return
        self._settle_status(200)
        self._attempts.close("ok", self._state.tokens.num_output)
        await send({"type": "http.response.body", "body": self._state.final_events(), "more_body": False})

    async def _relay(self, send: Send) -> None:
        """Relay the response without its last event, from as many replicas as it takes."""
        attempts, state, settings = self._attempts, self._state, self._gateway.settings
        plan: BuildRequest = self._first_request
        while True:
            try:
                replica, exchange = await attempts.send(plan, settings.stream_timeouts)
            except InvalidUpstreamRequest as problem:
                if not attempts.response_started:
                    raise
                if problem.code != OUTPUT_COMPLETE:
                    raise ReplicaError(f"No replica can continue this response: {problem}") from None
                await self._send(send, state.finish())  # only the end of the response was lost
                return
            await self._turn()
            state.begin(replica)
            num_before = state.tokens.num_output
            try:
                await self._relay_exchange(exchange, send)
                return
            except InvalidUpstreamRequest as problem:
                if attempts.response_started or not attempts.go_to_longer(problem):
                    raise
            except UpstreamFailure as problem:
                if state.is_finished:
                    attempts.close("failed", state.tokens.num_output)
                    return  # nothing of the response itself is missing
                await attempts.handle_failure(problem, state.tokens.num_output - num_before)
            if attempts.response_started:
                plan = self._plan_resume()
                self._resumed += 1
                attempts.request = replace(attempts.request, deadline_s=None)
            else:
                self._state = state = self._new_state()

    async def _relay_exchange(self, exchange: UpstreamExchange, send: Send) -> None:
        """Relay the events of one replica. Raises UpstreamFailure if the stream is incomplete."""
        relay = Relay(self._attempts, self._state, exchange, self._count_tokens, self._turn)
        try:
            if not self._attempts.response_started:
                pass_on_ignored_fields(self._scope, exchange.headers)
                await self._send(send, await relay.read_first_events())
            if self._connection is not None:
                await relay.forward(self._connection)
        except UpstreamFailure as problem:
            if problem.code != "too_large":
                raise
            error = ResponseTooLarge("event of the response", MAX_EVENT_BYTES, _WITHOUT_STREAM)
            self._raise_too_large(exchange, error)

    def _count_tokens(self, tokens: int) -> None:
        """Correct the reservation by what the replica reports, up to what the request can be charged in the end."""
        reservation, counter = self._reservation, self._state.tokens
        if reservation is None:
            return
        if not self._is_prompt_counted and counter.reported_prompt:
            self._is_prompt_counted = True
            reservation.prompt_counted(counter.final_usage()[0])
        if tokens > reservation.output:
            reservation.add_output_tokens(min(tokens, counter.max_output))

    async def _turn(self) -> None:
        await self._gateway.turns.turn(self._request.tenant)

    async def _send(self, send: Send, data: bytes) -> None:
        if not self._attempts.response_started:
            self._attempts.response_started = True
            # A new list each time, because middleware adds headers to it.
            await send({"type": "http.response.start", "status": 200, "headers": list(STREAM_HEADERS)})
        await send({"type": "http.response.body", "body": data, "more_body": True})

    # ---- limits and the record

    async def _reserve(self) -> None:
        request, key = self._request, self._key and self._accounts.keys.current(self._key)
        context = None
        if key is not None and request.is_open_ended and key.limits.counts_tokens:
            lengths = self._served.context_lengths
            self._client_request.contexts = lengths.known
            context = await lengths.largest(self._served.route.replicas, self._gateway.upstream)
            key = self._accounts.keys.current(key)
        price = price_from(self._served.route)
        self._reservation = self._accounts.limits.reserve(key, request, price, context=context)
        self._client_request.cap = self._reservation.cap
        if key is not None and request.endpoint == "completions" and key.limits.counts_tokens:
            # An engine with another default must not generate more than was reserved.
            self._client_request.cap = COMPLETION_TOKENS

    def _settle_status(self, status: int) -> None:
        self._status = status
        self._outcome = Outcome.OK
        self._error = ""

    def _record_error(self, error: PowerbandError, status: int = 0) -> None:
        if isinstance(error, InvalidUpstreamRequest):
            self._attempts.close("ok", self._state.tokens.num_output)
        is_rejected = error.http_status < 500 or error.http_status == 503
        outcome = Outcome.REFUSED if is_rejected and not status else Outcome.ERROR
        self._fail(Outcome.TIMED_OUT if error.http_status == 504 else outcome, error.code, status or error.http_status)

    def _fail(self, outcome: Outcome, code: str, status: int) -> None:
        if self._outcome is not Outcome.OK:  # a complete response stays a success
            self._outcome, self._error, self._status = outcome, code, status

    def _finish(self) -> None:
        attempts, state, now_s = self._attempts, self._state, time.monotonic()
        attempts.end()
        (prompt_tokens, cached_tokens, output_tokens), is_estimate = self._used(now_s)
        usd = price_from(self._served.route).of(prompt_tokens, output_tokens)
        if self._reservation is not None:
            if attempts.replicas:
                self._reservation.settle(prompt_tokens, output_tokens, usd, is_estimate=is_estimate)
            else:
                self._reservation.cancel()
        request = self._request
        if attempts.replicas and not self._is_private:
            self._accounts.content.note(request, self._client_request.prompt, state.texts)
        record = RequestRecord(
            scheduled_s=request.arrival_s,
            sent_s=attempts.sent_s or now_s,
            chunk_times_s=tuple(state.tokens.times_s),
            chunk_tokens=tuple(state.tokens.counts),
            outcome=self._outcome,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            cached_tokens=cached_tokens,
        )
        self._gateway.note(
            CompletedRequest(
                request=request,
                record=record,
                status=self._status,
                ended_at=time.time(),
                error=self._error,
                replicas=tuple(attempts.replicas),
                failed=tuple(attempts.failed_attempts),
                seconds=now_s - request.arrival_s,
                queue_s=attempts.queue_s,
                resumed=self._resumed,
                finish_reason=state.finish_reason,
                reasoning_tokens=state.tokens.reasoning,
                cost_usd=usd,
                is_estimate=is_estimate,
            )
        )

    def _used(self, now_s: float) -> tuple[tuple[int, int, int], bool]:
        """Prompt, cached and output tokens to charge, and whether any of them is an estimate.

        A client that disconnects, or whose response is too large to buffer, is charged, because the replica did the
        work. A failed response is charged as far as the client received it.
        """
        attempts, tokens, client_request = self._attempts, self._state.tokens, self._client_request
        is_ok = self._outcome is Outcome.OK
        if tokens.num_output or tokens.usage is not None or (attempts.sent_s and is_ok):
            used = tokens.final_usage()
            if is_ok and not tokens.is_estimate and used[2] and len(attempts.replicas) == 1:
                tokens.teach(self._served.estimates, used[2], attempts.sent_s)
            return used, tokens.is_estimate
        if not attempts.sent_s or self._error not in (
            "client_left",
            ResponseTooLarge.default_code,
            ResponseBudgetExceeded.default_code,
        ):
            return (0, 0, 0), False
        output = 0
        if not client_request.is_stream:
            limit = client_request.limit
            if limit is None and client_request.endpoint == "completions":
                limit = COMPLETION_TOKENS
            output = self._served.estimates.of_whole(now_s - attempts.sent_s, client_request.num_sequences, limit)
        return (self._request.prompt_tokens, 0, output), True


def _stream_lost() -> ReplicaError:
    return ReplicaError("The replica failed in the middle of the response, and no other replica can continue it.")


class GenerationResponse(ProxiedResponse):
    """The response to a chat or a completion, which another replica can resume."""

    def __init__(
        self,
        gateway: Gateway,
        accounts: Accounts,
        served: ServedModel,
        client_request: ClientRequest,
        request: GatewayRequest,
        key: Key | None,
    ) -> None:
        self._understood = client_request
        super().__init__(gateway, accounts, served, client_request, request, key)

    def _new_state(self) -> StreamState:
        served = self._served
        self._latest = StreamState(
            self._understood, served.route.name, served.estimates, keeps_text=self._accounts.content.on
        )
        return self._latest

    def _plan_resume(self) -> BuildRequest:
        return Resumer(self._understood, self._latest, self._gateway.upstream, self._request.tenant).plan

    def _error_event(self, error: PowerbandError) -> bytes:
        return event(msgspec.json.encode(error_body(error_info(error))))
