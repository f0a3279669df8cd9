"""Masks, biases and penalties against transformers' LogitsProcessors; log-probabilities against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from powerband.core.params import SamplingParams
from powerband.engine.sampling.logits import LogitsEditor, SamplingState
from powerband.engine.sampling.logprobs import prompt_logprobs
from powerband.engine.sampling.sampler import Sampler

torch.set_num_threads(1)
CPU = torch.device("cpu")
VOCAB = 300
PROMPT = [5, 9, 5, 200]
OUTPUT = [7, 9, 7, 7, 31]


def logits(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def edited(params: SamplingParams, prompt: list[int] = PROMPT, output: list[int] = OUTPUT) -> torch.Tensor:
    state = SamplingState("r", params, prompt + output, len(prompt), engine_seed=0, device=CPU)
    values = logits()
    LogitsEditor(CPU).edit(values, [state], [len(prompt) + len(output)])
    return values[0]


def by_transformers(*processors, ids: list[int] = PROMPT + OUTPUT) -> torch.Tensor:
    return LogitsProcessorList(processors)(torch.tensor([ids]), logits())[0]


def test_repetition_penalty_covers_prompt_and_output() -> None:
    expected = by_transformers(RepetitionPenaltyLogitsProcessor(1.4))
    assert torch.equal(edited(SamplingParams(repetition_penalty=1.4)), expected)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    counts = torch.bincount(torch.tensor(OUTPUT), minlength=VOCAB).float()
    expected = logits()[0] - 0.7 * counts - 0.4 * (counts > 0)
    torch.testing.assert_close(edited(SamplingParams(frequency_penalty=0.7, presence_penalty=0.4)), expected)
    assert torch.equal(edited(SamplingParams(frequency_penalty=0.7), output=[]), logits()[0])


def test_all_penalties_together_apply_repetition_first() -> None:
    counts = torch.bincount(torch.tensor(OUTPUT), minlength=VOCAB).float()
    expected = by_transformers(RepetitionPenaltyLogitsProcessor(0.8)) + 1.1 * counts - 0.4 * (counts > 0)
    params = SamplingParams(repetition_penalty=0.8, frequency_penalty=-1.1, presence_penalty=0.4)
    torch.testing.assert_close(edited(params), expected)


@pytest.mark.parametrize(
    "words", [[[3]], [[7, 31, 4]], [[31, 4], [31, 8], [9, 4]], [[9, 7, 7, 31, 8], [2], [31, 2]]], ids=str
)
def test_bad_words_are_forbidden_once_their_beginning_is_there(words: list[list[int]]) -> None:
    expected = by_transformers(NoBadWordsLogitsProcessor(words, eos_token_id=[]))
    assert torch.equal(edited(SamplingParams(bad_words_token_ids=words)), expected)


def test_a_bad_word_does_not_begin_in_the_prompt() -> None:
    params = SamplingParams(bad_words_token_ids=[[200, 7], [5, 200, 7]])
    assert torch.equal(edited(params, output=[]), logits()[0])


@pytest.mark.parametrize("num_output", [0, 4, 5, 6])
def test_min_tokens_holds_back_eos_and_stop_tokens(num_output: int) -> None:
    output = list(range(50, 50 + num_output))
    processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, eos_token_id=[2, 17, 40])
    params = SamplingParams(min_tokens=5, stop_token_ids=[17, 40], eos_token_ids=[2], ignore_eos=True)
    assert torch.equal(edited(params, output=output), by_transformers(processor, ids=PROMPT + output))


def test_logit_bias_is_added() -> None:
    expected = by_transformers(SequenceBiasLogitsProcessor([[[4], 2.5], [[299], -100.0]]))
    assert torch.equal(edited(SamplingParams(logit_bias={4: 2.5, 299: -100})), expected)


def test_only_allowed_tokens_remain() -> None:
    values = edited(SamplingParams(allowed_token_ids=[9, 4, 4], logit_bias={9: 1.0}))
    assert torch.isfinite(values).nonzero().flatten().tolist() == [4, 9]
    assert values[9] == logits()[0, 9] + 1.0


def test_rows_do_not_touch_each_other() -> None:
    every = [
        SamplingParams(repetition_penalty=1.4, frequency_penalty=0.5),
        SamplingParams(),
        SamplingParams(presence_penalty=-0.5, bad_words_token_ids=[[31, 3]]),
        SamplingParams(allowed_token_ids=[1, 2], min_tokens=9, eos_token_ids=[1]),
    ]
    states = [
        SamplingState(str(i), params, PROMPT + OUTPUT, len(PROMPT), engine_seed=0, device=CPU)
        for i, params in enumerate(every)
    ]
    values = logits().repeat(len(every), 1)
    editor = LogitsEditor(CPU)
    for _ in range(2):  # the scratch buffer is clean again
        values = logits().repeat(len(every), 1)
        editor.edit(values, states, [len(PROMPT) + len(OUTPUT)] * len(every))
    for row, params in zip(values, every, strict=True):
        assert torch.equal(row, edited(params))


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 7, "temperature": 0.7},
        {"top_p": 0.8, "temperature": 1.5},
        {"min_p": 0.03, "temperature": 1.2},
        {"top_k": 40, "top_p": 0.9},
        {"top_k": 100, "top_p": 0.6, "temperature": 2.0},
    ],
    ids=str,
)
def test_transformers_keeps_the_same_tokens(filters: dict) -> None:
    params = SamplingParams(seed=3, **filters)
    warpers = [TemperatureLogitsWarper(params.temperature)]
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    sampler = Sampler(VOCAB, "cpu", seed=0)
    state = sampler.new_state("r", params, [1], 1)
    for seed in range(3):
        kept = LogitsProcessorList(warpers)(torch.tensor([[1]]), logits(seed))[0].softmax(0)
        count = 4000
        drawn = sampler.sample(logits(seed).expand(count, -1), [state] * count, list(range(1, count + 1))).values()
        seen = np.bincount(drawn.token_ids, minlength=VOCAB) / count
        assert not seen[kept.numpy() == 0].any()
        assert abs(seen - kept.numpy()).max() < 5 * math.sqrt(0.25 / count)


def run_ahead(params: SamplingParams, steps: int, *, overlap: bool) -> list[int]:
    """Sample `steps` tokens; with `overlap`, no value comes to the host before the end."""
    sampler = Sampler(VOCAB, "cpu", seed=0)
    state = sampler.new_state("r", params, PROMPT, len(PROMPT))
    sampled, tokens = [], []
    for step in range(steps):
        sampled.append(sampler.sample(logits(step % 3), [state], [len(PROMPT) + step]))
        if not overlap:
            tokens += sampled[-1].values().token_ids
            if step % 5 == 4:  # preempted and resumed
                state = sampler.new_state("r", params, PROMPT + tokens, len(PROMPT))
    return [one.values().token_ids[0] for one in sampled]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, repetition_penalty=1.8, max_tokens=8),
        SamplingParams(frequency_penalty=1.0, presence_penalty=0.5, max_tokens=None, seed=1, top_p=0.9),
        SamplingParams(bad_words_token_ids=[[a, b] for a in range(0, 256, 5) for b in range(9)], seed=2, top_k=3),
        SamplingParams(min_tokens=10, stop_token_ids=list(range(0, 300, 2)), max_tokens=30, seed=3),
    ],
    ids=["repetition", "frequency", "bad_words", "min_tokens"],
)
def test_values_unknown_to_the_host_and_preemption_change_nothing(params: SamplingParams) -> None:
    assert run_ahead(params, 400, overlap=True) == run_ahead(params, 400, overlap=False)


def test_logprobs_are_the_models_own_with_rank_and_alternatives() -> None:
    sampler = Sampler(VOCAB, "cpu", seed=0)
    every = [
        SamplingParams(logprobs=5, temperature=2.0, logit_bias={250: 100.0}),
        SamplingParams(),
        SamplingParams(logprobs=0, temperature=0.0),
        SamplingParams(logprobs=20, top_p=0.5, repetition_penalty=1.5),
    ]
    values = logits(0, 4)
    states = [sampler.new_state(str(i), params, [1], 1) for i, params in enumerate(every)]
    result = sampler.sample(values, states, [1] * 4).values()
    assert result.token_ids[0] == 250
    assert result.logprobs[1] is None
    for i in (0, 2, 3):
        exact = values[i].double().log_softmax(0)
        entry = result.logprobs[i]
        assert entry is not None
        token = result.token_ids[i]
        top = exact.argsort(descending=True)[: every[i].logprobs].tolist()
        assert entry.token_ids == [token, *top]
        assert entry.logprobs == pytest.approx(exact[entry.token_ids].tolist(), abs=1e-5)
        assert entry.rank == int((exact > exact[token]).sum()) + 1


def test_prompt_logprobs_need_the_head_for_few_positions_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(150, 16, generator=generator), torch.randn(16, VOCAB, generator=generator)
    tokens = torch.randint(0, VOCAB, (150,), generator=generator).tolist()
    sizes = []

    def project(some: torch.Tensor) -> torch.Tensor:
        sizes.append(len(some))
        return some @ head

    rows = prompt_logprobs(hidden, project, tokens, 3)
    exact = (hidden @ head).double().log_softmax(1)
    assert max(sizes) <= 64
    assert [row.token_ids[0] for row in rows] == tokens
    for i, row in enumerate(rows):
        assert row.logprobs == pytest.approx(exact[i, row.token_ids].tolist(), abs=1e-4)
        assert row.token_ids[1:] == exact[i].argsort(descending=True)[:3].tolist()
        assert row.rank == int((exact[i] > exact[i, tokens[i]]).sum()) + 1
