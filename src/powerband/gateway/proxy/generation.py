"""/v1/chat/completions and /v1/completions: from a client's request to the end of its answer, and the record of it.

limits ─► pool (waits here, nowhere else) ─► replica ─► client        whatever happens: settled, freed, noted
                 ▲                             │
                 └── fails, or breaks off ◄────┘
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from powerband.core.loop import error_info
from powerband.core.request import OUTPUT_COMPLETE
from powerband.dispatch.prefix import prefix_keys
from powerband.errors import PowerbandError
from powerband.gateway.accounts.books import Books
from powerband.gateway.accounts.keys import Key, KeyLimits
from powerband.gateway.accounts.limits import Reservation, price_of
from powerband.gateway.gateway import Gateway, Served
from powerband.gateway.proxy.complaints import RequestFault
from powerband.gateway.proxy.connection import Exchange, UpstreamFailure
from powerband.gateway.proxy.context_length import context_length
from powerband.gateway.proxy.events import read_chunk
from powerband.gateway.proxy.intake import COMPLETION_TOKENS, PATHS, Intake
from powerband.gateway.proxy.relay import Relay
from powerband.gateway.proxy.resume import CannotResume, Resumer
from powerband.gateway.proxy.story import Story
from powerband.gateway.proxy.trip import ReplicaError, Trip
from powerband.gateway.request import ANONYMOUS, Endpoint, Finished, GatewayRequest
from powerband.gateway.routes import ReplicaAddress
from powerband.metrics.record import Outcome, RequestRecord
from powerband.web.body import read_body
from powerband.web.edge import ClientLeft
from powerband.web.errors import error_body
from powerband.web.line import ClientLine, line_of
from powerband.web.streaming import STREAM_HEADERS, event

MAX_ANSWER_BYTES = 64 << 20


class AnswerTooLarge(PowerbandError):
    """An answer may be right, but is larger than the gateway holds."""

    http_status = 502
    default_code = "answer_too_large"

    def __init__(self) -> None:
        super().__init__(
            f"The answer is larger than {MAX_ANSWER_BYTES} bytes.",
            hint="Ask for it as a stream, or for fewer choices, tokens or log-probabilities.",
        )


class GenerationRoutes:
    def __init__(self, gateway: Gateway, books: Books) -> None:
        self._gateway = gateway
        self._books = books

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, whole or as a stream of chunks."""
        return await self._take(request, "chat")

    async def completions(self, request: Request) -> Response:
        """Continue one or several texts, whole or as a stream of chunks."""
        return await self._take(request, "completions")

    async def _take(self, request: Request, endpoint: Endpoint) -> Response:
        settings = self._gateway.settings
        data = await read_body(request, settings.max_body_bytes)
        intake = Intake(data, endpoint)
        served = self._gateway.served(intake.asked.model)
        key: Key | None = request.state.key
        told = intake.request(
            request.state.request_id,
            served.route.name,
            ANONYMOUS if key is None else key.id,
            request.headers,
            settings.default_output_tokens,
            KeyLimits().priority if key is None else key.limits.priority,  # without a key: as one that was given none
        )
        told.output_tokens = served.estimates.output.likely(told.output_tokens, told.answers)
        told.trace = self._gateway.trace(request.headers)
        told.prefix_keys = prefix_keys(endpoint, intake.prompt, told.tenant, intake.prompt_salt)
        return Generation(self._gateway, self._books, served, intake, told, key)


