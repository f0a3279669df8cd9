"""An adapter's output equals that of PEFT's merged model, token for token in float32, however it is batched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_for_tests import save_adapter
from engines_for_tests import SMALL, TestEngine
from models_for_tests import MARGIN, greedy, random_model, save

from powerband.spec.model.counts import kv_bytes_per_token
from powerband.spec.model.reader import read_model_spec

# Gemma's tied head would repeat the last token whatever the layers add.
FAMILIES: dict[str, dict[str, Any]] = {"llama2": {}, "qwen3": {}, "gemma3": {"tie_word_embeddings": False}, "phi3": {}}
NEW_TOKENS = 8
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rs": {"r": 7, "use_rslora": True, "lora_alpha": 3},
}


@dataclass(frozen=True)
class Case:
    """A checkpoint, the folders of its adapters, and what is answered to each prompt with each and with none."""

    model: Path
    adapters: dict[str, Path]
    prompts: list[list[int]]
    answers: dict[str | None, list[list[int]]]

    def flags(self) -> dict[str, Any]:
        return {"lora": tuple(f"{name}={folder}" for name, folder in self.adapters.items())}

    def mixed(self) -> tuple[list[list[int]], list[str | None], list[list[int]]]:
        """Every prompt with every adapter and with none, in no order: prompts, adapters, answers."""
        names = [None, *self.adapters]
        asked = [(index, name) for index in range(len(self.prompts)) for name in names]
        return (
            [self.prompts[index] for index, _ in asked],
            [name for _, name in asked],
            [self.answers[name][index] for index, name in asked],
        )


def make_case(family: str, folder: Path, adapters: dict[str, dict[str, Any]]) -> Case:
    """A random model and random adapters whose greedy choices are all clear."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 160, (length,), generator=generator).tolist() for length in (1, 13, 40, 75)]
    for seed in range(10):
        model = random_model(family, seed, **FAMILIES[family])
        models: dict[str | None, Any] = {None: model}
        for index, (name, config) in enumerate(adapters.items()):
            models[name] = save_adapter(model, folder / name, index, **config)
        answers = {name: greedy(one, prompts, NEW_TOKENS) for name, one in models.items()}
        if min(margin for _, margin in answers.values()) > MARGIN:
            found = {name: continuations for name, (continuations, _) in answers.items()}
            return Case(save(model, folder / "model"), {name: folder / name for name in adapters}, prompts, found)
    raise AssertionError(f"every random {family} hesitates")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param), ADAPTERS)


def test_one_request_at_a_time(case: Case) -> None:
    with TestEngine(case.model, **case.flags()) as engine:
        for name in (None, *case.adapters):
            alone = [engine.generate([prompt], adapters=[name], max_tokens=NEW_TOKENS)[0] for prompt in case.prompts]
            assert alone == case.answers[name], name
    assert case.answers["plain"] != case.answers[None] != case.answers["rs"]


@pytest.mark.parametrize(
    "settings", [{}, {"max_num_batched_tokens": 40, "async_scheduling": True}], ids=["batched", "overlapped_chunks"]
)
def test_adapters_and_none_in_one_batch(case: Case, settings: dict[str, Any]) -> None:
    prompts, adapters, answers = case.mixed()
    with TestEngine(case.model, **case.flags(), **settings) as engine:
        assert engine.generate(prompts, adapters=adapters, max_tokens=NEW_TOKENS) == answers
        # Once more, from the prefix cache, in which every adapter has blocks of its own.
        hits = engine.engine.scheduler.stats().prefix_hits
        assert engine.generate(prompts, adapters=adapters, max_tokens=NEW_TOKENS) == answers
        assert engine.engine.scheduler.stats().prefix_hits > hits + 200


def test_preempted(case: Case) -> None:
    prompts, adapters, answers = (one[::-1] for one in case.mixed())
    num_blocks = 1 + 2 * -(-len(prompts[0]) // SMALL["block_size"])
    block_bytes = SMALL["block_size"] * kv_bytes_per_token(read_model_spec(case.model), "float32")
    tight = {"kv_cache_memory": f"{num_blocks * block_bytes}B", "max_model_len": 100}
    with TestEngine(case.model, **case.flags(), **tight, enable_prefix_caching=False) as engine:
        assert engine.generate(prompts, adapters=adapters, max_tokens=NEW_TOKENS) == answers
        assert engine.engine.scheduler.stats().num_preemptions > 0
