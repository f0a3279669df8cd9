"""Relays the part of a stream that one replica sends to the client, event by event."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from powerband.gateway.proxy.attempts import UpstreamAttempts
from powerband.gateway.proxy.interfaces import ResponseState
from powerband.gateway.upstream.buffered_response import BudgetShare, ResponseBudgetExceeded
from powerband.gateway.upstream.exchange import UpstreamExchange
from powerband.gateway.upstream.failure import UpstreamFailure
from powerband.openai.chunks import count_ids
from powerband.openai.events import END, EventReader, EventTooLarge
from powerband.web.client_connection import ClientConnection

# A replica that sends only comments and empty events has failed.
MAX_EVENTS_WITHOUT_TOKEN = 1 << 16
_EVENTS_WITHOUT_TURN = 8  # of one read; in streams that are not flooded, there are one or two
_EVENTS_OF_A_TURN = 64  # per turn of the event loop; each takes about 10 µs
_BYTES_OF_A_TURN = 256 << 10
_BYTES_WITHOUT_TURN = 64 << 10
_AFTER_FINISH_S = 5.0  # for the usage and the last event, after every choice has a finish reason


class Relay:
    """Call `read_first_events` to get the first data for the client, then `forward` for the rest.

    A replica may send any number of events at once: they are processed in batches, so that other tasks run in between.
    """

    def __init__(
        self,
        attempts: UpstreamAttempts,
        state: ResponseState,
        exchange: UpstreamExchange,
        on_tokens: Callable[[int], None],
        turn: Callable[[int], Awaitable[None]],
        buffered: BudgetShare,
    ) -> None:
        """on_tokens: called with the total number of tokens whenever it grows. turn: awaited before much is processed,
        with the bytes of the next event. buffered: what the client has not read.
        """
        self._attempts = attempts
        self._state = state
        self._exchange = exchange
        self._on_tokens = on_tokens
        self._turn = turn
        self._buffered = buffered
        self._has_much = False  # more has come at once than is processed without a turn
        self._reader = EventReader()
        self._events: deque[bytes] = deque()  # not processed yet
        self._has_ended = False
        self._max_events = MAX_EVENTS_WITHOUT_TOKEN
        self._is_cut = False  # the stream is ended because the engine exceeds the requested limit
        self._problem: UpstreamFailure | None = None

    @property
    def _wants_more(self) -> bool:
        return not (self._has_ended or self._is_cut or self._state.is_over) and self._problem is None

    async def read_first_events(self) -> bytes:
        """The first events for the client. Raises UpstreamFailure if there are none."""
        while self._wants_more:
            if self._events:
                await self._next_turn()
            elif piece := await self._exchange.read():
                self._split(piece)
                if self._has_much:
                    continue
            else:
                break
            if processed := self._process_events():
                return processed
        raise self._problem or self._truncated()

    async def forward(self, connection: ClientConnection) -> None:
        """Forward the rest of the stream. Raises UpstreamFailure if it ends before its last event."""

        def take(piece: bytes) -> bool:
            self._split(piece)
            if self._has_much:
                return False
            self._write(connection)
            if self._events or not self._wants_more:
                return False
            self._wait_for(connection)
            return True

        while self._wants_more:
            while self._events and self._wants_more:
                await self._next_turn()
                self._write(connection)
            if self._wants_more:
                self._wait_for(connection)
                await self._exchange.stream_to(take)
                if not self._events:
                    break
        if self._problem is not None:
            raise self._problem
        if self._is_cut:
            self._attempts.warn(
                "It generated more tokens than requested. Does its engine ignore max_tokens or max_completion_tokens?"
            )
            connection.write_chunk(self._state.cut("length"))
            return
        # Some servers do not send [DONE]: then every choice must have a finish reason.
        if not (self._state.may_end if self._has_ended else self._state.is_finished):
            raise self._truncated()

    def _wait_for(self, connection: ClientConnection) -> None:
        """If the client is behind in reading, take no more of the stream until it has caught up."""
        if not connection.is_behind:
            return
        self._exchange.hold()
        self._buffered.release()
        try:
            self._buffered.add(connection.unread_bytes, connection.unread_bytes)
        except ResponseBudgetExceeded:
            connection.abort()  # as if it had left: an error would wait behind what it does not read
        connection.when_writable(self._go_on)

    def _go_on(self) -> None:
        self._buffered.release()
        self._exchange.release()

    async def _next_turn(self) -> None:
        await asyncio.sleep(0)
        await self._turn(len(self._events[0]))

    def _split(self, piece: bytes) -> None:
        try:
            found = self._reader.feed(piece)
        except EventTooLarge as problem:
            self._problem = UpstreamFailure("too_large", f"The replica's {problem}.")
            return
        self._has_much = len(found) > _EVENTS_WITHOUT_TURN or sum(map(len, found)) > _BYTES_WITHOUT_TURN
        if found:
            self._attempts.progress()
            self._events.extend(found)
        else:  # a comment or a partial event does not extend the time limit
            self._exchange.no_progress()

    def _write(self, connection: ClientConnection) -> None:
        if processed := self._process_events():
            connection.write_chunk(processed)

    def _process_events(self) -> bytes:
        """Process the next events: count their tokens, and return the data for the client."""
        state, events, now_s = self._state, self._events, time.monotonic()
        had_tokens, size = state.tokens.num_output, 0
        processed: list[bytes] = []
        try:
            while events and len(processed) < _EVENTS_OF_A_TURN and size < _BYTES_OF_A_TURN:
                data = events.popleft()
                if data == END:
                    self._has_ended = True
                    break
                size += len(data)
                processed.append(state.process_event(data, now_s))
        except UpstreamFailure as problem:  # the client still gets the events before it
            self._problem = problem
        self._check_bounds(grew=state.tokens.num_output != had_tokens)
        if state.tokens.num_output != had_tokens:
            self._on_tokens(state.tokens.num_output)
            if not had_tokens:
                self._attempts.first_token(count_ids(state.tokens.prompt_ids) or None)
        return b"".join(processed)

    def _check_bounds(self, *, grew: bool) -> None:
        """End a stream without tokens, or with more tokens than requested."""
        num_events, state = self._reader.num_events, self._state
        if grew:
            self._max_events = num_events + MAX_EVENTS_WITHOUT_TOKEN
            if state.tokens.has_too_many:
                self._is_cut = True
        elif num_events > self._max_events:
            self._problem = UpstreamFailure(
                "garbage", f"The replica sent {MAX_EVENTS_WITHOUT_TOKEN} events without a token."
            )
        elif state.is_finished:
            self._exchange.idle_s = min(self._exchange.idle_s, _AFTER_FINISH_S)

    def _truncated(self) -> UpstreamFailure:
        if not self._reader.num_events:
            kind = dict(self._exchange.headers).get(b"content-type", b"no content type").decode("latin-1")[:80]
            return UpstreamFailure("garbage", f"The replica answers a stream request without an event ({kind}).")
        return UpstreamFailure("truncated", "The replica's stream ended before the response did.")
