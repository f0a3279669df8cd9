"""/tokenize, /detokenize, /v1/messages/count_tokens and /v1/responses/input_tokens: answered by a replica, counted
against the key's limits, and recorded as usage.

They generate nothing, so they are free. Their tokens count towards the key's tokens per minute.
"""

from __future__ import annotations

import asyncio
import time
from itertools import count
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from powerband.dispatch.estimates import BYTES_PER_TOKEN
from powerband.errors import PowerbandError
from powerband.gateway.accounts.accounts import Accounts
from powerband.gateway.accounts.keys import Key
from powerband.gateway.gateway import Gateway, ServedModel
from powerband.gateway.options import Timeouts
from powerband.gateway.proxy.client_request import PATHS, with_model
from powerband.gateway.proxy.pass_through.stored import with_conversation
from powerband.gateway.request import ANONYMOUS, CompletedRequest, GatewayRequest
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.buffered_response import BudgetShare, BufferedResponse, PiecesResponse
from powerband.gateway.upstream.errors import InvalidUpstreamRequest, with_served_name
from powerband.metrics.record import Outcome, RequestRecord
from powerband.openai.chunks import INVALID_JSON
from powerband.openai.errors import read_error
from powerband.web.body import decode
from powerband.web.client_connection import while_connected
from powerband.web.errors import HttpError

_ASK_S = 30.0
_ASK_FIRST_S = 5.0  # while there is another replica to try
_SLACK_TOKENS = 4096  # allowance for what a chat template adds
_MISSING_STATUSES = (404, 405, 410, 501)
_REQUEST_STATUSES = (400, 413, 422)  # others are about the replica, or the gateway's key for it


TokenEndpoint = Literal["tokenize", "detokenize", "count_tokens", "input_tokens"]


class _ModelField(msgspec.Struct):
    model: str | None = None


class _TokenCount(msgspec.Struct):
    count: int | None = None
    input_tokens: int | None = None  # of the two that count a conversation


_COUNTED = msgspec.json.Decoder(_TokenCount)


