"""The engine requests behind one HTTP request: every prompt is computed once, and gives one vector."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence

from starlette.types import Receive

from powerband.core.params import PoolingParams, SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.step import FinishReason, TokenOutput
from powerband.engine.client.messages import RemoteError
from powerband.engine.client.stream import TokenStream
from powerband.errors import InvalidRequest
from powerband.server.pooling.protocol import PoolingRequest, PoolingUsage
from powerband.server.replica import ServerState
from powerband.web.client_connection import ClientDisconnected
from powerband.web.streaming import DisconnectWatcher

# How much of one HTTP request the engine is given at once: other requests get their turn in between.
_MAX_TOKENS_AT_ONCE = 16_384

_NO_OUTPUT = SamplingParams(max_tokens=1)


class PoolingRun:
    """Call `vectors` once. `prompts` and `params` in parallel."""

    def __init__(
        self,
        replica: ServerState,
        body: PoolingRequest,
        prompts: Sequence[list[int]],
        params: Sequence[PoolingParams],
    ) -> None:
        if body.priority and replica.engine_settings.scheduling_policy != "priority":
            raise InvalidRequest(
                f"'priority' has no effect with the scheduling policy '{replica.engine_settings.scheduling_policy}'.",
                hint="Leave it out, or start the server with --scheduling-policy priority.",
                param="priority",
            )
        self.id = uuid.uuid4().hex
        self.created_s = int(time.time())
        self._replica = replica
        self._body = body
        self._prompts = prompts
        self._params = params
        self._vectors: dict[int, bytes] = {}
        self._open: dict[str, tuple[int, EngineRequest]] = {}

    def usage(self) -> PoolingUsage:
        total = sum(map(len, self._prompts))
        return PoolingUsage(prompt_tokens=total, total_tokens=total)

    async def vectors(self, receive: Receive) -> list[bytes]:
        """The vector of each prompt (float32), in order. Raises the engine's error, or ClientDisconnected."""
        self._replica.begin()
        departure = DisconnectWatcher(receive)
        try:
            for window in self._windows():
                await self._compute(window, departure)
        finally:
            departure.close()
            for id in list(self._open):
                self._note_end(id, FinishReason.ABORT, None)
            self._replica.end()
        return [self._vectors[index] for index in range(len(self._prompts))]

    def _windows(self) -> Iterator[list[int]]:
        """Indices of the prompts that are given to the engine together."""
        window: list[int] = []
        num_tokens = 0
        for index, prompt in enumerate(self._prompts):
            is_full = len(window) >= self._replica.engine_settings.max_num_seqs
            if window and (is_full or num_tokens + len(prompt) > _MAX_TOKENS_AT_ONCE):
                yield window
                window, num_tokens = [], 0
            window.append(index)
            num_tokens += len(prompt)
        yield window

    async def _compute(self, window: list[int], departure: DisconnectWatcher) -> None:
        arrival_s = time.monotonic()
        requests = []
        for index in window:
            request = EngineRequest(
                id=f"{self.id}-{index}",
                token_ids=self._prompts[index],
                params=_NO_OUTPUT,
                arrival_s=arrival_s,
                priority=self._body.priority or 0,
                tenant=self._body.user or "",
                cache_salt=self._body.cache_salt or "",
                pooling=self._params[index],
            )
            requests.append(request)
            self._open[request.id] = (index, request)
        stream = self._replica.engine.submit(requests)
        departure.then(stream.close)
        try:
            await self._collect(stream, departure)
        finally:
            stream.close()

    async def _collect(self, stream: TokenStream, departure: DisconnectWatcher) -> None:
        while outputs := await stream.take():
            if departure.left:
                raise ClientDisconnected
            for output in outputs:
                self._take(output)
            await asyncio.sleep(0)
        if departure.left or self._open:
            raise ClientDisconnected

    def _take(self, output: TokenOutput) -> None:
        if output.finish_reason is None or output.id not in self._open:
            return
        index, _ = self._open[output.id]
        self._note_end(output.id, output.finish_reason, output)
        if output.error is not None:
            raise RemoteError(output.error)
        if output.vector is None:  # it was aborted: by a restart, say
            raise ClientDisconnected
        self._vectors[index] = output.vector

    def _note_end(self, id: str, reason: FinishReason, output: TokenOutput | None) -> None:
        """For the metrics."""
        _, request = self._open.pop(id)
        has_vector = output is not None and output.vector is not None
        self._replica.metrics.observe_pooled(
            num_tokens=len(request.token_ids),
            e2e_s=output.time_s - request.arrival_s if output is not None and has_vector else None,
            queue_s=output.scheduled_s - request.arrival_s if output is not None and output.scheduled_s else None,
            finished_reason=reason.value,
        )
