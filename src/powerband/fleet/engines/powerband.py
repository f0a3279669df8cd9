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
    health_path: ClassVar[str] = "/livez"
    ready_path: ClassVar[str] = "/readyz"
    resumes: ClassVar[bool] = True

    def command(self, order: LaunchRequest) -> Command:
        subject, replica = ModelContext(order.model, order.replica, self.name), order.replica
        subject.refuse(tensor_parallel=1, pipeline_parallel=1, expert_parallel=1, offload_share=0.0, draft_tokens=0)
        if replica.kv_precision == "fp8":
            raise subject.cannot("kv_precision", "It knows 16bit, int8 and float32.")
        subject.drafter(order.drafter)
        settings = _settings(subject, order.served_name, order.threads)
        command = (
            *(order.executable or _OWN),
            "serve",
            order.model,
            f"--host={order.host}",
            f"--port={order.port}",
            *_flags(settings),
        )
        if order.api_key_file is not None:
            command = (*command, f"--api-key-file={order.api_key_file}")
        return Command((*command, *order.extra))


def _settings(subject: ModelContext, served_name: str, threads: int | None) -> EngineSettings:
    """As the planner's memory plan has them. Weights that are stored as asked are not quantized again."""
    replica = subject.replica
    is_stored = subject.to_quantize() == "none"
    more: dict[str, Any] = {
        "model": subject.model,
        "served_model_name": served_name,
        "threads": threads if subject.is_cpu else None,
        "device": "cpu" if subject.is_cpu else "cuda",
    }
    if is_stored and replica.quantization != "none" and replica.kv_precision == "16bit":
        more["kv_cache_dtype"] = "bfloat16"  # auto would be int8 beside quantized weights
    planned = replace(replica, quantization="none") if is_stored else replica
    return engine_settings(subject.spec, planned, **more)


def _flags(settings: EngineSettings) -> tuple[str, ...]:
    """What differs from the defaults, as flags."""
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
