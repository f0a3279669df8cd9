"""Attention behind one interface: which implementations there are, and which one a device gets, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from powerband.engine.attention.base import AttentionBackend, AttentionBatch, AttentionShape
from powerband.engine.attention.cpu import CpuAttention, missing_requirement
from powerband.engine.kernels.cpu.library import Status as KernelStatus
from powerband.errors import EnvironmentFault

__all__ = ["AttentionBackend", "AttentionBatch", "AttentionShape", "BackendSelection", "choose_backend", "make_backend"]


@dataclass(frozen=True, slots=True)
class BackendSelection:
    """A backend's name (as in EngineSettings.attention_backend) and why it was chosen."""

    name: Literal["reference", "cpu", "triton"]
    reason: str


def choose_backend(
    asked: Literal["auto", "reference", "cpu", "triton"],
    device_type: str,
    kernels: KernelStatus,
    *,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 32,
    head_dim: int = 128,
) -> BackendSelection:
    """asked: 'auto' or a name. device_type: 'cpu' or 'cuda'. kernels: those for CPUs. The defaults fit most models.

    Raises EnvironmentFault when what is asked for cannot run here.
    """
    if device_type == "cpu" and asked in ("auto", "cpu"):
        lacking = missing_requirement(kernels, dtype, block_size, head_dim)
        if lacking is None:
            return BackendSelection("cpu", "asked for" if asked == "cpu" else kernels.reason)
        if asked == "auto":
            return BackendSelection("reference", lacking)
        raise EnvironmentFault(
            f"attention_backend 'cpu' cannot run here: {lacking}.",
            hint="Leave attention_backend out, or use 'reference'.",
            param="attention_backend",
        )
    if asked == "cpu":
        raise EnvironmentFault(
            "attention_backend 'cpu' cannot run here: the device is a GPU.",
            hint="Leave attention_backend out, or add --device cpu.",
            param="attention_backend",
        )
    has_triton = find_spec("triton") is not None
    if asked == "triton" and (device_type != "cuda" or not has_triton):
        lacking = "Triton is not installed" if device_type == "cuda" else "it needs a GPU"
        raise EnvironmentFault(
            f"attention_backend 'triton' cannot run here: {lacking}.",
            hint="Leave attention_backend out, or use 'reference'.",
            param="attention_backend",
        )
    if asked != "auto":
        return BackendSelection(asked, "asked for")
    if device_type == "cuda" and has_triton:
        return BackendSelection("triton", "the device is a GPU and Triton is installed")
    return BackendSelection("reference", "Triton is not installed")


def make_backend(choice: BackendSelection, block_size: int, device: torch.device) -> AttentionBackend:
    """The chosen backend, without a cache yet (see `allocate`). Only that of the CPU can hold one in int8."""
    if choice.name == "triton":
        from powerband.engine.attention.triton import TritonAttention

        return TritonAttention(block_size, device)
    if choice.name == "cpu":
        return CpuAttention()
    from powerband.engine.attention.reference import ReferenceAttention

    return ReferenceAttention(block_size, device)
