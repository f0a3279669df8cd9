"""From a folder of safetensors to a decoder's parameters, tensor by tensor. Nothing from a checkpoint is executed.

    files ──read──► slot ──copy, convert──► parameter ──when all its slots are filled──► product (packed, quantized)

A parameter that a product has taken over is let go at once, and memory is only taken when it is written to: while a
model loads, it needs its final size and the parameters of one part of a layer.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from powerband.engine.linear.base import LinearMethod, LinearModule
from powerband.engine.linear.quantized import QuantizedMatrix
from powerband.engine.model_loader.checkpoint import resolve_model
from powerband.engine.model_loader.linear_methods import LinearMethodSelector, parts_of
from powerband.engine.model_loader.quantized_checkpoint import QuantizedCheckpoint
from powerband.engine.model_loader.stored_tensors import StoredTensors
from powerband.engine.models.registry import Model, slots_for
from powerband.engine.models.weight_mapping import WeightSlot
from powerband.errors import UsageError
from powerband.spec.checkpoint.files import HEAD, weight_files
from powerband.spec.model.model_spec import ModelSpec

__all__ = ["fill_random", "load_weights", "resolve_model"]

_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What is computed here instead of stored (tables of rotations, causal masks), and scales of attention in 8 bits, which
# nothing needs that holds keys and values in 16 bits, or scales them itself.
_LEFT_OVER = re.compile(
    r".*\.(rotary_emb\.\w+|self_attn\.(bias|masked_bias)|position_ids"
    r"|self_attn\.(\w+\.)?([kvq]{1,2}|prob_output)_(scale|zero_point)|self_attn\.[qkv]_proj\.output_(scale|zero_point))"
)
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\..*")

Progress = Callable[[float], None]

logger = logging.getLogger(__name__)


def load_weights(
    selector: LinearMethodSelector,
    folder: Path,
    progress: Progress | None = None,
    kept: Mapping[str, list[LinearMethod]] | None = None,
) -> int:
    """Fill every parameter of the model from the folder's safetensors files, and give its parts their products.

    kept: products of parts, by name, that were made at an earlier start.
    Returns the bytes of all weights. Raises EnvironmentFault for files that cannot be read and UsageError for tensors
    that are missing, unexpected or of another shape or type, naming them.
    """
    model = selector.model
    with StoredTensors(weight_files(folder), tied=model.spec.tie_embeddings) as tensors:
        slots = deque(slots_for(model, tensors.names()))
        format = model.spec.weight_format
        stored = QuantizedCheckpoint(format, tensors) if format is not None else None
        _check_names(slots, tensors, folder, stored, model.spec)
        parts = _Parts(model, slots)
        total = len(slots)
        done = parts.take_kept(selector, kept or {})
        while slots:  # taken off one by one: a slot that is kept would keep its parameter
            slot = slots.popleft()
            name = slot.sources[0]
            part = parts.owner(slot)
            if id(part) in done:
                if model.spec.tie_embeddings and part is model.head:
                    _fill(slot, tensors)  # the embedding's rows
                continue
            if stored is not None and stored.holds(name):
                parts.keep(slot, stored.read(name, slot.target.shape))
            else:
                _fill(slot, tensors)
            part = parts.completed_by(slot)
            if part is not None and (pieces := parts.kept(part)):
                selector.take_stored(part, pieces)
            elif part is not None:
                selector.take(part)
            if progress is not None:
                progress(1 - len(slots) / total)
    return weight_bytes(selector)


def fill_random(selector: LinearMethodSelector, seed: int) -> int:
    """Random weights of a sensible size, the same for the same seed, and their products. Returns the bytes of all."""
    model = selector.model
    generator = torch.Generator().manual_seed(seed)
    parts = {id(part): part for _, part in parts_of(model)}
    filled: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in filled:  # tied ones once
                _fill_parameter(f"{prefix}.{name}", parameter, generator)
                filled.add(id(parameter))
        if id(module) in parts:
            selector.take(parts[id(module)])
    return weight_bytes(selector)


def weight_bytes(selector: LinearMethodSelector) -> int:
    """Bytes of the model's parameters and of what products hold in their place."""
    parameters = selector.model.parameters()
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters) + selector.memory_bytes


