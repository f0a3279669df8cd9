"""The part of a stream that one replica tells: from its bytes to the client's, event by event."""

from __future__ import annotations

import time
from collections.abc import Callable

from powerband.gateway.proxy.connection import Exchange, UpstreamFailure
from powerband.gateway.proxy.events import END, Splitter
from powerband.gateway.proxy.story import Story
from powerband.gateway.proxy.trip import Trip
from powerband.web.line import ClientLine


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
        self._problem: UpstreamFailure | None = None

    async def read_opening(self) -> bytes:
        """The first events that the client is to read. Raises UpstreamFailure when there are none."""
        while not self._has_ended:
            piece = await self._exchange.read()
            if not piece:
                break
            if told := self._read(piece):
                return told
            if self._problem is not None:
                raise self._problem
        raise _truncated()

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
        if not self._has_ended or not self._story.num_finished:
            raise _truncated()

    def _read(self, piece: bytes) -> bytes:
        """What the client is to read of it, and what it says counted."""
        story, now_s = self._story, time.monotonic()
        had_tokens = story.num_tokens
        self._trip.progress()
        told = b""
        try:
            for data in self._splitter.feed(piece):
                if data == END:
                    self._has_ended = True
                    break
                told += story.tell(data, now_s)
        except UpstreamFailure as problem:  # what came before it counts, and so has to be told
            self._problem = problem
        if story.num_tokens != had_tokens:
            self._on_tokens(story.num_tokens)
            if not had_tokens:
                self._trip.first_token(len(story.prompt_ids) or None)
        return told


def _truncated() -> UpstreamFailure:
    return UpstreamFailure("truncated", "The replica's stream ended before its answer did.")
