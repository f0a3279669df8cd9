"""`powerband memory`: where an engine's memory would go, from config.json alone; nothing is loaded."""

from __future__ import annotations

import json as json_format
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from powerband.cli.flags import Json, takes_settings
from powerband.cli.machine import compute_device
from powerband.cli.settings import Resolved
from powerband.cost.memory import MemoryPlan, plan_memory
from powerband.cost.precision import auto_dtype
from powerband.engine.model_loader.checkpoint import resolve_model
from powerband.errors import EnvironmentFault
from powerband.extras import require
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.model.counts import count_parameters
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.model.reader import converted, read_model_spec
from powerband.spec.settings import EngineSettings

NOT_ABOUT_MEMORY = (
    *("tokenizer", "served_model_name", "chat_template", "load_format", "seed", "threads", "attention_backend"),
    *("async_scheduling", "enable_prefix_caching", "long_prefill_token_threshold", "scheduling_policy"),
    *("max_num_queued_reqs", "max_num_queued_tokens", "step_log", "weight_cache"),
)


@takes_settings(EngineSettings, without=NOT_ABOUT_MEMORY)
def memory(settings: Resolved, *, json: Json = False) -> int:
    """Print the memory plan of MODEL on this machine, without loading it.

    MODEL may also be the path of a config.json. Of a model on the Hugging Face hub, everything but
    the weights is fetched.
    Exits with 3 and suggests changes if the engine does not fit.
    """
    engine = settings.engine
    spec = converted(read_model_spec(config_source(engine)), engine.convert)
    plan = plan_on_this_machine(spec, engine)
    if json:
        report: dict[str, Any] = {
            "model": engine.model,
            "family": spec.family,
            "parameters": count_parameters(spec).total,
        }
        print(json_format.dumps({**report, **plan.as_dict()}, indent=2))
    else:
        print(f"{engine.model}: {spec.family}, {count_parameters(spec).total:,} parameters\n{plan.table()}")
    return 0


def plan_on_this_machine(spec: ModelSpec, settings: EngineSettings) -> MemoryPlan:
    """The plan for the device that the settings choose, with the memory that is free on it now."""
    cpu = detect_cpu()
    kind: Literal["cpu", "cuda"] = "cpu" if compute_device(settings) == "cpu" else "cuda"
    total, free = (cpu.memory_bytes, cpu.available_memory_bytes) if kind == "cpu" else _gpu_memory()
    dtype: str = settings.dtype
    if dtype == "auto":
        kernels = settings.kernels == "auto" and kind == "cpu" and _has_fast_kernels()
        dtype = auto_dtype(spec, kind, cpu.features, kernels=kernels, quantization=settings.quantization)
    return plan_memory(spec, settings, total, kind=kind, free_memory_bytes=free, dtype=dtype)


def _has_fast_kernels() -> bool:
    """Whether an engine would find or build kernels that are faster than plain torch."""
    from powerband.engine.kernels.cpu import library

    return library.find_compiler() is not None and library.choose_tier("", detect_cpu().features) in library.FAST_TIERS


def _gpu_memory() -> tuple[int, int]:
    """(total, free) bytes of the GPU. Raises EnvironmentFault when there is none that torch can use."""
    require("torch", "The memory plan of a GPU")
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentFault("torch finds no usable GPU.", hint="'powerband doctor' shows what is missing.")
    free, total = torch.cuda.mem_get_info()
    return total, free


def config_source(settings: EngineSettings) -> Path:
    """What to read the model from: the path of a config.json, or the model's folder without its weights."""
    path = Path(settings.model)
    return path if path.is_file() else resolve_model(replace(settings, load_format="dummy"))