class _Parts:
    """Notices when the last slot of a part of the model has been filled, and keeps what is to be joined until then.

    A slot's target is a view of a parameter, so its storage identifies the part, and its address the matrix and the
    row. The head of tied embeddings is complete when the embedding is.
    """

    def __init__(self, model: Model, slots: Iterable[WeightSlot]) -> None:
        self._owners: dict[int, LinearModule] = {}
        self._addresses: list[tuple[int, int, int]] = []  # of each matrix: where it begins, its index, bytes of a row
        for _, part in parts_of(model):
            for index, matrix in enumerate(part.matrices()):
                self._owners[_memory(matrix.weight)] = part
                row_bytes = matrix.weight.stride(0) * matrix.weight.element_size()
                self._addresses.append((matrix.weight.data_ptr(), index, row_bytes))
                if matrix.bias is not None:
                    self._owners[_memory(matrix.bias)] = part
        self._addresses.sort()
        owners = (self._owners.get(_memory(slot.target)) for slot in slots)
        self._missing = Counter(id(part) for part in owners if part is not None)
        self._kept: dict[int, dict[int, dict[int, QuantizedMatrix]]] = {}

    def take_kept(self, selector: LinearMethodSelector, kept: Mapping[str, list[LinearMethod]]) -> set[int]:
        """Install what was kept; return the ids of its parts."""
        found = [(part, kept[name]) for name, part in parts_of(selector.model) if name in kept]
        for part, made in found:
            selector.take_kept(part, made)
        return {id(part) for part, _ in found}

    def owner(self, slot: WeightSlot) -> LinearModule | None:
        return self._owners.get(_memory(slot.target))

    def completed_by(self, slot: WeightSlot) -> LinearModule | None:
        part = self.owner(slot)
        if part is None:
            return None
        self._missing[id(part)] -= 1
        return None if self._missing[id(part)] else part

    def keep(self, slot: WeightSlot, stored: QuantizedMatrix) -> None:
        """This belongs in place of the slot's target."""
        part = self._owners.get(_memory(slot.target))
        if part is None:
            raise UsageError(f"{slot.sources[0]} is quantized, which is supported for projections only.")
        address = slot.target.data_ptr()
        start, index, row_bytes = self._addresses[bisect_right(self._addresses, address, key=lambda a: a[0]) - 1]
        pieces = self._kept.setdefault(id(part), {}).setdefault(index, {})
        pieces[(address - start) // row_bytes] = stored

    def kept(self, part: LinearModule) -> dict[int, dict[int, QuantizedMatrix]]:
        """Returns what was kept, by matrix and first row, and forgets it."""
        return self._kept.pop(id(part), {})


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _check_names(
    slots: Iterable[WeightSlot],
    tensors: StoredTensors,
    folder: Path,
    stored: QuantizedCheckpoint | None,
    spec: ModelSpec,
) -> None:
    """Raise UsageError if a tensor is missing, or if one is left that the model should have computed with."""
    expected, allowed = set(), set()
    for name in (name for slot in slots for name in slot.sources):
        if stored is not None and stored.holds(name):
            expected |= set(stored.required(name))
            allowed |= set(stored.optional(name))
        else:
            expected.add(name)
    missing = sorted(name for name in expected if name not in tensors)
    if missing:
        raise UsageError(
            f"{folder} lacks {_some(missing)}.",
            hint="The checkpoint is incomplete, or its config.json belongs to another model.",
            code="missing_weights",
        )
    unused = set(tensors.names()) - expected - allowed
    left_over = {name for name in unused if _is_left_over(name, tensors, spec)}
    if extra := sorted(unused - left_over):
        raise UsageError(
            f"{folder} holds {_some([tensors.described(name) for name in extra])}, which this architecture has no "
            "place for.",
            hint="Its config.json belongs to another model, or it is an adapter or a quantized checkpoint.",
            code="unexpected_weights",
        )
    if left_over:
        logger.info("%s holds %s, which nothing is computed with.", folder, _some(sorted(left_over)))


def _is_left_over(name: str, tensors: StoredTensors, spec: ModelSpec) -> bool:
    """Whether a tensor that no parameter takes can be left out without changing the model's output.

    As transformers leaves it out: what lies outside the text model (value heads, image encoders), what it computes
    itself, layers beyond the configuration's, biases that are zero, and the tied head, which is the embedding.
    """
    layer = _LAYER.fullmatch(name)
    return (
        name in tensors.outside
        or _LEFT_OVER.fullmatch(name) is not None
        or (layer is not None and int(layer[1]) >= spec.num_layers)
        or (spec.tie_embeddings and name == HEAD)
        or (name.endswith(".bias") and not bool(tensors.read(name).any()))
    )


def _fill(slot: WeightSlot, stored: StoredTensors) -> None:
    into = slot.target if slot.convert is None else None
    tensors = [stored.read(name, into) for name in slot.sources]
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
    if value is not slot.target:
        slot.target.copy_(value)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more tensors" if len(names) > 3 else shown


def _fill_parameter(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    if "norm" in name and not name.endswith("bias"):
        parameter.fill_(1.0)
    elif parameter.dim() < 2:
        parameter.zero_()
    else:
        _fill_normal(parameter, parameter.shape[-1] ** -0.5, generator)


def _fill_normal(parameter: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Normal numbers for large tensors: one million are drawn, and rows take them at shifting offsets."""
    size = min(parameter.numel(), 1 << 20)
    numbers = torch.randn(size, generator=generator).mul_(std).to(device=parameter.device, dtype=parameter.dtype)
    flat = parameter.view(-1)
    for start in range(0, flat.numel(), size):
        part = flat[start : start + size]
        part.copy_(numbers[: part.numel()].roll(start // size))
