"""Attention behind one interface: which implementations there are, and which one a device gets, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from powerband.engine.attention.base import AttentionBackend, AttentionBatch, AttentionShape
from powerband.errors import EnvironmentFault

__all__ = ["AttentionBackend", "AttentionBatch", "AttentionShape", "Choice", "choose_backend", "make_backend"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend's name (as in EngineSettings.attention_backend) and why it was chosen."""

    name: str
    reason: str


def choose_backend(asked: str, device_type: str) -> Choice:
    """asked: 'auto' or a name. device_type: 'cpu' or 'cuda'. Raises EnvironmentFault when it cannot run here."""
    has_triton = find_spec("triton") is not None
    if asked == "triton" and (device_type != "cuda" or not has_triton):
        lacking = "Triton is not installed" if device_type == "cuda" else "it needs a GPU"
        raise EnvironmentFault(
            f"attention_backend 'triton' cannot run here: {lacking}.",
            hint="Leave attention_backend out, or use 'reference'.",
            param="attention_backend",
        )
    if asked != "auto":
        return Choice(asked, "asked for")
    if device_type == "cuda" and has_triton:
        return Choice("triton", "the device is a GPU and Triton is installed")
    if device_type == "cuda":
        return Choice("reference", "Triton is not installed")
    return Choice("reference", "plain torch is what runs on a CPU")


def make_backend(choice: Choice, block_size: int, device: torch.device) -> AttentionBackend:
    """The chosen backend, without a cache yet (see `allocate`)."""
    if choice.name == "triton":
        from powerband.engine.attention.triton import TritonAttention

        return TritonAttention(block_size, device)
    from powerband.engine.attention.reference import ReferenceAttention

    return ReferenceAttention(block_size, device)