class Generation(Response):
    """One request under way. Being a Response, it is called with the client's ASGI channels."""

    def __init__(  # what a request is made of, from one place
        self, gateway: Gateway, books: Books, served: Served, intake: Intake, request: GatewayRequest, key: Key | None
    ) -> None:
        self.background = None
        self._gateway = gateway
        self._books = books
        self._served = served
        self._intake = intake
        self._request = request
        self._key = key
        self._trip = Trip(request, served.pool, gateway.upstream, max_tries=gateway.settings.max_tries)
        self._story = self._new_story()
        self._reservation: Reservation | None = None
        self._line: ClientLine | None = None
        self._status = 500
        self._outcome = Outcome.ERROR
        self._error = ""
        self._resumed = 0
        self._is_prompt_counted = False

    def _new_story(self) -> Story:
        served = self._served
        return Story(self._intake, served.route.name, served.estimates, keeps_text=self._books.content.on)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._gateway.begin()
        scope["state"]["finished"] = True  # its end will be noted, whatever that is
        line = self._line = line_of(scope)
        try:
            line.when_lost(_cancel_this_task())
            await self._reserve()
            await (self._stream(send) if self._intake.is_stream else self._whole(scope, receive, send))
        except asyncio.CancelledError:
            if self._error or not line.is_lost:
                self._fail(Outcome.ABORTED, self._error or "shut_down", self._status or 503)
                raise
            self._fail(Outcome.ABORTED, "client_left", 499)
            raise ClientLeft from None
        except PowerbandError as error:
            self._note_error(error)
            raise
        finally:
            line.when_lost(None)
            try:
                self._finish()
            finally:
                self._gateway.end()

    # ---- whole answers

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        trip, timeouts = self._trip, self._gateway.settings.whole_timeouts
        while True:
            replica, exchange = await trip.go(self._first_plan, timeouts)
            try:
                body = self._read_whole(await self._body(exchange), replica)
                break
            except UpstreamFailure as problem:
                await trip.failed(problem)
        self._settle_status(200)
        trip.close("ok", self._story.num_tokens)
        await Response(body, 200, media_type="application/json")(scope, receive, send)

    async def _body(self, exchange: Exchange) -> bytes:
        """Raises UpstreamFailure, and AnswerTooLarge for what may be right: another replica would say as much."""
        max_bytes = min(MAX_ANSWER_BYTES, self._intake.max_answer_bytes)
        try:
            return await exchange.read_all(max_bytes)
        except UpstreamFailure as problem:
            if problem.code != "too_large":
                raise
            if max_bytes < MAX_ANSWER_BYTES:
                raise UpstreamFailure("garbage", f"{problem} No right answer to this request is.") from None
            self._trip.close("ok")
            raise AnswerTooLarge from None

    def _read_whole(self, body: bytes, replica: ReplicaAddress) -> bytes:
        """Counted, and under the name that is served here. Raises UpstreamFailure for what is no answer."""
        chunk, story = read_chunk(body), self._story
        story.begin(replica)
        if chunk.error:
            raise story.as_failure(chunk.error)
        if not chunk.choices:
            raise UpstreamFailure("garbage", "The replica sent an answer without choices.")
        story.take_whole(chunk, replica)
        story.finish_reason = chunk.choices[0].finish_reason or ""
        if story.num_tokens:
            story.times_s.append(time.monotonic())
            story.counts.append(story.num_tokens)
        return story.whole(body, chunk)

    async def _first_plan(self, replica: ReplicaAddress) -> tuple[str, bytes]:
        return PATHS[self._request.endpoint], self._intake.body_for(replica, self._request.tenant)

    # ---- streams

    async def _stream(self, send: Send) -> None:
        """Events until the end; failing before the first byte raises, after it the failure is the last event."""
        try:
            await self._relay(send)
        except (PowerbandError, CannotResume) as problem:
            if not self._trip.has_begun:
                if isinstance(problem, CannotResume):
                    raise ReplicaError("The replica failed.") from None
                raise
            error = problem if isinstance(problem, PowerbandError) else _broken_off()
            self._note_error(error, status=200)
            data = event(msgspec.json.encode(error_body(error_info(error))))
            await send({"type": "http.response.body", "body": data, "more_body": False})
            return
        self._settle_status(200)
        self._trip.close("ok", self._story.num_tokens)
        await send({"type": "http.response.body", "body": self._story.closing(), "more_body": False})

    async def _relay(self, send: Send) -> None:
        """The answer, from as many replicas as it takes, but for its last event."""
        trip, story, settings = self._trip, self._story, self._gateway.settings
        resumer = Resumer(self._intake, story, self._gateway.upstream, self._request.tenant)
        plan = self._first_plan
        while True:
            try:
                replica, exchange = await trip.go(plan, settings.stream_timeouts)
            except RequestFault as problem:
                if not trip.has_begun:
                    raise
                if problem.code != OUTPUT_COMPLETE:
                    raise ReplicaError(f"No replica goes on with this answer: {problem}") from None
                await self._send(send, story.finish())  # only the end of the answer was lost
                return
            story.begin(replica)
            num_before = story.num_tokens
            try:
                await self._relay_exchange(exchange, send)
                return
            except UpstreamFailure as problem:
                if story.is_finished:
                    trip.close("failed", story.num_tokens)
                    return  # nothing of the answer itself is missing
                await trip.failed(problem, story.num_tokens - num_before)
            if trip.has_begun:
                self._resumed += 1
                plan = resumer.plan
                trip.request = replace(self._request, deadline_s=None)
            else:
                self._story = story = self._new_story()
                resumer = Resumer(self._intake, story, self._gateway.upstream, self._request.tenant)

    async def _relay_exchange(self, exchange: Exchange, send: Send) -> None:
        """Pass on events until the last. Raises UpstreamFailure when it does not come."""
        relay = Relay(self._trip, self._story, exchange, self._count_tokens)
        if not self._trip.has_begun:
            await self._send(send, await relay.read_opening())
        if self._line is not None:
            await relay.pass_on(self._line)

    def _count_tokens(self, tokens: int) -> None:
        reservation = self._reservation
        if reservation is None:
            return
        if not self._is_prompt_counted and (prompt := self._story.counted_prompt):
            self._is_prompt_counted = True
            reservation.prompt_counted(prompt)
        if tokens > reservation.output:
            reservation.produced(tokens)

    async def _send(self, send: Send, data: bytes) -> None:
        if not self._trip.has_begun:
            self._trip.has_begun = True
            # A new message each time: layers on its way add to it.
            await send({"type": "http.response.start", "status": 200, "headers": list(STREAM_HEADERS)})
        await send({"type": "http.response.body", "body": data, "more_body": True})

    # ---- the books

    async def _reserve(self) -> None:
        request, key = self._request, self._key and self._books.keys.current(self._key)
        context = None
        if key is not None and request.is_open_ended and key.limits.counts_tokens:
            context = await context_length(self._served, self._gateway.upstream)
            key = self._books.keys.current(key)
        price = price_of(self._served.route)
        self._reservation = self._books.limits.reserve(key, request, price, context=context)
        self._intake.cap = self._reservation.cap
        if key is not None and request.endpoint == "completions" and key.limits.counts_tokens:
            self._intake.cap = COMPLETION_TOKENS  # an engine with another default is not to make more than was taken

    def _settle_status(self, status: int) -> None:
        self._status = status
        self._outcome = Outcome.OK
        self._error = ""

    def _note_error(self, error: PowerbandError, status: int = 0) -> None:
        if isinstance(error, RequestFault):
            self._trip.close("ok", self._story.num_tokens)
        refused = error.http_status < 500 or error.http_status == 503
        outcome = Outcome.REFUSED if refused and not status else Outcome.ERROR
        self._fail(Outcome.TIMED_OUT if error.http_status == 504 else outcome, error.code, status or error.http_status)

    def _fail(self, outcome: Outcome, code: str, status: int) -> None:
        if self._outcome is not Outcome.OK:  # an answer that is whole stays so
            self._outcome, self._error, self._status = outcome, code, status

    def _finish(self) -> None:
        trip, story, now_s = self._trip, self._story, time.monotonic()
        trip.end()
        (prompt_tokens, cached_tokens, output_tokens), is_estimate = self._used(now_s)
        usd = price_of(self._served.route).of(prompt_tokens, output_tokens)
        if self._reservation is not None:
            if trip.replicas:
                self._reservation.settle(prompt_tokens, output_tokens, usd, is_estimate=is_estimate)
            else:
                self._reservation.cancel()
        request = self._request
        if trip.replicas:
            self._books.content.note(request, self._intake.prompt, story.texts)
        record = RequestRecord(
            scheduled_s=request.arrival_s,
            sent_s=trip.sent_s or now_s,
            chunk_times_s=tuple(story.times_s),
            chunk_tokens=tuple(story.counts),
            outcome=self._outcome,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            cached_tokens=cached_tokens,
        )
        self._gateway.note(
            Finished(
                request=request,
                record=record,
                status=self._status,
                ended_at=time.time(),
                error=self._error,
                replicas=tuple(trip.replicas),
                failed=tuple(trip.broken),
                seconds=now_s - request.arrival_s,
                queue_s=trip.queue_s,
                resumed=self._resumed,
                finish_reason=story.finish_reason,
                cost_usd=usd,
                is_estimate=is_estimate,
            )
        )

    def _used(self, now_s: float) -> tuple[tuple[int, int, int], bool]:
        """Prompt, cached and output tokens that the request is charged, and whether any of them is an estimate.

        Who leaves, or asks for more than can be held, has made a replica work all the same. What failed is charged as
        far as its client has it.
        """
        trip, story, intake = self._trip, self._story, self._intake
        if story.num_tokens or story.usage is not None or (trip.sent_s and self._outcome is Outcome.OK):
            used = story.final_usage()
            if self._outcome is Outcome.OK and not story.is_estimate and story.times_s and len(trip.replicas) == 1:
                seconds = story.times_s[-1] - trip.sent_s
                self._served.estimates.learn(used[2], intake.num_choices, seconds, story.text.size)
            return used, story.is_estimate
        if not trip.sent_s or self._error not in ("client_left", AnswerTooLarge.default_code):
            return (0, 0, 0), False
        output = 0
        if not intake.is_stream:
            output = self._served.estimates.of_whole(now_s - trip.sent_s, intake.num_answers, intake.asked.limit)
        return (self._request.prompt_tokens, 0, output), True


def _cancel_this_task() -> Callable[[], None]:
    """For when the client has left: whatever is waited for, is not waited for any more."""
    task = asyncio.current_task()

    def cancel() -> None:
        if task is not None:
            task.cancel()

    return cancel


def _broken_off() -> ReplicaError:
    return ReplicaError("The replica failed in the middle of the answer, and no other can go on with it.")
