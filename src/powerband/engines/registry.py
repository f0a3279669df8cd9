"""All engines by name. To add one, write its file and list it here."""

from __future__ import annotations

from collections.abc import Mapping

from powerband.engines.base import EngineAdapter, ServerName
from powerband.engines.llamacpp import LLAMACPP
from powerband.engines.openai import OPENAI
from powerband.engines.powerband import POWERBAND
from powerband.engines.sglang import SGLANG
from powerband.engines.trtllm import TRTLLM
from powerband.engines.vllm import VLLM

_ALL = (POWERBAND, VLLM, SGLANG, TRTLLM, LLAMACPP, OPENAI)
ADAPTERS: Mapping[ServerName, EngineAdapter] = {adapter.name: adapter for adapter in _ALL}
_BY_OWNER = {adapter.owned_by: adapter for adapter in _ALL if adapter.owned_by}


def find_by_owner(owner: str) -> EngineAdapter | None:
    """The engine whose models in GET /v1/models have this `owned_by`."""
    return _BY_OWNER.get(owner.lower())
