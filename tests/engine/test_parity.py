"""Greedy output equals transformers' own, token for token in float32, for every family and however it is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines_for_tests import SMALL, TestEngine
from models_for_tests import FAMILIES, NEW_TOKENS, ORIGINAL_POSITIONS, VARIANTS, Oracle, healthy_model, save

from powerband.spec.kv_layout import kv_layout
from powerband.spec.model.counts import kv_bytes_per_token_per_layer
from powerband.spec.model.reader import read_model_spec

# The ways in which the same tokens must come out. Budgets and caches are so small that they bite.
CONDITIONS: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"max_num_batched_tokens": 48},
    "overlapped": {"async_scheduling": True},
    "overlapped_and_chunked": {"async_scheduling": True, "max_num_batched_tokens": 40},
    "without_prefix_cache": {"enable_prefix_caching": False},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    model, oracle = healthy_model(request.param)
    return save(model, tmp_path_factory.mktemp(request.param)), oracle


def test_one_request_at_a_time(checkpoint: tuple[Path, Oracle]) -> None:
    folder, oracle = checkpoint
    with TestEngine(folder) as engine:
        alone = [engine.generate([prompt], max_tokens=NEW_TOKENS)[0] for prompt in oracle.prompts]
    assert alone == oracle.continuations


@pytest.mark.parametrize("condition", CONDITIONS)
def test_together(checkpoint: tuple[Path, Oracle], condition: str) -> None:
    folder, oracle = checkpoint
    with TestEngine(folder, **CONDITIONS[condition]) as engine:
        assert engine.generate(oracle.prompts, max_tokens=NEW_TOKENS) == oracle.continuations


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted(checkpoint: tuple[Path, Oracle], overlap: bool) -> None:
    folder, oracle = checkpoint
    prompts, continuations = oracle.prompts[::-1], oracle.continuations[::-1]
    spec, size = read_model_spec(folder), SMALL["block_size"]
    layout = kv_layout(spec.layers, size, step_tokens=SMALL["max_num_batched_tokens"], max_model_len=320)
    if layout.windowed:  # long requests hardly grow; many short ones do, and the longest alone must fit
        prompts, continuations = prompts[-2:] * 8, continuations[-2:] * 8
        num_blocks = layout.max_pages(320 // size)
    else:  # the two longest prompts fit together, but not with their output
        num_blocks = 1 + sum(-(-len(prompt) // size) for prompt in prompts[:2])
    block_bytes = size * layout.group_layers * kv_bytes_per_token_per_layer(spec, "float32")
    tight = {"kv_cache_memory": f"{num_blocks * block_bytes}B", "max_model_len": 320}
    with TestEngine(folder, async_scheduling=overlap, **tight) as engine:
        assert engine.generate(prompts, max_tokens=NEW_TOKENS) == continuations
        assert engine.engine.scheduler.stats().num_preemptions > 0


def test_from_the_prefix_cache(checkpoint: tuple[Path, Oracle]) -> None:
    folder, oracle = checkpoint
    with TestEngine(folder) as engine:
        engine.generate(oracle.prompts, max_tokens=NEW_TOKENS)
        hits = engine.engine.scheduler.stats().prefix_hits
        assert engine.generate(oracle.prompts, max_tokens=NEW_TOKENS) == oracle.continuations
        assert engine.engine.scheduler.stats().prefix_hits > hits + 400


@pytest.mark.parametrize("variant", VARIANTS)
def test_rarer_switches(variant: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    model, oracle = healthy_model(family, **changes)
    with TestEngine(save(model, tmp_path), max_num_batched_tokens=96) as engine:
        assert engine.generate(oracle.prompts, max_tokens=NEW_TOKENS) == oracle.continuations


def test_an_engine_for_short_sequences_uses_short_rope_factors(tmp_path: Path) -> None:
    model, oracle = healthy_model("phi3_longrope", [[5], list(range(40)), list(range(20, 40))])
    with TestEngine(save(model, tmp_path), max_model_len=ORIGINAL_POSITIONS) as engine:
        assert engine.generate(oracle.prompts, max_tokens=NEW_TOKENS) == oracle.continuations
