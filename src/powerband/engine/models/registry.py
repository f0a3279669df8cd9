"""The families that the engine can load, decoders and encoders, with the names of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from powerband.engine.models import bert, gemma, gpt_oss, llama, mixtral, olmo2, phi3, qwen3_moe
from powerband.engine.models.decoder import Decoder
from powerband.engine.models.encoder import Encoder
from powerband.engine.models.weight_mapping import WeightSlot
from powerband.errors import UsageError

Model = Decoder | Encoder

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


ENCODER_SLOTS: dict[str, Callable[[Encoder, Collection[str]], Iterable[WeightSlot]]] = dict.fromkeys(
    ("bert", "roberta", "xlm-roberta"), bert.slots
)


def slots_for(model: Model, names: Collection[str]) -> list[WeightSlot]:
    """Every slot that a checkpoint with these tensor names must fill. Raises UsageError for an unknown family."""
    family = model.spec.family
    if isinstance(model, Encoder) and family in ENCODER_SLOTS:
        return list(ENCODER_SLOTS[family](model, names))
    if isinstance(model, Encoder) or family not in SLOTS:
        known = ", ".join((*SLOTS, *ENCODER_SLOTS))
        raise UsageError(f"The engine cannot load family {family!r}.", hint=f"It knows {known}.")
    return list(SLOTS[family](model, names))
