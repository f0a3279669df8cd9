"""Whole tiny models in bfloat16: with the CPU's attention kernels they come as close to float32 as with plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines_for_tests import TestEngine
from models_for_tests import random_model, save

from powerband.engine.kernels.cpu import library

PROMPTS = [[5, 6], list(range(40)), list(range(20, 150)), [7, 9] * 35]
ROOMY = {"block_size": 32, "kv_cache_memory": "8MiB", "quantization": "none"}


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> None:
    status = library.load()
    if status.tier is None:
        pytest.skip(f"no CPU kernels: {status.reason}")


@pytest.fixture(scope="module", params=["llama3", "mistral", "qwen3", "gemma2", "phi3", "gpt_oss"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"initializer_range": 0.1, "head_dim": 32}
    return save(random_model(request.param, **changes), tmp_path_factory.mktemp(request.param))


def logprobs(folder: Path, **settings: Any) -> torch.Tensor:
    """Of every token of every prompt, the requests running side by side in chunks."""
    with TestEngine(folder, **{**ROOMY, "max_num_batched_tokens": 48, **settings}) as engine:
        ids = [engine.add(prompt, max_tokens=3, prompt_logprobs=0) for prompt in PROMPTS]
        outputs = engine.run()
    rows = [entry for id in ids for output in outputs[id] for entry in output.prompt_logprobs or () if entry]
    return torch.tensor([entry.logprobs[0] for entry in rows])


def test_as_close_to_float32_as_plain_torch(folder: Path) -> None:
    exact = logprobs(folder)
    plain = (logprobs(folder, dtype="bfloat16", attention_backend="reference") - exact).abs().mean()
    kernels = (logprobs(folder, dtype="bfloat16", attention_backend="cpu") - exact).abs().mean()
    assert kernels < 1.25 * plain + 1e-3


def test_an_int8_cache_changes_little(folder: Path) -> None:
    exact = logprobs(folder)
    plain = logprobs(folder, dtype="bfloat16", attention_backend="cpu")
    held = logprobs(folder, dtype="bfloat16", attention_backend="cpu", kv_cache_dtype="int8")
    assert not torch.equal(held, plain)
    assert (held - exact).abs().mean() < 2 * (plain - exact).abs().mean() + 1e-3


def test_an_int8_cache_holds_nearly_twice_as_much(folder: Path) -> None:
    tokens = []
    for kv_cache_dtype in ("bfloat16", "int8"):
        settings = {**ROOMY, "dtype": "bfloat16", "attention_backend": "cpu", "kv_cache_dtype": kv_cache_dtype}
        with TestEngine(folder, **settings) as engine:
            engine.generate(PROMPTS, max_tokens=8)
            held = sum(layer.nbytes for layer in engine.engine.executor.attention.cache)  # type: ignore[attr-defined]
            assert held == engine.engine.memory.parts["kv_cache"]
            tokens.append(engine.engine.memory.kv_tokens)
    assert tokens[1] > 1.7 * tokens[0]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_the_same_request_again_from_the_prefix_cache(folder: Path, kv_cache_dtype: str) -> None:
    settings = {**ROOMY, "dtype": "bfloat16", "attention_backend": "cpu", "kv_cache_dtype": kv_cache_dtype}
    with TestEngine(folder, **settings) as engine:
        first = engine.generate(PROMPTS[2:3], max_tokens=8)
        assert engine.generate(PROMPTS[2:3], max_tokens=8) == first
        assert engine.engine.scheduler.stats().prefix_hits >= 96
