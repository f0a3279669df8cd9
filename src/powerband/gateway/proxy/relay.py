"""The part of a stream that one replica tells: from its bytes to the client's, event by event."""

from __future__ import annotations

import time
from collections.abc import Callable

from powerband.gateway.proxy.connection import Exchange, UpstreamFailure
from powerband.gateway.proxy.events import END, Splitter
from powerband.gateway.proxy.story import Story
from powerband.gateway.proxy.trip import Trip
from powerband.web.line import ClientLine

# A replica that tells comments and empty events without end says nothing.
MAX_EVENTS_WITHOUT_TOKEN = 1 << 16
_AFTER_FINISH_S = 5.0  # for the usage and the last event, once every choice has said how it ended


class Relay:
    """`read_opening` until there is something to tell, then `pass_on` the rest."""

    def __init__(self, trip: Trip, story: Story, exchange: Exchange, on_tokens: Callable[[int], None]) -> None:
        """on_tokens: told how many there are in all, whenever there are more."""
        self._trip = trip
        self._story = story
        self._exchange = exchange
        self._on_tokens = on_tokens
        self._splitter = Splitter()
        self._has_ended = False
        self._is_over = False  # the body came to its end
        self._max_events = MAX_EVENTS_WITHOUT_TOKEN
        self._problem: UpstreamFailure | None = None

    async def read_opening(self) -> bytes:
        """The first events that the client is to read. Raises UpstreamFailure when there are none."""
        while not self._has_ended and not self._is_over:
            piece = await self._exchange.read()
            if not piece:
                self._is_over = True
            elif told := self._read(piece):
                return told
            if self._problem is not None:
                raise self._problem
        raise self._truncated()

    async def pass_on(self, line: ClientLine) -> None:
        """The rest, until the last event. Raises UpstreamFailure when it does not come."""

        def take(piece: bytes) -> bool:
            told = self._read(piece)
            if told:
                line.write_chunk(told)
                if line.is_behind:
                    self._exchange.hold()
                    line.when_writable(self._exchange.release)
            return not self._has_ended and self._problem is None

        if not self._has_ended and self._problem is None:
            await self._exchange.pass_to(take)
        if self._problem is not None:
            raise self._problem
        # Some servers end without [DONE]: then every choice has to have said how it ended.
        if not (self._story.may_end if self._has_ended else self._story.is_finished):
            raise self._truncated()

    def _read(self, piece: bytes) -> bytes:
        """What the client is to read of it, and what it says counted."""
        story, now_s = self._story, time.monotonic()
        had_tokens, told = story.num_tokens, b""
        try:
            found = self._splitter.feed(piece)
            if not found:  # a comment, or a part of an event: the time for the next one goes on
                self._exchange.no_progress()
            else:
                self._trip.progress()
            for data in found:
                if data == END:
                    self._has_ended = True
                    break
                told += story.tell(data, now_s)
        except UpstreamFailure as problem:  # what came before it counts, and so has to be told
            self._problem = problem
        self._check_bounds(grew=story.num_tokens != had_tokens)
        if story.num_tokens != had_tokens:
            self._on_tokens(story.num_tokens)
            if not had_tokens:
                self._trip.first_token(len(story.prompt_ids) or None)
        return told

    def _check_bounds(self, *, grew: bool) -> None:
        """End a stream that has no end: of nothing, or of more than was asked for."""
        num_events, story = self._splitter.num_events, self._story
        if grew:
            self._max_events = num_events + MAX_EVENTS_WITHOUT_TOKEN
            if story.has_too_many:
                story.has_gap = True  # nobody can make that good
                self._problem = UpstreamFailure("garbage", f"{story.num_tokens} tokens came, more than were asked for.")
        elif num_events > self._max_events:
            self._problem = UpstreamFailure(
                "garbage", f"The replica sent {MAX_EVENTS_WITHOUT_TOKEN} events without a token."
            )
        elif story.is_finished:
            self._exchange.between_s = min(self._exchange.between_s, _AFTER_FINISH_S)

    def _truncated(self) -> UpstreamFailure:
        if not self._splitter.num_events:
            kind = dict(self._exchange.headers).get(b"content-type", b"no content type").decode("latin-1")[:80]
            return UpstreamFailure("garbage", f"The replica answers a stream request without an event ({kind}).")
        return UpstreamFailure("truncated", "The replica's stream ended before the answer did.")
