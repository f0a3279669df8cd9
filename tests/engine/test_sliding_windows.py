"""Engines of models with sliding windows hold the blocks of their windows only, and say what they would say with all.

Prompts and answers are several times as long as the window. Wherever a block is given to a request, what it held before
is made NaN: nothing that was freed is ever read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engines_for_tests import TestEngine
from models_for_tests import WINDOW, Oracle, healthy_model, random_model, save

from powerband.cost import sizing
from powerband.cost.memory import plan_memory
from powerband.engine.attention.cpu import CpuAttention
from powerband.engine.attention.reference import ReferenceAttention
from powerband.engine.kernels.cpu import library
from powerband.spec.kv_layout import KVLayout

SHORT, LONG = list(range(5)), [(7 * i) % 150 for i in range(150)]
PROMPTS = [SHORT, LONG, LONG[:100] + SHORT]
ANSWER = 2 * WINDOW + 12

_MIXED = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {  # its groups: full, windowed
    "mistral": ("mistral", {}, (0, 1)),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}, (1, 2)),
    "gemma2": ("gemma2", {}, (1, 1)),
    "gemma3": ("gemma3", _MIXED, (1, 3)),
    "gpt_oss": ("gpt_oss", {}, (1, 1)),
}
CONDITIONS: dict[str, dict[str, Any]] = {
    "whole prompts": {},
    "chunks shorter than the window": {"max_num_batched_tokens": 17},
    "chunks longer than the window": {"max_num_batched_tokens": 61, "enable_prefix_caching": False},
    "overlapped": {"async_scheduling": True, "max_num_batched_tokens": 40},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Oracle]:
    family, changes, _ = FAMILIES[request.param]
    model, oracle = healthy_model(family, PROMPTS, ANSWER, **changes)
    return request.param, save(model, tmp_path_factory.mktemp(request.param)), oracle


@contextmanager
def poisoned(folder: Path, **settings: Any) -> Iterator[TestEngine]:
    """An engine in which a block's content is lost when it is given to a request. While steps overlap, it is kept."""
    with TestEngine(folder, **settings) as test:
        pool, attention = test.engine.scheduler.kv.pool, test.engine.executor.attention
        take, size = pool.take, test.engine.settings.block_size

        @torch.inference_mode()
        def taking(count: int) -> list[int] | None:
            for block in (blocks := take(count)) or ():
                if isinstance(attention, ReferenceAttention):
                    for keys, values in attention._cache:
                        keys[:, block * size : (block + 1) * size] = torch.nan
                        values[:, block * size : (block + 1) * size] = torch.nan
                elif isinstance(attention, CpuAttention) and attention.cache[0].dtype is torch.bfloat16:
                    for cache in attention.cache:
                        cache[block] = torch.nan
            return blocks

        if test.engine.executor.depth == 1:
            pool.take = taking  # type: ignore[method-assign]  # a spy
        yield test


@pytest.mark.parametrize("condition", CONDITIONS)
def test_answers_equal_transformers(checkpoint: tuple[str, Path, Oracle], condition: str) -> None:
    name, folder, oracle = checkpoint
    with poisoned(folder, **CONDITIONS[condition]) as test:
        layout = test.engine.memory.layout
        assert (layout.full, layout.windowed) == FAMILIES[name][2]
        for _ in range(2):  # then from the prefix cache
            assert test.generate(PROMPTS, max_tokens=ANSWER) == oracle.continuations
        kv = test.engine.scheduler.kv
        kv.check()
        assert kv.usage().num_used == 0
        hits = test.engine.scheduler.stats().prefix_hits
        assert hits > 240 if kv.prefix_caching else hits == 0


def test_answers_equal_transformers_after_preemption(checkpoint: tuple[str, Path, Oracle]) -> None:
    _, folder, oracle = checkpoint
    with TestEngine(folder, max_model_len=256) as roomy:
        memory = roomy.engine.memory
    page = memory.parts["kv_cache"] // memory.num_blocks
    tight = {"kv_cache_memory": f"{memory.layout.max_pages(256 // 8) * page}B", "max_model_len": 256}
    prompts, answers = [SHORT] * 12 + [LONG], oracle.continuations[:1] * 12 + oracle.continuations[1:2]
    with poisoned(folder, **tight) as test:
        assert test.generate(prompts, max_tokens=ANSWER) == answers
        assert test.engine.scheduler.stats().num_preemptions > 0


def test_a_request_holds_no_more_than_its_window(checkpoint: tuple[str, Path, Oracle]) -> None:
    _, folder, _ = checkpoint
    with TestEngine(folder, max_num_batched_tokens=24, enable_prefix_caching=False) as test:
        layout = test.engine.memory.layout
        test.add(LONG, max_tokens=ANSWER, ignore_eos=True)
        most = 0
        while test.inbox.commands or test.engine.core.busy:
            test.engine.core.step()
            most = max(most, test.engine.scheduler.kv.usage().num_used)
    blocks = (len(LONG) + ANSWER) // 8
    kept, chunk = -(-(WINDOW - 1) // 8) + 1, 24 // 8
    assert layout.full * blocks <= most <= layout.full * (blocks + 1) + layout.windowed * (kept + chunk)


def logprobs(folder: Path, **settings: Any) -> list[float]:
    """Of every token of prompts and answers, computed by the CPU kernels, in chunks."""
    options = {"dtype": "bfloat16", "attention_backend": "cpu", "block_size": 32, "max_num_batched_tokens": 48}
    with poisoned(folder, **options, **settings) as test:
        params = {"max_tokens": ANSWER, "prompt_logprobs": 0, "logprobs": 0, "ignore_eos": True}
        ids = [test.add(prompt, **params) for prompt in PROMPTS]
        found = test.run()
    outputs = [output for id in ids for output in found[id]]
    entries = [entry for output in outputs for entry in (*(output.prompt_logprobs or ()), *(output.logprobs or ()))]
    return [entry.logprobs[0] for entry in entries]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_cpu_kernels_compute_the_same_with_windows_only(
    name: str, kv_cache_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = library.load()
    if status.tier is None:
        pytest.skip(f"no CPU kernels: {status.reason}")
    family, changes, _ = FAMILIES[name]
    folder = save(random_model(family, initializer_range=0.1, **{**changes, "head_dim": 32}), tmp_path)
    windows = logprobs(folder, kv_cache_dtype=kv_cache_dtype)
    monkeypatch.setattr(sizing, "kv_layout", lambda layers, size, **_: KVLayout(size, len(layers)))
    assert windows == logprobs(folder, kv_cache_dtype=kv_cache_dtype)


def test_the_engine_takes_what_the_memory_plan_says(checkpoint: tuple[str, Path, Oracle]) -> None:
    _, folder, _ = checkpoint
    with TestEngine(folder) as test:
        engine = test.engine
        planned = plan_memory(engine.spec, engine.settings, 1 << 33, kind="cpu", dtype="float32")
        assert (planned.num_blocks, planned.kv_tokens) == (engine.memory.num_blocks, engine.info.kv_capacity_tokens)
        assert f"{planned.kv_tokens} tokens" in engine.info.summary
        assert engine.scheduler.kv.pool.num_blocks == planned.num_blocks
        attention = engine.executor.attention
        assert isinstance(attention, ReferenceAttention)
        taken = sum(cache.nbytes for layer in attention._cache for cache in layer)
        assert taken == planned.parts["kv_cache"]
