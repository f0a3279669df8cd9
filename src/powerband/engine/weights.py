"""From a folder of safetensors to a decoder's parameters, tensor by tensor. Nothing from a checkpoint is executed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from powerband.engine.checkpoint import resolve_model, unreadable, weight_files
from powerband.engine.models.decoder import Decoder
from powerband.engine.models.registry import slots_for
from powerband.engine.models.slots import Slot
from powerband.errors import UsageError

__all__ = ["fill_random", "load_weights", "parameter_bytes", "resolve_model"]

_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Parts of checkpoints that text generation does not need.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
_IGNORED_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

Progress = Callable[[float], None]


def load_weights(model: Decoder, folder: Path, progress: Progress | None = None) -> int:
    """Fill every parameter from the folder's safetensors files. Returns the bytes of the parameters.

    Raises EnvironmentFault for files that cannot be read and UsageError for tensors that are missing, unexpected or of
    another shape or type, naming them.
    """
    with ExitStack() as stack:
        where = _open_all(weight_files(folder), stack)
        slots = slots_for(model, where.keys())
        _check_names(slots, where, folder, tied=model.spec.tie_embeddings)
        for number, slot in enumerate(slots):
            _fill(slot, where)
            if progress is not None:
                progress((number + 1) / len(slots))
    return parameter_bytes(model)


def fill_random(model: Decoder, seed: int) -> int:
    """Random weights of a sensible size, the same for the same seed. Returns the bytes of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        elif parameter.dim() < 2:
            parameter.zero_()
        else:
            _fill_normal(parameter, parameter.shape[-1] ** -0.5, generator)
    return parameter_bytes(model)


def parameter_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


# Name of a tensor → the open file that holds it. safetensors' own type is untyped.
_Where = dict[str, Any]


def _open_all(files: Iterable[Path], stack: ExitStack) -> _Where:
    where: _Where = {}
    for path in files:
        try:
            opened = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as problem:
            raise unreadable(path, problem) from problem
        where.update(dict.fromkeys(opened.keys(), opened))
    return where


def _check_names(slots: list[Slot], where: _Where, folder: Path, *, tied: bool) -> None:
    expected = {name for slot in slots for name in slot.sources}
    missing = sorted(expected - where.keys())
    if missing:
        raise UsageError(
            f"{folder} lacks {_some(missing)}.",
            hint="The checkpoint is incomplete, or its config.json belongs to another model.",
            code="missing_weights",
        )
    extra = {name for name in where.keys() - expected if not _is_ignored(name, tied)}
    if extra:
        raise UsageError(
            f"{folder} holds {_some(sorted(extra))}, which this architecture has no place for.",
            hint="Its config.json belongs to another model, or it is an adapter or a quantized checkpoint.",
            code="unexpected_weights",
        )


def _is_ignored(name: str, tied: bool) -> bool:
    if name.endswith(_IGNORED_SUFFIXES) or name.startswith(_IGNORED_PREFIXES):
        return True
    return tied and name.endswith("lm_head.weight")


def _fill(slot: Slot, where: _Where) -> None:
    tensors = [_read(name, where) for name in slot.sources]
    name = slot.sources[0]
    try:
        value = tensors[0] if slot.convert is None else slot.convert(*tensors)
    except (RuntimeError, IndexError) as problem:
        shapes = " and ".join(str(list(tensor.shape)) for tensor in tensors)
        raise UsageError(f"{name} has shape {shapes}: {problem}", code="bad_weights") from problem
    if value.shape != slot.target.shape:
        raise UsageError(
            f"{name} has shape {list(value.shape)}; config.json asks for {list(slot.target.shape)}.",
            hint="The checkpoint and its config.json do not belong together.",
            code="bad_weights",
        )
    if not value.dtype.is_floating_point or value.dtype not in _FLOAT_TYPES:
        raise UsageError(f"{name} is stored as {value.dtype}, which is not supported.", code="bad_weights")
    slot.target.copy_(value)


def _read(name: str, where: _Where) -> torch.Tensor:
    try:
        tensor: torch.Tensor = where[name].get_tensor(name)
    except (SafetensorError, OSError, ValueError, RuntimeError) as problem:
        raise UsageError(f"{name} cannot be read: {problem}", code="bad_weights") from problem
    return tensor


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more tensors" if len(names) > 3 else shown


def _fill_normal(parameter: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Normal numbers for large tensors: one million are drawn, and rows take them at shifting offsets."""
    size = min(parameter.numel(), 1 << 20)
    numbers = torch.randn(size, generator=generator).mul_(std).to(device=parameter.device, dtype=parameter.dtype)
    flat = parameter.view(-1)
    for start in range(0, flat.numel(), size):
        part = flat[start : start + size]
        part.copy_(numbers[: part.numel()].roll(start // size))
