"""What an engine with given settings would find on this machine: its device, its memory; nothing is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from powerband.errors import EnvironmentFault
from powerband.extras import is_installed, require
from powerband.spec.hardware.device import detect_cpu, has_gpu_nodes
from powerband.spec.settings import EngineSettings

if TYPE_CHECKING:
    from powerband.cost.memory import MemoryPlan
    from powerband.spec.model.model_spec import ModelSpec


def compute_device(settings: EngineSettings) -> str:
    """'cpu' or 'cuda': where an engine with these settings would run. Loads torch only where there is a GPU."""
    if settings.device != "auto":
        return settings.device
    if not has_gpu_nodes():
        return "cpu"
    if not is_installed("torch"):
        return "cuda"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def config_source(settings: EngineSettings) -> Path:
    """What to read the model from: the path of a config.json, or the model's folder without its weights."""
    from powerband.engine.model_loader.checkpoint import resolve_model

    path = Path(settings.model)
    return path if path.is_file() else resolve_model(replace(settings, load_format="dummy"))


def plan_on_this_machine(spec: ModelSpec, settings: EngineSettings) -> MemoryPlan:
    """The plan for the device that the settings choose, with the memory that is free on it now."""
    from powerband.cost.memory import plan_memory
    from powerband.cost.precision import auto_dtype

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
