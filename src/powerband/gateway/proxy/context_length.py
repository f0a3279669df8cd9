"""The context length of a model, as its replicas report it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from powerband.gateway.proxy.request_fields import MAX_TOKENS
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.client import UpstreamClient
from powerband.openai.fields import read_models

_MODELS_TIMEOUT_S = 2.0


async def context_length(
    replicas: Sequence[ReplicaAddress], known: dict[str, int | None], upstream: UpstreamClient
) -> int | None:
    """The largest context length of these replicas, prompt and output together; None: no replica reports one.

    A replica with a shorter context gets requests with a lower max_tokens, so it does not limit the others.
    known: context lengths by replica; this function adds new ones.
    """
    await asyncio.gather(*(_ask(known, upstream, one) for one in replicas if one.id not in known))
    lengths = [length for one in replicas if (length := known.get(one.id)) is not None]
    return min(max(lengths), MAX_TOKENS) if lengths else None


async def _ask(known: dict[str, int | None], upstream: UpstreamClient, replica: ReplicaAddress) -> None:
    """Read one replica's context length. A replica that does not answer is asked again the next time."""
    try:
        status, body = await upstream.ask(replica, "GET", "/v1/models", b"", _MODELS_TIMEOUT_S)
    except OSError:
        return
    models = read_models(body) if status == 200 else []
    lengths = [model.context_length for model in models if model.id == replica.model]
    known[replica.id] = next((length for length in lengths if length is not None), None)
