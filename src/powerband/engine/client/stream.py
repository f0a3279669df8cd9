"""The outputs of a group of requests on their way to one reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from powerband.core.step import TokenOutput


class TokenStream:
    """Outputs in the order in which the engine made them.

    A slow reader finds everything that came since its last look: what waits here is bounded by the requests' length.
    """

    def __init__(self, ids: Sequence[str], abort: Callable[[list[str]], None]) -> None:
        self._open = set(ids)
        self._abort = abort
        self._outputs: list[TokenOutput] = []
        self._arrived = asyncio.Event()

    def add(self, ids: Sequence[str]) -> None:
        """Further requests whose outputs come here."""
        self._open.update(ids)

    def put(self, output: TokenOutput) -> None:
        """Add an output; those of requests that the reader has closed are dropped."""
        if output.id in self._open:
            self._outputs.append(output)
            self._arrived.set()
            if output.finish_reason is not None:
                self._open.discard(output.id)

    async def take(self) -> list[TokenOutput]:
        """What came since the last call; waits for at least one output. Empty when every request has ended."""
        while not self._outputs and self._open:  # what wakes this may be the closing of some requests, not of all
            await self._arrived.wait()
            self._arrived.clear()
        outputs, self._outputs = self._outputs, []
        return outputs

    def close(self, ids: Sequence[str] | None = None) -> None:
        """Abort these requests (default: all) as far as they are unfinished. Legal at any time, also twice."""
        unfinished = [id for id in (list(self._open) if ids is None else ids) if id in self._open]
        self._open.difference_update(unfinished)
        if unfinished:
            self._abort(unfinished)
            self._arrived.set()  # a reader that waits learns that nothing more comes
