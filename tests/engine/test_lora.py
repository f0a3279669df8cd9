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

from powerband import LLM, LoRARequest, SamplingParams
from powerband.core.request import cache_root
from powerband.errors import InvalidRequest
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
        # Where windows give blocks back, such short answers leave none short of them.
        assert engine.engine.memory.layout.windowed or engine.engine.scheduler.stats().num_preemptions > 0


def registry_and_digest(engine: TestEngine, name: str) -> tuple[Any, str]:
    registry = engine.engine.adapters
    return registry, next(info.digest for info in registry.infos() if info.name == name)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("qwen3", tmp_path_factory.mktemp("qwen3_for_all"), ADAPTERS)


def test_loaded_between_two_steps(qwen3: Case) -> None:
    """A request that runs meanwhile is answered as alone."""
    with TestEngine(qwen3.model, max_loras=1) as engine:
        id = engine.add(qwen3.prompts[2], max_tokens=NEW_TOKENS)
        first = engine.engine.core.step()
        finish = engine.engine.adapters.begin_load("plain", str(qwen3.adapters["plain"]))
        finish()
        other = engine.add(qwen3.prompts[2], adapter="plain", max_tokens=NEW_TOKENS)
        outputs = engine.run()
        tokens = {key: [token for output in value for token in output.token_ids] for key, value in outputs.items()}
        assert [token for output in first for token in output.token_ids] + tokens[id] == qwen3.answers[None][2]
        assert tokens[other] == qwen3.answers["plain"][2]


def test_an_adapter_that_is_unloaded_stays_until_its_requests_end(qwen3: Case) -> None:
    with TestEngine(qwen3.model, **qwen3.flags()) as engine:
        registry, _ = registry_and_digest(engine, "plain")
        engine.add(qwen3.prompts[1], adapter="plain", max_tokens=NEW_TOKENS)
        engine.engine.core.step()
        registry.remove("plain")
        registry.release()
        [outputs] = engine.run().values()
        assert len(registry._held) == 2
        registry.release()
        assert len(registry._held) == 1
        assert outputs[-1].error is None


def test_room_and_names_are_limited(qwen3: Case) -> None:
    plain, rs = (str(qwen3.adapters[name]) for name in ("plain", "rs"))
    with TestEngine(qwen3.model, max_loras=1) as engine:
        registry = engine.engine.adapters
        first = registry.load("a", plain)
        with pytest.raises(InvalidRequest, match="max_loras"):
            registry.load("b", rs)
        assert registry.load("b", plain).digest == first.digest  # the same content takes no more room
        with pytest.raises(InvalidRequest, match="loaded already"):
            registry.load("a", plain)
        registry.remove("b")
        registry.remove("a")
        assert registry.begin_load("a", rs)().digest != first.digest
        with pytest.raises(InvalidRequest, match="no adapter"):
            registry.remove("b")


def test_a_request_for_an_adapter_that_is_gone_fails_alone(qwen3: Case) -> None:
    with TestEngine(qwen3.model, **qwen3.flags()) as engine:
        registry, _ = registry_and_digest(engine, "plain")
        gone = engine.add(qwen3.prompts[1], adapter="plain")
        other = engine.add(qwen3.prompts[1], adapter="rs", max_tokens=NEW_TOKENS)
        registry.remove("plain")
        registry.release()
        outputs = engine.run()
        assert outputs[gone][-1].error is not None
        assert outputs[gone][-1].error.code == "adapter_not_found"
        assert [token for output in outputs[other] for token in output.token_ids] == qwen3.answers["rs"][1]


def test_every_adapter_and_none_have_blocks_of_their_own() -> None:
    roots = {cache_root("t", "s", adapter) for adapter in ("", "a", "b")}
    assert len(roots) == 3
    assert cache_root("t", "", "s") != cache_root("t", "s")


@pytest.mark.parametrize("precision", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "int8"}], ids=str)
def test_in_few_bits_probabilities_are_near(qwen3: Case, precision: dict[str, str]) -> None:
    """As near to PEFT's merged model as the model without an adapter is to its own in 32 bits."""
    prompts, adapters, _ = qwen3.mixed()

    def prompt_logprobs(**settings: Any) -> list[torch.Tensor]:
        with TestEngine(qwen3.model, **qwen3.flags(), **settings) as engine:
            ids = [
                engine.add(prompt, adapter=name, max_tokens=1, prompt_logprobs=0)
                for prompt, name in zip(prompts, adapters, strict=True)
            ]
            outputs = engine.run()
            rows = [[row for output in outputs[id] for row in output.prompt_logprobs or []] for id in ids]
            return [torch.tensor([row.logprobs[0] for row in own]) for own in rows if own]

    right, near = prompt_logprobs(), prompt_logprobs(**precision)
    names = [name for prompt, name in zip(prompts, adapters, strict=True) if len(prompt) > 1]
    error: dict[str | None, list[float]] = {}
    for name, a, b in zip(names, right, near, strict=True):
        error.setdefault(name, []).append((a - b).abs().mean().item())
    average = {name: sum(values) / len(values) for name, values in error.items()}
    for name in qwen3.adapters:
        assert average[name] < 3 * average[None] + 0.02, average


def test_llm_takes_adapters_in_vllms_shape(qwen3: Case) -> None:
    settings = {key: SMALL[key] for key in ("dtype", "device", "threads", "block_size", "kv_cache_memory")}
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    plain, rs = (LoRARequest(name, 1 + i, str(qwen3.adapters[name])) for i, name in enumerate(("plain", "rs")))
    with LLM(str(qwen3.model), max_loras=1, max_model_len=256, **settings) as llm:

        def answers(lora_request: Any) -> list[list[int]]:
            results = llm.generate(qwen3.prompts, params, use_tqdm=False, lora_request=lora_request)
            return [result.outputs[0].token_ids for result in results]

        assert answers(plain) == qwen3.answers["plain"]
        assert answers(rs) == qwen3.answers["rs"]  # there is room for one: the other goes
        assert answers(None) == qwen3.answers[None]
        mixed = answers([plain, None, plain, None])
        assert mixed == [qwen3.answers[name][i] for i, name in enumerate(("plain", None, "plain", None))]
        with pytest.raises(InvalidRequest, match="max_loras"):
            answers([plain, rs, None, None])
        with pytest.raises(InvalidRequest, match="4 prompts and 1"):
            answers([plain])


def test_adapters_count_in_the_memory_plan(qwen3: Case) -> None:
    with TestEngine(qwen3.model, max_loras=3, max_lora_rank=7) as engine:
        engine.engine.adapters.load("rs", str(qwen3.adapters["rs"]))
        [info] = engine.engine.adapters.infos()
        assert engine.engine.memory.parts["adapters"] == 3 * info.memory_bytes
