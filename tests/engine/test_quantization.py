"""Weights quantized while loading: they compute what transformers computes with the same weights dequantized."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from engines_for_tests import TestEngine
from models_for_tests import FAMILIES, random_model, save
from safetensors.torch import load_file, save_file

from powerband.engine.linear.quantized_weights import dequantize, quantize_int4, quantize_int8
from powerband.errors import UsageError

PROMPT = list(range(3, 50))
MATRICES = ("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight", "gate_up_proj", "down_proj")
QUANTIZE = {"int8": quantize_int8, "int4": quantize_int4}


def prompt_logprobs(folder: Path, **settings: Any) -> list[float]:
    """Of each token of PROMPT but the first, by the engine."""
    with TestEngine(folder, dtype="bfloat16", **settings) as engine:
        engine.add(PROMPT, max_tokens=1, prompt_logprobs=0)
        [outputs] = engine.run().values()
    found = [entry for output in outputs for entry in output.prompt_logprobs or [] if entry is not None]
    return [entry.logprobs[0] for entry in found]


def expected_logprobs(model: Any) -> torch.Tensor:
    """The same by transformers, in float32."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


def rounded(model: Any, precision: str, head: bool) -> Any:
    """A copy whose matrices hold what is left of them after quantization."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter.bfloat16())
            if not name.endswith(MATRICES) or "bias" in name:
                continue
            for matrix in parameter if parameter.dim() == 3 else [parameter]:
                weight = matrix.bfloat16()
                turned = model.config.model_type == "gpt_oss" and parameter.dim() == 3  # it keeps them as [in, out]
                exact = dequantize(QUANTIZE[precision](weight.T.contiguous() if turned else weight))
                matrix.copy_(exact.T if turned else exact)
        if head:
            exact = dequantize(quantize_int8(model.lm_head.weight.bfloat16()))
            model.lm_head.weight = torch.nn.Parameter(exact)
    return model


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("precision", QUANTIZE)
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_the_dequantized_model(family: str, precision: str, head: bool, tmp_path: Path) -> None:
    model = random_model(family, initializer_range=0.05)
    save(model, tmp_path)
    found = torch.tensor(prompt_logprobs(tmp_path, quantization=precision, quantize_head=head))
    error = (found - expected_logprobs(rounded(model, precision, head))).abs().mean()
    unquantized = (found - expected_logprobs(model)).abs().mean()
    assert error < 0.1
    if precision == "int4":
        assert error < unquantized / 2


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    folder = save(random_model("qwen3"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.gate_up: .* not finite"):
        TestEngine(folder, dtype="bfloat16", quantization="int8")


def test_summary_says_what_is_held_in_what(tmp_path: Path) -> None:
    folder = save(random_model("mixtral"), tmp_path)
    with TestEngine(folder, dtype="auto", quantization="int4") as engine:
        summary = engine.engine.info.summary
        assert engine.engine.settings.dtype == "bfloat16"
    assert "bfloat16, weights int4, head int8" in summary
    assert engine.engine.executor.providers["kernel int4"] == 3 * 3  # in each layer: two of attention, and the experts


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"quantization": "int8", "dtype": "float32"}, "activations in bfloat16"),
        ({"dtype": "float32", "kv_cache_dtype": "int8", "attention_backend": "reference"}, "cannot hold"),
        ({"dtype": "float32", "kv_cache_dtype": "bfloat16"}, "dtype is 'float32'"),
    ],
)
def test_precisions_that_do_not_go_together(asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        TestEngine("demo", **asked)
