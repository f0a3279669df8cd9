"""LoRA adapters at one replica, by vLLM's routes, which Powerband has, too."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from powerband.errors import InvalidRequest
from powerband.gateway.routes import ReplicaAddress
from powerband.gateway.upstream.client import UpstreamClient
from powerband.openai.errors import read_error

LOAD_PATH, UNLOAD_PATH = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
_LOAD_TIMEOUT_S = 600.0  # it may have to be fetched
_UNLOAD_TIMEOUT_S = 30.0
_REFUSALS = (400, 404, 409, 413, 422)  # of what was asked for: asked again, it would be refused again


async def load_adapter(
    upstream: UpstreamClient, address: ReplicaAddress, name: str, path: str, *, in_place: bool = False
) -> None:
    """Load an adapter at one replica. Raises InvalidRequest if it refuses, OSError if it cannot answer that now."""
    body = {"lora_name": name, "lora_path": path, **({"load_inplace": True} if in_place else {})}
    await _post(upstream, address, LOAD_PATH, body, _LOAD_TIMEOUT_S)


async def unload_adapter(upstream: UpstreamClient, address: ReplicaAddress, name: str) -> None:
    """Raises as `load_adapter` does."""
    await _post(upstream, address, UNLOAD_PATH, {"lora_name": name}, _UNLOAD_TIMEOUT_S)


async def _post(
    upstream: UpstreamClient, address: ReplicaAddress, path: str, body: Mapping[str, object], timeout_s: float
) -> None:
    status, answer = await upstream.ask(address, "POST", path, msgspec.json.encode(body), timeout_s)
    if status < 400:
        return
    error = read_error(answer)
    text = f"The replica {address.id} reports: {error.message or f'HTTP {status}'}"
    if status not in _REFUSALS:  # it starts, is overloaded, has failed, or does not know the gateway's key
        raise OSError(text)
    raise InvalidRequest(text, code=error.code, param=error.param)
