"""Loads what a checkpoint projects pooled vectors with. Nothing from it is executed."""

from __future__ import annotations

from pathlib import Path

import torch

from powerband.engine.model_loader.stored_tensors import StoredTensors
from powerband.engine.pooling.pooler import DenseLayer, Pooler
from powerband.errors import UsageError
from powerband.spec.checkpoint.files import weight_files
from powerband.spec.model.pooling import DenseSpec, PoolingSpec


def load_pooler(spec: PoolingSpec, folder: Path, device: torch.device) -> Pooler:
    """The pooler with the projections that the folder holds. Raises EnvironmentFault or UsageError, naming the file."""
    return Pooler(spec, [_load(layer, folder, device) for layer in spec.dense])


def random_pooler(spec: PoolingSpec, seed: int, device: torch.device) -> Pooler:
    """The same with random projections, for weights that are random as well."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer in spec.dense:
        weight = torch.randn(layer.out_features, layer.in_features, generator=generator) * layer.in_features**-0.5
        bias = torch.zeros(layer.out_features) if layer.bias else None
        layers.append(DenseLayer(weight.to(device), None if bias is None else bias.to(device), layer.activation))
    return Pooler(spec, layers)


def _load(layer: DenseSpec, folder: Path, device: torch.device) -> DenseLayer:
    where = folder / layer.folder
    with StoredTensors(weight_files(where)) as tensors:
        weight = _read(tensors, f"{layer.name}.weight", [layer.out_features, layer.in_features], where)
        bias = _read(tensors, f"{layer.name}.bias", [layer.out_features], where) if layer.bias else None
    return DenseLayer(weight.to(device), None if bias is None else bias.to(device), layer.activation)


def _read(tensors: StoredTensors, name: str, shape: list[int], where: Path) -> torch.Tensor:
    ends = [stored for stored in tensors.names() if stored == name or stored.endswith(f".{name}")]
    if not ends:
        raise UsageError(f"{where} lacks {name}.", hint="The checkpoint is incomplete.", code="missing_weights")
    name = min(ends, key=len)  # behind the family's prefix, or without it
    if tensors.shape(name) != shape:
        raise UsageError(
            f"{name} in {where} has shape {tensors.shape(name)}; its configuration asks for {shape}.",
            hint="The checkpoint and its configuration do not belong together.",
            code="bad_weights",
        )
    return tensors.read(name).float()
