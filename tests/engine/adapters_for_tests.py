"""PEFT adapters with random weights for the tiny models, and what their merged models say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def save_adapter(model: Any, folder: Path, seed: int = 0, *, std: float = 0.3, **config: Any) -> Any:
    """Write an adapter of a copy of `model` whose A and B are random, and return the merged model."""
    import copy

    import peft

    targets = FUSED if model.config.model_type == "phi3" else PROJECTIONS
    asked = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **config})
    adapted = peft.get_peft_model(copy.deepcopy(model), asked)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().eval()
