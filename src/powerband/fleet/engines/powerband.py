"""Our own engine: `powerband serve`, with the names of spec.settings.EngineSettings."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from typing import Any, ClassVar

from powerband.cost.replica_memory import engine_settings
from powerband.fleet.engines.base import Command, LaunchRequest, ModelContext
from powerband.spec.deployment import EngineName
from powerband.spec.settings import EngineSettings

_OWN = (sys.executable, "-m", "powerband")
_POSITIONAL = "model"


class PowerbandAdapter:
    name: ClassVar[EngineName] = "powerband"
    ready_path: ClassVar[str] = "/readyz"

    def command(self, request: LaunchRequest) -> Command:
        context, replica = ModelContext(request.model, request.replica, self.name), request.replica
        context.require(tensor_parallel=1, pipeline_parallel=1, expert_parallel=1, offload_share=0.0, draft_tokens=0)
        if replica.kv_precision == "fp8":
            raise context.unsupported("kv_precision", "It supports 16bit, int8 and float32.")
        context.check_draft_method(request.draft_method)
        settings = _settings(context, request.served_name, request.threads)
        command = (
            *(request.executable or _OWN),
            "serve",
            request.model,
            f"--host={request.host}",
            f"--port={request.port}",
            *_flags(settings),
        )
        if request.api_key_file is not None:
            command = (*command, f"--api-key-file={request.api_key_file}")
        return Command((*command, *request.extra))


def _settings(context: ModelContext, served_name: str, threads: int | None) -> EngineSettings:
    """The settings of the planner's memory plan. Weights that are stored as planned are not quantized again."""
    replica = context.replica
    is_stored = context.to_quantize() == "none"
    more: dict[str, Any] = {
        "model": context.model,
        "served_model_name": served_name,
        "threads": threads if context.is_cpu else None,
        "device": "cpu" if context.is_cpu else "cuda",
    }
    if is_stored and replica.quantization != "none" and replica.kv_precision == "16bit":
        more["kv_cache_dtype"] = "bfloat16"  # auto would be int8 beside quantized weights
    planned = replace(replica, quantization="none") if is_stored else replica
    return engine_settings(context.spec, planned, **more)


def _flags(settings: EngineSettings) -> tuple[str, ...]:
    """The settings that differ from the defaults, as flags."""
    found = []
    for item in fields(settings):
        value = getattr(settings, item.name)
        if item.name == _POSITIONAL or value == item.default:
            continue
        flag = item.name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found.append(f"--{flag}={value}")
    return tuple(found)
