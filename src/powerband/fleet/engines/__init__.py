"""Engine adapters: from a plan's replica to the command line and environment of its engine.

An adapter translates every setting of the plan into the engine's options. A setting that the engine does not support is
a UsageError that names it, never left out in silence. Each adapter's file gives the sources of the options.
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