class TokenCountRoutes:
    def __init__(self, gateway: Gateway, accounts: Accounts) -> None:
        self._gateway = gateway
        self._accounts = accounts
        self._turns = count()

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text, as a replica of the model says."""
        return await self._handle(request, "tokenize")

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, as a replica of the model says."""
        return await self._handle(request, "detokenize")

    async def count_tokens(self, request: Request) -> Response:
        """The number of tokens of a conversation in Anthropic's format, as a replica of the model says."""
        return await self._handle(request, "count_tokens")

    async def input_tokens(self, request: Request) -> Response:
        """The number of tokens of an input in the format of OpenAI's Responses, as a replica of the model says."""
        return await self._handle(request, "input_tokens")

    async def _handle(self, request: Request, endpoint: TokenEndpoint) -> Response:
        with while_connected(request.scope):
            data = await self._gateway.read_body(request)
            stored = self._accounts.responses
            if endpoint == "input_tokens" and stored.on:  # otherwise a replica refuses previous_response_id
                data = (await with_conversation(self._gateway, stored, request, data)).data
            name = await self._gateway.decode(request, data, _model_of)
            return await self._answer(request, endpoint, data, name)

    async def _answer(self, request: Request, endpoint: TokenEndpoint, data: bytes, name: str | None) -> Response:
        """name: of the model, as the request has it."""
        served, key = self._gateway.served(name), request.state.key
        gateway_request = GatewayRequest(
            id=request.state.request_id,
            endpoint=endpoint,
            model=served.route.name,
            tenant=ANONYMOUS if key is None else key.id,
            prompt_tokens=data.count(b",") + 1 if endpoint == "detokenize" else max(1, len(data) // BYTES_PER_TOKEN),
            output_tokens=0,
            max_prompt_tokens=len(data) if endpoint != "detokenize" else None,
            arrival_s=time.monotonic(),
        )
        try:
            return await self._counted(gateway_request, served, data, key, name)
        except PowerbandError as error:
            self._note(gateway_request, 0, error.http_status, error.code, "")
            raise

    async def _counted(
        self, gateway_request: GatewayRequest, served: ServedModel, data: bytes, key: Key | None, name: str | None
    ) -> Response:
        """Raises LimitReached, and HttpError when no replica answers."""
        reservation = self._accounts.limits.reserve(key and self._accounts.keys.current(key), gateway_request)
        buffered = BudgetShare(self._gateway.response_budget, gateway_request.tenant)
        try:
            response, replica = await self._ask(gateway_request, served, data, name, buffered)
        except InvalidUpstreamRequest as fault:
            buffered.release()
            reservation.settle(0, 0, 0.0)
            self._note(gateway_request, 0, fault.http_status, fault.code, "")
            raise
        except asyncio.CancelledError:  # the client left: a replica has worked for it
            buffered.release()
            reservation.settle(gateway_request.prompt_tokens, 0, 0.0, is_estimate=True)
            self._note(gateway_request, 0, 499, "client_left", "")
            raise
        except BaseException:
            buffered.release()
            reservation.cancel()
            raise
        tokens = gateway_request.prompt_tokens
        if gateway_request.endpoint != "detokenize":
            tokens = min(_read_count(response.surface()), len(data) + _SLACK_TOKENS) or tokens
        reservation.settle(tokens, 0, 0.0)
        self._note(gateway_request, tokens, 200, "", replica)
        return PiecesResponse(response.pieces(), buffered.release)

    async def _ask(
        self,
        gateway_request: GatewayRequest,
        served: ServedModel,
        data: bytes,
        name: str | None,
        buffered: BudgetShare,
    ) -> tuple[BufferedResponse, str]:
        """Ask the ready replicas in round-robin order, until one gives a valid response.

        Raises InvalidUpstreamRequest if a replica finds the request invalid, and HttpError if none answers.
        """
        states = {one.id: one.state for one in served.pool.snapshot().replicas}
        replicas = [one for one in served.route.replicas if states.get(one.id) in ("ready", "draining")]
        if replicas:
            first = next(self._turns) % len(replicas)
            replicas = [*replicas[first:], *replicas[:first]]
        lacking = 0
        for replica in replicas:
            ask_s = _ASK_S if replica is replicas[-1] else _ASK_FIRST_S
            body = data if name == replica.model else with_model(data, replica.model)
            try:
                status, response = await self._call(replica, gateway_request, body, ask_s, buffered)
                reported = response.surface()
            except OSError:
                continue
            if status == 200 and _is_object(reported):
                return response, replica.id
            lacking += status in _MISSING_STATUSES
            if status in _REQUEST_STATUSES:
                raise InvalidUpstreamRequest(
                    with_served_name(read_error(reported), replica.model, gateway_request.model), status
                )
        if replicas and lacking == len(replicas):
            engine = replicas[0].adapter.display_name
            raise HttpError(
                404, "not_found", f"The model's engine, {engine}, has no {PATHS[gateway_request.endpoint]}."
            )
        raise HttpError(503, "no_replica", f"No replica of the model answers {PATHS[gateway_request.endpoint]}.")

    async def _call(
        self, replica: ReplicaAddress, gateway_request: GatewayRequest, body: bytes, ask_s: float, buffered: BudgetShare
    ) -> tuple[int, BufferedResponse]:
        """Raises OSError, and ResponseTooLarge and ResponseBudgetExceeded, against which no other replica helps."""
        buffered.release()
        timeouts = Timeouts(connect_s=ask_s, first_byte_s=ask_s, idle_s=ask_s, total_s=ask_s)
        exchange = await self._gateway.upstream.open(replica, PATHS[gateway_request.endpoint], body, timeouts)
        try:
            response = BufferedResponse(depth=1)
            while piece := await exchange.read():
                await self._gateway.response_scanner.add(response, piece, gateway_request.tenant)
                buffered.add(len(piece), response.size)
            return exchange.status, response
        finally:
            self._gateway.upstream.end(exchange)

    def _note(self, gateway_request: GatewayRequest, tokens: int, status: int, error: str, replica: str) -> None:
        """Record usage only: the request has no TTFT or TPOT for the metrics and the monitor."""
        record = RequestRecord(
            scheduled_s=gateway_request.arrival_s,
            sent_s=gateway_request.arrival_s,
            outcome=Outcome.OK if status < 400 else Outcome.REFUSED,
            prompt_tokens=tokens,
        )
        replicas = (replica,) if replica else ()
        finished = CompletedRequest(
            request=gateway_request, record=record, status=status, ended_at=time.time(), error=error, replicas=replicas
        )
        self._accounts.usage_log.note(finished)


def _model_of(data: bytes) -> str | None:
    """The name of the model in a body. Raises InvalidRequest."""
    return decode(data, _ModelField).model


def _is_object(response: bytes) -> bool:
    try:
        response.decode()
        msgspec.json.decode(response, type=dict[str, msgspec.Raw])
    except INVALID_JSON:
        return False
    return True


def _read_count(response: bytes) -> int:
    try:
        found = _COUNTED.decode(response)
        return max(0, found.count or found.input_tokens or 0)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0
