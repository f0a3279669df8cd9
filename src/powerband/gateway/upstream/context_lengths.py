"""The context length of a model, as its replicas report it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.client import UpstreamClient
from powerband.openai.fields import read_models

MAX_TOKENS = 1 << 20  # no model has a longer context
_MODELS_TIMEOUT_S = 2.0
_DEFINITE = (200, 404, 405, 501)  # statuses after which a replica need not be asked again


class ContextLengths:
    """The context lengths of one model's replicas. known: by the replica's id; None: it does not report one."""

    def __init__(self) -> None:
        self.known: dict[str, int | None] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._unreachable: set[str] = set()  # gave no definite answer when they were asked last

    async def largest(self, replicas: Sequence[ReplicaAddress], upstream: UpstreamClient) -> int | None:
        """The largest context of these replicas, prompt and output together; None: no replica reports one.

        A replica with a shorter context gets requests with a lower max_tokens, so it does not limit the others. It
        waits for replicas that have not been asked before; one that did not answer is asked again in the background.
        """
        for one in replicas:
            if one.id not in self.known and one.id not in self._asking:
                self._asking[one.id] = asyncio.create_task(self._ask(one, upstream), name=f"context of {one.id}")
        new = [self._asking[one.id] for one in replicas if one.id in self._asking and one.id not in self._unreachable]
        if new:
            await asyncio.wait(new)
        lengths = [length for one in replicas if (length := self.known.get(one.id)) is not None]
        return min(max(lengths), MAX_TOKENS) if lengths else None

    async def _ask(self, replica: ReplicaAddress, upstream: UpstreamClient) -> None:
        try:
            status, body = await upstream.ask(replica, "GET", "/v1/models", b"", _MODELS_TIMEOUT_S)
        except OSError:
            status, body = 0, b""
        finally:
            del self._asking[replica.id]
        if status not in _DEFINITE:
            self._unreachable.add(replica.id)
            return
        self._unreachable.discard(replica.id)
        models = read_models(body) if status == 200 else []
        lengths = [model.context_length for model in models if model.id == replica.model]
        self.known[replica.id] = next((length for length in lengths if length is not None), None)
