"""/v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import sys
import time
from array import array
from collections.abc import Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from powerband.core.params import PoolingParams
from powerband.server.pooling.protocol import EmbeddingRequest
from powerband.server.pooling.run import PoolingRun
from powerband.server.pooling.texts import input_tokens
from powerband.server.replica import ServerState

_TURN_S = 0.005  # for which one request may keep the event loop


class EmbeddingRoutes:
    def __init__(self, replica: ServerState) -> None:
        self._replica = replica

    async def create(self, request: Request) -> Response:
        """One vector for each text."""
        replica = self._replica
        with replica.counting_refusals():
            body = await replica.read(request, EmbeddingRequest)
            replica.check_name(body.model)
            model, pooling = replica.accept_pooling("embed")
            pooling.check_dimensions(body.dimensions)
            tokens = await input_tokens(replica, model, pooling, body)
            params = PoolingParams(dimensions=body.dimensions, use_activation=body.normalize)
            run = PoolingRun(replica, body, tokens, [params] * len(tokens))
            vectors = await run.vectors(request.receive)
        data = await _encoded(vectors, is_base64=body.encoding_format == "base64")
        head = msgspec.json.encode(
            {"id": f"embd-{run.id}", "object": "list", "created": run.created_s, "model": replica.name}
        )
        usage = msgspec.json.encode(run.usage())
        whole = b"".join((head[:-1], b',"data":[', data, b'],"usage":', usage, b"}"))
        return Response(whole, media_type="application/json")


async def _encoded(vectors: Sequence[bytes], *, is_base64: bool) -> bytes:
    """The EmbeddingObjects in JSON. Other requests get the event loop in between."""
    parts = []
    turn_s = time.perf_counter()
    for index, vector in enumerate(vectors):
        value = b'"' + base64.b64encode(_little_endian(vector)) + b'"' if is_base64 else _numbers(vector)
        parts.append(b'{"object":"embedding","index":%d,"embedding":%b}' % (index, value))
        if time.perf_counter() - turn_s > _TURN_S:
            await asyncio.sleep(0)
            turn_s = time.perf_counter()
    return b",".join(parts)


def _numbers(vector: bytes) -> bytes:
    return msgspec.json.encode(array("f", vector).tolist())


def _little_endian(vector: bytes) -> bytes:
    if sys.byteorder == "little":
        return vector
    swapped = array("f", vector)
    swapped.byteswap()
    return swapped.tobytes()
