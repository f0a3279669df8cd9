"""Engines as plug-ins: from a plan's replica to the command line and the environment of the engine that it names.

An adapter says everything that the plan says in the engine's own words. What the engine cannot be told is a UsageError
that names it; nothing is left out in silence. The sources of the words stand in each adapter's file.
"""

from __future__ import annotations

from powerband.fleet.engines.base import Command, EngineAdapter, LaunchRequest
from powerband.fleet.engines.powerband import PowerbandAdapter
from powerband.fleet.engines.sglang import SGLangAdapter
from powerband.fleet.engines.trtllm import TensorRTAdapter
from powerband.fleet.engines.vllm import VLLMAdapter
from powerband.spec.deployment import EngineName

__all__ = ["Command", "EngineAdapter", "LaunchRequest", "engine_adapter"]

_ADAPTERS: dict[EngineName, EngineAdapter] = {
    "powerband": PowerbandAdapter(),
    "vllm": VLLMAdapter(),
    "sglang": SGLangAdapter(),
    "trtllm": TensorRTAdapter(),
}


def engine_adapter(engine: EngineName) -> EngineAdapter:
    return _ADAPTERS[engine]
