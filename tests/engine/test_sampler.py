"""The sampler against a plain float64 full-sort reference, chi-square, and itself under other circumstances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from powerband.core.params import SamplingParams
from powerband.engine.sampling import ops
from powerband.engine.sampling.logits import uniform
from powerband.engine.sampling.sampler import Sampler

torch.set_num_threads(1)
VOCAB = 1000  # not a multiple of the block of 64


def reference_kept(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Probabilities of one row by definition: min_p, then top_k, then top_p, each keeping ties."""
    x = logits.astype(np.float64) / p.temperature
    weights = np.exp(x - x.max())
    weights[weights < p.min_p] = 0
    if p.top_k > 0:
        weights[weights < np.sort(weights)[::-1][min(p.top_k, len(weights)) - 1]] = 0
    if p.top_p < 1:
        descending = np.sort(weights)[::-1]
        greater = np.cumsum(descending) - descending
        weights[weights < descending[greater < p.top_p * weights.sum()].min()] = 0
    return weights / weights.sum()


def draw(logits: torch.Tensor, params: SamplingParams, count: int, device: str = "cpu") -> np.ndarray:
    """`count` tokens for one row, at `count` positions."""
    sampler = Sampler(logits.shape[-1], device, seed=0)
    state = sampler.new_state("r", params, [1], 1)
    tokens = []
    for start in range(0, count, 2000):
        positions = list(range(start + 1, min(start + 2000, count) + 1))
        rows = logits.expand(len(positions), -1)
        tokens += sampler.sample(rows, [state] * len(positions), positions).values().token_ids
    return np.array(tokens)


def row(seed: int, scale: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


FILTERS = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 64, "temperature": 3.0},
    {"top_k": 65, "temperature": 3.0},
    {"top_k": 900, "top_p": 0.8},
    {"top_k": 2000},
    {"top_p": 0.9},
    {"top_p": 0.1, "temperature": 5.0},
    {"top_p": 1e-6},
    {"top_p": 0.999, "temperature": 2.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.05, "top_p": 0.8},
    {"min_p": 0.02, "top_k": 15, "top_p": 0.7, "temperature": 1.7},
    {"min_p": 0.001, "top_k": 200, "top_p": 0.95, "temperature": 1.7},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_tokens_are_distributed_as_the_definition_says(filters: dict) -> None:
    params = SamplingParams(seed=7, **filters)
    logits = row(1)
    expected = reference_kept(logits.numpy(), params)
    count = 10_000
    seen = np.bincount(draw(logits, params, count), minlength=VOCAB)
    assert not seen[expected == 0].any()
    common = expected * count >= 5
    groups = [*(seen[common]), seen[~common].sum()]
    wanted = [*(expected[common] * count), expected[~common].sum() * count]
    if wanted[-1] < 5:
        groups, wanted = groups[:-1], wanted[:-1]
    if len(groups) > 1:
        wanted = np.array(wanted) * sum(groups) / sum(wanted)
        assert stats.chisquare(groups, wanted).pvalue > 1e-4


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_exactly_the_kept_tokens_can_be_drawn(filters: dict) -> None:
    """Steps of 1/8 in the logits make many ties; every kept token is reached, and no other."""
    for seed in range(2):
        logits = (row(seed, 1.0, 200) * 8).round() / 8
        params = SamplingParams(seed=seed, **filters)
        kept = set(np.flatnonzero(reference_kept(logits.numpy(), params)).tolist())
        drawn = set(draw(logits, params, 6_000).tolist())
        assert drawn <= kept
        assert len(kept) > 40 or drawn == kept


@pytest.mark.parametrize("top_k", [None, 3, 30, 300])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("min_p", [0.0, 0.01])
def test_sorting_draws_in_exact_proportion(top_k: int | None, top_p: float, min_p: float) -> None:
    """The method for GPUs and for large top_k, given evenly spaced uniform numbers: no count is off by more than 1."""
    params = SamplingParams(top_k=top_k or 0, top_p=top_p, min_p=min_p)
    logits, count = row(4, 2.0, 640), 2000
    like = [torch.full((count,), value, dtype=torch.float64) for value in (top_p, min_p)]
    limits = torch.full((count,), top_k or 640)
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    rows = logits.repeat(count, 1)
    drawn = ops.draw_sorted(rows, torch.empty_like(rows), top_k or 640, limits, *like, lambda _: even)
    expected = reference_kept(logits.numpy(), params) * count
    assert abs(np.bincount(drawn, minlength=640) - expected).max() <= 1.01


def mixed_params(count: int) -> list[SamplingParams]:
    features = [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"top_p": 0.9, "logprobs": 3},
        {"top_k": 10, "frequency_penalty": 0.5},
        {"temperature": 1.3, "min_p": 0.01},
        {"top_k": 300, "top_p": 0.5, "presence_penalty": 0.7},
        {"logit_bias": {5: 4.0, 9: -100.0}},
        {"allowed_token_ids": [3, 5, 8], "logprobs": 0},
        {"bad_words_token_ids": [[4], [5, 6], [7, 8, 9]]},
        {"min_tokens": 5, "stop_token_ids": [2], "eos_token_ids": [1]},
    ]
    return [SamplingParams(seed=i, max_tokens=64, **features[i % len(features)]) for i in range(count)]


