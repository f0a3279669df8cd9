"""Layers as blocks: what they give is what their parts give one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from adapters_for_tests import save_adapter
from engines_for_tests import TestEngine
from models_for_tests import random_model, save

from powerband.engine.kernels.cpu import library
from powerband.engine.models.cpu import CpuLayers
from powerband.engine.models.decoder import Decoder

PROMPTS = [[5, 6], list(range(40)), list(range(20, 150)), [7, 9] * 35]
SETTINGS = {
    "block_size": 32,
    "kv_cache_memory": "8MiB",
    "max_num_batched_tokens": 48,
    "dtype": "bfloat16",
    "attention_backend": "cpu",
    "enable_prefix_caching": False,
}


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    status = library.load()
    if status.tier is None:
        pytest.skip(f"no CPU kernels: {status.reason}")


def logprobs(engine: TestEngine, adapters: Sequence[str | None] = (None,) * len(PROMPTS)) -> torch.Tensor:
    """Of every token of every prompt and of what follows, the requests running side by side in chunks."""
    params = {"max_tokens": 4, "prompt_logprobs": 0, "logprobs": 0, "ignore_eos": True}
    ids = [engine.add(prompt, adapter=name, **params) for prompt, name in zip(PROMPTS, adapters, strict=True)]
    found = engine.run()
    outputs = [output for id in ids for output in found[id]]
    assert len(ids) == len(PROMPTS)
    entries = [entry for output in outputs for entry in (*(output.prompt_logprobs or ()), *(output.logprobs or ()))]
    return torch.tensor([entry.logprobs[0] for entry in entries if entry])


def take_apart(model: Decoder) -> int:
    """The model computes part by part from now on. Returns how many halves of layers were blocks."""
    layers, model.run_layers = model.run_layers, None
    assert isinstance(layers, CpuLayers)
    return layers.num_blocks


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gpt_oss"])
def test_blocks_give_what_their_parts_give(family: str, quantization: str, tmp_path: Path) -> None:
    model = random_model(family, initializer_range=0.1, head_dim=32)
    with TestEngine(save(model, tmp_path), quantization=quantization, **SETTINGS) as engine:
        together = logprobs(engine)
        decoder = engine.engine.executor.runner.model
        num_layers = len(decoder.layers)
        assert take_apart(decoder) == (num_layers if family == "gpt_oss" else 2 * num_layers)
        apart = logprobs(engine)
    # Norms after the sublayer are added before they are rounded; everything else is the same to the bit.
    if family == "gemma2":
        assert (together - apart).abs().mean() < 0.02
    else:
        assert torch.equal(together, apart)


def test_norms_over_all_heads_stay_apart(tmp_path: Path) -> None:
    with TestEngine(save(random_model("olmo2", head_dim=32), tmp_path), quantization="none", **SETTINGS) as engine:
        decoder = engine.engine.executor.runner.model
        assert take_apart(decoder) == len(decoder.layers)


@pytest.mark.parametrize(("family", "quantization"), [("qwen3", "none"), ("gemma2", "int8")])
def test_blocks_add_what_adapters_add(family: str, quantization: str, tmp_path: Path) -> None:
    model = random_model(family, initializer_range=0.1, head_dim=32)
    for seed, name in enumerate("ab"):
        save_adapter(model, tmp_path / name, seed, std=0.1, r=3 + seed)
    flags = {"lora": tuple(f"{name}={tmp_path / name}" for name in "ab"), "quantization": quantization}
    mixed = ("a", None, "b", "a")
    with TestEngine(save(model, tmp_path / "model"), **flags, **SETTINGS) as engine:
        runner = engine.engine.executor.runner
        assert all(weights.is_packed for weights in runner.adapters.values())
        together, without = logprobs(engine, mixed), logprobs(engine)
        take_apart(runner.model)
        apart = logprobs(engine, mixed)
    with TestEngine(tmp_path / "model", **flags, **SETTINGS | {"attention_backend": "auto", "kernels": "off"}) as plain:
        right = logprobs(plain, mixed)
    assert (together - apart).abs().mean() < 0.02
    assert (together - right).abs().mean() < 0.05
    assert (together - without).abs().mean() > 0.2
