"""The longest prompt plus output that the replicas of a model take, asked of them once each."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from powerband.gateway.proxy.upstream import UpstreamClient
from powerband.gateway.routes import ReplicaAddress

if TYPE_CHECKING:
    from powerband.gateway.gateway import ServedModel

_ASK_S = 2.0


class _Card(msgspec.Struct):
    id: str = ""
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card] = []


_CARDS = msgspec.json.Decoder(_Cards)


async def context_length(served: ServedModel, upstream: UpstreamClient) -> int | None:
    """In tokens, of the replica that takes the least; None: none of them says."""
    known = served.context_lengths
    replicas = served.route.replicas
    await asyncio.gather(*(_ask(known, upstream, one) for one in replicas if one.id not in known))
    lengths = [length for one in replicas if (length := known.get(one.id)) is not None]
    return min(lengths, default=None)


async def _ask(known: dict[str, int | None], upstream: UpstreamClient, replica: ReplicaAddress) -> None:
    """One that does not answer is asked again the next time."""
    try:
        status, body = await upstream.ask(replica, "GET", "/v1/models", b"", _ASK_S)
        cards = _CARDS.decode(body).data if status == 200 else []
    except OSError:
        return
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        cards = []
    lengths = [card.max_model_len for card in cards if card.id == replica.model]
    known[replica.id] = next((length for length in lengths if length is not None and length > 0), None)