def test_a_token_does_not_depend_on_the_batch() -> None:
    count = 200
    sampler = Sampler(VOCAB, "cpu", seed=0)
    params = mixed_params(count)
    logits = torch.stack([row(i) for i in range(count)])
    prompts = [[(i * 7 + j) % VOCAB for j in range(i % 9 + 3)] for i in range(count)]
    positions = [len(prompt) for prompt in prompts]

    def sample(rows: list[int]) -> list[int]:
        states = [sampler.new_state(str(i), params[i], prompts[i], 2) for i in rows]
        return sampler.sample(logits[rows], states, [positions[i] for i in rows]).values().token_ids

    together = sample(list(range(count)))
    assert [sample([i])[0] for i in range(count)] == together
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    assert sample(shuffled) == [together[i] for i in shuffled]


def test_large_vocabulary_rows_agree_alone_and_together_under_threads() -> None:
    torch.set_num_threads(2)
    try:
        vocab = 20_011
        sampler = Sampler(vocab, "cpu", seed=3)
        logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(0))
        for filters in ({}, {"top_p": 0.9}, {"top_k": 50}, {"top_k": 500}, {"min_p": 0.01}):
            params = SamplingParams(**filters)
            states = [sampler.new_state(str(i), params, [1], 1) for i in range(8)]
            for position in range(1, 5):
                together = sampler.sample(logits, states, [position] * 8).values().token_ids
                alone = [
                    sampler.sample(logits[i : i + 1], states[i : i + 1], [position]).values().token_ids[0]
                    for i in range(8)
                ]
                assert together == alone
    finally:
        torch.set_num_threads(1)


def test_same_seed_same_tokens_and_no_seed_depends_on_engine_and_request() -> None:
    logits = row(0).expand(50, -1)

    def tokens(engine_seed: int, request_id: str, seed: int | None) -> list[int]:
        sampler = Sampler(VOCAB, "cpu", seed=engine_seed)
        state = sampler.new_state(request_id, SamplingParams(seed=seed), [1], 1)
        return sampler.sample(logits, [state] * 50, list(range(1, 51))).values().token_ids

    assert tokens(0, "a", 5) == tokens(1, "b", 5)
    assert tokens(0, "a", 5) != tokens(0, "a", 6)
    assert tokens(0, "a", None) == tokens(0, "a", None)
    assert tokens(0, "a", None) != tokens(0, "b", None)
    assert tokens(0, "a", None) != tokens(1, "a", None)
    assert tokens(0, "a", -1) == tokens(0, "b", -1)


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    numbers = np.array([[uniform(seed, position) for position in range(500)] for seed in range(200)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.01


def test_uniform_never_changes() -> None:
    """Seeded outputs that users stored must come again in later versions."""
    assert [uniform(0, 0), uniform(42, 7), uniform(2**64 - 1, 100_000, 3)] == [
        0.13870941014555171,
        0.08054066123479231,
        0.3025390940473365,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [3, 64, 1000, 1024])
def test_greedy_takes_the_lowest_of_the_largest(dtype: torch.dtype, vocab: int) -> None:
    logits = (torch.randn(40, vocab, generator=torch.Generator().manual_seed(0)) * 2).round().to(dtype)
    sampler = Sampler(vocab, "cpu", seed=0)
    state = sampler.new_state("r", SamplingParams(temperature=0.0), [1], 1)
    tokens = sampler.sample(logits, [state] * 40, [1] * 40).values().token_ids
    values = logits.float().numpy()
    assert tokens == [int(np.flatnonzero(v == v.max())[0]) for v in values]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("filters", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 5}, {"top_k": 500}], ids=str)
def test_a_row_that_is_not_numbers_fails_alone(value: float, filters: dict) -> None:
    sampler = Sampler(VOCAB, "cpu", seed=0)
    logits = torch.stack([row(i) for i in range(5)])
    params = SamplingParams(logprobs=2, **filters)
    states = [sampler.new_state(str(i), params, [1], 1) for i in range(5)]
    healthy = sampler.sample(logits, states, [1] * 5).values()
    logits[2, 17] = value
    sampled = sampler.sample(logits, states, [1] * 5)
    result = sampled.values()
    assert list(result.failed) == [2]
    assert result.failed[2].code == "not_finite"
    assert 0 <= result.token_ids[2] < VOCAB
    others = [0, 1, 3, 4]
    assert [result.token_ids[i] for i in others] == [healthy.token_ids[i] for i in others]
    assert [result.logprobs[i] for i in others] == [healthy.logprobs[i] for i in others]


def test_a_request_that_forbids_everything_fails_and_says_so() -> None:
    sampler = Sampler(VOCAB, "cpu", seed=0)
    params = SamplingParams(allowed_token_ids=[4], min_tokens=2, stop_token_ids=[4])
    states = [sampler.new_state("a", params, [1], 1), sampler.new_state("b", SamplingParams(), [1], 1)]
    result = sampler.sample(torch.stack([row(0), row(1)]), states, [1, 1]).values()
    assert list(result.failed) == [0]
    assert "allowed_token_ids" in result.failed[0].message


def test_masked_logits_of_the_model_itself_are_no_failure() -> None:
    sampler = Sampler(VOCAB, "cpu", seed=0)
    logits = row(0).expand(2, -1).clone()
    logits[:, 10:] = -math.inf
    params = [SamplingParams(temperature=0.0), SamplingParams()]
    states = [sampler.new_state(str(i), p, [1], 1) for i, p in enumerate(params)]
    result = sampler.sample(logits, states, [1, 1]).values()
    assert not result.failed
    assert max(result.token_ids) < 10


def test_sampling_leaves_the_logits_as_they_were() -> None:
    sampler = Sampler(1024, "cpu", seed=0)
    logits = torch.randn(10, 1024)
    before = logits.clone()
    params = mixed_params(10)
    sampler.sample(logits, [sampler.new_state(str(i), p, [1, 2], 1) for i, p in enumerate(params)], [2] * 10)
    assert torch.equal(logits, before)
