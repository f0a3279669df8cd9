"""Quantized checkpoints for tests, packed by plain loops as the documentation of each tool describes its format.

Each writer gets a weight [out, in] and returns the tensors that stand for it and the weight that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Written = tuple[dict[str, torch.Tensor], torch.Tensor]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's WQLinear_GEMM


def levels(weight: torch.Tensor, bits: int, group: int, symmetric: bool, columns: torch.Tensor | None = None) -> Any:
    """(values 0..2^bits-1 [out, in], scales [out, groups] float16, zeros [out, groups], dequantized weight).

    columns: the group of each input; default: neighbours.
    """
    out_features, in_features = weight.shape
    top = (1 << bits) - 1
    groups = torch.arange(in_features) // group if columns is None else columns
    count = int(groups.max()) + 1
    values, exact = torch.zeros_like(weight, dtype=torch.int32), torch.zeros_like(weight)
    scales, zeros = torch.zeros(out_features, count, dtype=torch.float16), torch.zeros(out_features, count).int()
    for g in range(count):
        inside = groups == g
        part = weight[:, inside]
        if symmetric:
            scales[:, g] = part.abs().amax(1) * 2 / top
            zeros[:, g] = (top + 1) // 2
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scales[:, g] = (high - low) / top
            zeros[:, g] = (-low / scales[:, g].float()).round().clamp(0, top).int()
        scale, zero = scales[:, g].float()[:, None], zeros[:, g][:, None]
        values[:, inside] = (part / scale + zero).round().clamp(0, top).int()
        exact[:, inside] = (values[:, inside] - zero) * scale
    return values, scales, zeros, exact


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, m] → int32 [n * bits / 32, m]: AutoGPTQ's loop over qweight."""
    per_word = 32 // bits
    words = torch.zeros(-(-values.shape[0] // per_word), values.shape[1], dtype=torch.int64)
    for row in range(values.shape[0]):
        words[row // per_word] |= values[row].long() << (bits * (row % per_word))
    return as_int32(words)


def as_int32(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def gptq(
    weight: torch.Tensor,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    version: int = 1,
    ordered: bool = False,
) -> Written:
    in_features = weight.shape[1]
    g_idx = torch.arange(in_features) // group
    if ordered:  # desc_act: inputs fall into groups in order of their activations, here the same for every projection
        g_idx = g_idx[torch.randperm(in_features, generator=torch.Generator().manual_seed(in_features))]
    values, scales, zeros, exact = levels(weight, bits, group, symmetric, g_idx)
    stored_zeros = (zeros - 1) % (1 << bits) if version == 1 else zeros
    tensors = {
        "qweight": pack_rows(values.t(), bits),
        "qzeros": pack_rows(stored_zeros, bits).t(),
        "scales": scales.t(),
        "g_idx": g_idx.int(),
    }
    return tensors, exact


def awq(weight: torch.Tensor, *, group: int = 32) -> Written:
    values, scales, zeros, exact = levels(weight, 4, group, symmetric=False)
    return {"qweight": awq_pack(values.t()), "qzeros": awq_pack(zeros.t()), "scales": scales.t()}, exact


def awq_pack(values: torch.Tensor) -> torch.Tensor:
    """[n, m] → int32 [n, m / 8], eight neighbouring columns shuffled."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for column in range(words.shape[1]):
        for place, source in enumerate(AWQ_ORDER):
            words[:, column] |= values[:, column * 8 + source].long() << (4 * place)
    return as_int32(words)


def packed(
    weight: torch.Tensor, *, bits: int = 4, group: int = 32, symmetric: bool = True, packed_zeros: bool = True
) -> Written:
    """compressed-tensors, pack-quantized."""
    group = group or weight.shape[1]
    values, scales, zeros, exact = levels(weight, bits, group, symmetric)
    tensors = {
        "weight_packed": pack_rows(values.t(), bits).t(),
        "weight_scale": scales.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }
    rounded = scales.bfloat16().float() / scales.float()
    exact = exact * rounded.repeat_interleave(group, dim=1)
    if not symmetric:
        half = 1 << (bits - 1)
        tensors["weight_zero_point"] = pack_rows(zeros, bits) if packed_zeros else (zeros - half).to(torch.int8)
    return tensors, exact


def plain(weight: torch.Tensor, *, bits: int = 8, group: int = 0, symmetric: bool = True) -> Written:
    """compressed-tensors, int-quantized."""
    values, scales, zeros, exact = levels(weight, bits, group or weight.shape[1], symmetric)
    half = 1 << (bits - 1)
    tensors = {"weight": (values - half).to(torch.int8), "weight_scale": scales.float()}
    if not symmetric:
        tensors["weight_zero_point"] = (zeros - half).to(torch.int8)
    return tensors, exact


def write(folder: Path, model: Any, writer: Callable[[torch.Tensor], Written], config: dict[str, Any]) -> Any:
    """Save a transformers model with its layers' projections quantized, and put what they stand for into it."""
    model.save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": config}))
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            if not name.endswith("_proj.weight"):
                parameter.copy_(parameter.bfloat16())
                tensors[name] = parameter
                continue
            written, exact = writer(parameter)
            parameter.copy_(exact)
            base = name.removesuffix("weight")
            tensors |= {f"{base}{part}": tensor for part, tensor in written.items()}
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return model
