"""Checkpoints that are quantized already: log-probabilities are transformers' own with the dequantized weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import checkpoint_formats as formats
import pytest
import torch
from models_for_tests import random_model
from safetensors.torch import load_file, save_file
from test_quantization import expected_logprobs, prompt_logprobs

from powerband.engine.linear.quantized_weights import dequantize
from powerband.engine.model_loader.quantized_checkpoint import QuantizedCheckpoint
from powerband.engine.model_loader.stored_tensors import StoredTensors
from powerband.errors import UsageError
from powerband.spec.checkpoint.quantization import WeightFormat

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def compressed(kind: str, bits: int, strategy: str, symmetric: bool = True) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric, "group_size": None}
    if strategy == "group":
        weights["group_size"] = 32
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"g": group}, "ignore": ["lm_head"]}


Writer = Callable[[torch.Tensor], formats.Written]
# name: (how the weights are written, quantization_config, loaded exactly as stored)
CHECKPOINTS: dict[str, tuple[Writer, dict[str, Any], bool]] = {
    "gptq": (formats.gptq, GPTQ, True),
    "gptq, zeros": (partial(formats.gptq, symmetric=False), {**GPTQ, "sym": False}, True),
    "gptq v2": (
        partial(formats.gptq, version=2, symmetric=False),
        {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
        True,
    ),
    "gptq v2, as transformers 5 writes it": (
        partial(formats.gptq, version=2, symmetric=False),
        {**GPTQ, "sym": False, "format": "gptq_v2"},
        True,
    ),
    "gptq, ordered": (partial(formats.gptq, ordered=True), {**GPTQ, "desc_act": True}, True),
    "gptq, 8 bits in groups": (partial(formats.gptq, bits=8), {**GPTQ, "bits": 8}, False),
    "gptq, ordered, 8 bits": (
        partial(formats.gptq, bits=8, ordered=True, symmetric=False),
        {**GPTQ, "bits": 8, "desc_act": True, "sym": False},
        False,
    ),
    "awq": (formats.awq, AWQ, True),
    "pack-quantized": (formats.packed, compressed("pack-quantized", 4, "group"), True),
    "pack-quantized, zeros": (
        partial(formats.packed, symmetric=False),
        compressed("pack-quantized", 4, "group", False),
        True,
    ),
    "pack-quantized, zeros in bytes": (
        partial(formats.packed, symmetric=False, packed_zeros=False),
        compressed("pack-quantized", 4, "group", False),
        True,
    ),
    "pack-quantized, channels": (partial(formats.packed, group=0), compressed("pack-quantized", 4, "channel"), True),
    "pack-quantized, 8 bits": (
        partial(formats.packed, bits=8, group=0),
        compressed("pack-quantized", 8, "channel"),
        True,
    ),
    "int-quantized": (formats.plain, compressed("int-quantized", 8, "channel"), True),
    "int-quantized, zeros": (
        partial(formats.plain, symmetric=False),
        compressed("int-quantized", 8, "channel", False),
        False,
    ),
    "int-quantized, 4 bits": (partial(formats.plain, bits=4, group=32), compressed("int-quantized", 4, "group"), True),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logprobs_are_those_of_the_dequantized_model(name: str, tmp_path: Path) -> None:
    writer, config, _ = CHECKPOINTS[name]
    model = formats.write(tmp_path, random_model("qwen2", initializer_range=0.08), writer, config)
    found = torch.tensor(prompt_logprobs(tmp_path, quantize_head=False))
    assert (found - expected_logprobs(model)).abs().mean() < 0.05


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_are_what_the_checkpoint_stands_for(name: str, tmp_path: Path) -> None:
    writer, config, exactly = CHECKPOINTS[name]
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
    tensors, expected = writer(weight)
    path = tmp_path / "model.safetensors"
    save_file({f"x.{part}": tensor.contiguous() for part, tensor in tensors.items()}, path)
    with StoredTensors([path]) as opened:
        checkpoint = QuantizedCheckpoint(format_of(config), opened)
        stored = checkpoint.read("x.weight", [48, 96])
    found = torch.empty(48, 96)
    found[:, slice(None) if stored.order is None else stored.order] = dequantize(stored.weight)
    error = (found - expected).abs().max()
    assert error < (1e-6 if exactly else 0.01 * expected.abs().max())


def format_of(config: dict[str, Any]) -> WeightFormat:
    from powerband.spec.checkpoint.quantization import read_weight_format
    from powerband.spec.config_reader import ConfigReader

    _, found = read_weight_format(ConfigReader({"quantization_config": config}, "config.json"))
    assert found is not None
    return found


def test_projections_whose_inputs_are_ordered_differently_stay_apart(tmp_path: Path) -> None:
    calls = iter(range(1000))

    def writer(weight: torch.Tensor) -> formats.Written:
        torch.manual_seed(next(calls))
        tensors, exact = formats.gptq(weight, ordered=False)
        order = torch.randperm(weight.shape[1])
        values, scales, _zeros, exact = formats.levels(weight, 4, 32, True, tensors["g_idx"][order].long())
        tensors |= {"qweight": formats.pack_rows(values.t(), 4), "scales": scales.t(), "g_idx": tensors["g_idx"][order]}
        return tensors, exact

    model = formats.write(tmp_path, random_model("qwen2", initializer_range=0.08), writer, {**GPTQ, "desc_act": True})
    found = torch.tensor(prompt_logprobs(tmp_path, quantize_head=False))
    assert (found - expected_logprobs(model)).abs().mean() < 0.05


def test_biases_of_zero_that_tools_add_are_no_obstacle(tmp_path: Path) -> None:
    def writer(weight: torch.Tensor) -> formats.Written:
        tensors, exact = formats.gptq(weight)
        return {**tensors, "bias": torch.zeros(weight.shape[0])}, exact

    model = formats.write(tmp_path, random_model("llama2", initializer_range=0.08), writer, GPTQ)
    found = torch.tensor(prompt_logprobs(tmp_path, quantize_head=False))
    assert (found - expected_logprobs(model)).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("part", "damage", "sentence"),
    [
        ("qweight", lambda t: t[:-1], "has shape"),
        ("qzeros", lambda t: t.float(), "not as integers"),
        ("scales", lambda t: t[:, :-1], "does not fit"),
        ("scales", lambda t: t * float("inf"), "not finite"),
        ("g_idx", lambda t: torch.zeros_like(t), "g_idx does not name"),
        ("g_idx", lambda t: t - 5, "g_idx does not name"),
        ("g_idx", lambda t: t + 2**30, "g_idx does not name"),
        ("qzeros", None, "lacks"),
    ],
)
def test_damage_is_named(part: str, damage: Any, sentence: str, tmp_path: Path) -> None:
    formats.write(tmp_path, random_model("qwen2"), formats.gptq, GPTQ)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.1.self_attn.k_proj.{part}"
    if damage is None:
        del tensors[name]
    else:
        tensors[name] = damage(tensors[name]).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=sentence) as caught:
        prompt_logprobs(tmp_path)
    assert "layers.1.self_attn.k_proj" in caught.value.message
