"""The families that the engine can load, with the names of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from powerband.engine.models import gemma, gpt_oss, llama, mixtral, olmo2, phi3, qwen3_moe
from powerband.engine.models.decoder import Decoder
from powerband.engine.models.weight_mapping import WeightSlot
from powerband.errors import UsageError

SLOTS: dict[str, Callable[[Decoder, Collection[str]], Iterable[WeightSlot]]] = {
    "llama": llama.slots,
    "mistral": llama.slots,
    "qwen2": llama.slots,
    "qwen3": llama.slots,
    "gemma2": gemma.slots,
    "gemma3": gemma.slots,
    "phi3": phi3.slots,
    "olmo2": olmo2.slots,
    "gpt_oss": gpt_oss.slots,
    "mixtral": mixtral.slots,
    "qwen3_moe": qwen3_moe.slots,
}


def slots_for(model: Decoder, names: Collection[str]) -> list[WeightSlot]:
    """Every slot that a checkpoint with these tensor names must fill. Raises UsageError for an unknown family."""
    family = model.spec.family
    if family not in SLOTS:
        raise UsageError(f"The engine cannot load family {family!r}.", hint=f"It knows {', '.join(SLOTS)}.")
    return list(SLOTS[family](model, names))
