"""Mixtral: a block of experts in place of the MLP, whose parts are called w1 (gate), w2 (down) and w3 (up)."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from powerband.engine.models.decoder import Decoder
from powerband.engine.models.llama import NAMES
from powerband.engine.models.weight_mapping import WeightSlot, expert_slots, plain_slots


def slots(model: Decoder, names: Collection[str]) -> Iterator[WeightSlot]:
    yield from plain_slots(model, NAMES)
    yield from expert_slots(model, names, blocks=("block_sparse_moe", "mlp"), parts=("w1", "w2", "w3"))
