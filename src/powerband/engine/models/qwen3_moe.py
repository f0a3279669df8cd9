"""Qwen3 with experts in some or all layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from powerband.engine.models.decoder import Decoder
from powerband.engine.models.llama import NAMES
from powerband.engine.models.weight_mapping import WeightSlot, expert_slots, plain_slots


def slots(model: Decoder, names: Collection[str]) -> Iterator[WeightSlot]:
    yield from plain_slots(model, NAMES)
    yield from expert_slots(model, names, blocks=("mlp",), parts=("gate_proj", "down_proj", "up_proj"))
