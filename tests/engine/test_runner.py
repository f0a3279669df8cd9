"""Steps on a device: one bad request fails alone, log-probabilities are the model's own, nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines_for_tests import TestEngine
from models_for_tests import VOCAB_SIZE, random_model, save

from powerband.core.step import FinishReason, TokenOutput
from powerband.engine.executor.batch import Inputs

GOOD = [[3, 1, 4, 1, 5], [9, 2, 6] * 9, list(range(40))]
POISON = 150  # a token that only bad requests use


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("qwen3", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(params=[False, True], ids=["in_turn", "overlapped"])
def engine(folder: Path, request: pytest.FixtureRequest) -> Iterator[TestEngine]:
    with TestEngine(folder, async_scheduling=request.param) as engine:
        yield engine


def poison(engine: TestEngine) -> None:
    with torch.inference_mode():
        engine.engine.executor.runner.model.embedding.weight[POISON] = float("nan")


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def run_with_a_bad_one(engine: TestEngine, bad_prompt: list[int], **bad_params: Any) -> TokenOutput:
    """Good requests before and after a bad one, all at once: the bad one's last output. The others are as ever."""
    expected = engine.generate(GOOD)
    engine.engine.scheduler.reset_prefix_cache()
    first = engine.add(GOOD[0])
    bad = engine.add(bad_prompt, **bad_params)
    others = [engine.add(prompt) for prompt in GOOD[1:]]
    outputs = engine.run()
    assert [tokens(outputs[id]) for id in [first, *others]] == expected
    assert engine.engine.scheduler.kv.usage().num_used == 0
    return outputs[bad][-1]


def test_token_outside_the_vocabulary_fails_alone(engine: TestEngine) -> None:
    last = run_with_a_bad_one(engine, [1, 2, VOCAB_SIZE])
    assert last.finish_reason is FinishReason.ERROR
    assert last.error is not None
    assert (last.error.code, last.error.http_status) == ("invalid_request", 400)
    assert f"0 to {VOCAB_SIZE - 1}" in last.error.message


def test_parameter_outside_the_vocabulary_fails_alone(engine: TestEngine) -> None:
    last = run_with_a_bad_one(engine, [1, 2, 3], logit_bias={VOCAB_SIZE + 7: 1.0})
    assert last.error is not None
    assert "logit_bias" in last.error.message


def test_output_that_is_not_a_number_fails_alone(engine: TestEngine) -> None:
    poison(engine)
    last = run_with_a_bad_one(engine, [1, POISON, 3])
    assert last.error is not None
    assert last.error.code == "not_finite"


def test_blocks_of_a_failed_request_are_safe_to_reuse(folder: Path) -> None:
    with TestEngine(folder, max_model_len=64, kv_cache_memory="128KiB") as engine:
        expected = engine.generate(GOOD)
        engine.engine.scheduler.reset_prefix_cache()
        poison(engine)
        for start in range(20):
            bad = engine.add([POISON, *range(start, start + 40)])
            assert engine.run()[bad][-1].error is not None
        assert engine.generate(GOOD) == expected


def test_exception_in_the_forward_pass_fails_those_at_fault_only(engine: TestEngine) -> None:
    runner = engine.engine.executor.runner
    forward = runner.forward

    def breaks_on_poison(inputs: Inputs) -> torch.Tensor:
        if (inputs.token_ids == POISON).any():
            raise RuntimeError("planted")
        return forward(inputs)

    runner.forward = breaks_on_poison
    last = run_with_a_bad_one(engine, [1, POISON, 3])
    assert last.error is not None
    assert "planted" in last.error.message


def test_states_of_finished_requests_are_forgotten(engine: TestEngine) -> None:
    engine.generate(GOOD)
    engine.generate([[1, 2, 3]], max_tokens=1)
    assert len(engine.engine.executor.runner._states) <= 1  # the last is dropped with the next step


@pytest.mark.parametrize("budget", [512, 16])
def test_prompt_logprobs_are_those_of_transformers(folder: Path, model: Any, budget: int) -> None:
    prompt = torch.randint(0, VOCAB_SIZE, (50,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    with TestEngine(folder, max_num_batched_tokens=budget) as engine:
        id = engine.add(prompt, prompt_logprobs=2, max_tokens=3)
        rows = [row for output in engine.run()[id] for row in output.prompt_logprobs or []]
    assert [row.token_ids[0] for row in rows] == prompt[1:]
    actual = torch.tensor([row.logprobs[0] for row in rows])
    torch.testing.assert_close(
        actual, expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0], rtol=1e-4, atol=1e-4
    )
    assert [row.token_ids[1:] for row in rows] == expected[:-1].topk(2).indices.tolist()


def test_prompt_logprobs_are_complete_although_the_prefix_is_cached(engine: TestEngine) -> None:
    prompt = list(range(60))
    engine.generate([prompt])
    id = engine.add(prompt, prompt_logprobs=0)
    rows = [row for output in engine.run()[id] for row in output.prompt_logprobs or []]
    assert [row.token_ids[0] for row in rows] == prompt[1:]


def test_logprobs_are_those_of_transformers(engine: TestEngine, model: Any) -> None:
    id = engine.add(GOOD[2], logprobs=3, max_tokens=6)
    outputs = engine.run()[id]
    sequence = torch.tensor([GOOD[2] + tokens(outputs)])
    with torch.no_grad():
        expected = model(sequence).logits[0].log_softmax(-1)
    for index, entry in enumerate(entry for output in outputs for entry in output.logprobs or []):
        best = expected[len(GOOD[2]) - 1 + index].topk(3)
        assert entry.token_ids[1:] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor(entry.logprobs[1:]), best.values, rtol=1e-4, atol=1e-4)


def test_sampled_tokens_do_not_depend_on_company_or_overlap(folder: Path) -> None:
    asked = {"temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "seed": 4, "max_tokens": 12}
    with TestEngine(folder) as engine:
        alone = engine.generate([GOOD[0]], **asked)[0]
    with TestEngine(folder, async_scheduling=True, max_num_batched_tokens=24) as engine:
        assert engine.generate(GOOD, **asked)[0] == alone


def test_overlap_really_keeps_two_steps_in_flight(folder: Path) -> None:
    with TestEngine(folder, async_scheduling=True) as engine:
        core = engine.engine.core
        engine.add(GOOD[0], max_tokens=8)
        deepest = 0
        while engine.inbox.commands or core.busy:
            core.step()
            deepest = max(deepest, len(core.inflight))
        assert (engine.engine.executor.depth, engine.engine.executor.relay, deepest) == (2, 1, 1)
