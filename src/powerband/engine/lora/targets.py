"""The projections that an adapter may change, under the names that checkpoints of the family give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from powerband.engine.linear.base import Linear
from powerband.engine.models.decoder import Decoder
from powerband.engine.models.registry import slots_for
from powerband.spec.model.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """A checkpoint's projection [out, in] and where it lies in ours: its outputs begin at `start` of `part`."""

    part: str  # as in layers.0.attention.qkv
    start: int
    out_features: int
    in_features: int


def adapter_targets(spec: ModelSpec) -> Mapping[str, AdapterTarget]:
    """Targets by the checkpoint's name of the module, as in "model.layers.0.self_attn.q_proj". Experts have none.

    Found as weights find their place: in a model without memory.
    """
    # Computing without memory loads half of torch, so that there is to be no rotary table.
    spec = replace(spec, layers=tuple(replace(layer, rope=None) for layer in spec.layers))
    model = Decoder(spec, max_positions=1, dtype=torch.float32, device=torch.device("meta"))
    parts = {id(module.weight): name for name, module in adaptable_parts(model).items()}
    found = {}
    for slot in slots_for(model, ()):
        whole = slot.target if slot.target._base is None else slot.target._base
        part = parts.get(id(whole))
        if part is not None:
            out_features, in_features = slot.target.shape
            start = slot.target.storage_offset() // in_features
            found[slot.sources[0].removesuffix(".weight")] = AdapterTarget(part, start, out_features, in_features)
    return found


def adaptable_parts(model: Decoder) -> dict[str, Linear]:
    """The projections of attention and of dense MLPs, by name."""
    parts = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    return {name: part for name, part in parts.items() if name.startswith("layers.") and not name.endswith(".router")}
