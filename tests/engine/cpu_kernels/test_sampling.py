"""The sampling kernels against the sampler without them: the same tokens for the same seeds, the same figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from powerband.core.params import SamplingParams
from powerband.engine.sampling.cpu import CpuSampling, use_cpu_sampling
from powerband.engine.sampling.logits import uniform
from powerband.engine.sampling.logprobs import token_logprobs
from powerband.engine.sampling.sampler import SampledValues, Sampler

VOCABS = [1, 63, 64, 65, 1000, 151_936]
DTYPES = [torch.float32, torch.bfloat16]
FEATURES = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 64, "temperature": 2.0},
    {"top_k": 900, "top_p": 0.9},
    {"top_k": 130_000, "top_p": 0.9},
    {"top_p": 0.95},
    {"top_p": 0.1, "temperature": 3.0},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 0.02, "top_p": 0.8, "top_k": 40},
]


def random(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def sampled(
    logits: torch.Tensor, params: list[SamplingParams], *, kernels: bool, known: int = 0, position: int = 0
) -> SampledValues:
    """One token of each row; `known` tokens, two thirds of them prompt, come before it."""
    vocab = logits.shape[1]
    sampler = Sampler(vocab, "cpu", seed=3)
    if kernels:
        use_cpu_sampling(sampler)
    histories = torch.randint(0, vocab, (len(params), known), generator=torch.Generator().manual_seed(7)).tolist()
    states = [sampler.new_state(str(i), p, histories[i], known * 2 // 3) for i, p in enumerate(params)]
    return sampler.sample(logits, states, [max(known, position)] * len(params)).values()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_chooses_what_the_reference_chooses(vocab: int, dtype: torch.dtype) -> None:
    rows = 6 if vocab < 10_000 else 1
    logits = random(rows * len(FEATURES), vocab, dtype)
    params = [SamplingParams(**features) for features in FEATURES for _ in range(rows)]
    found, expected = (sampled(logits, params, kernels=kernels) for kernels in (True, False))
    # Neighbours differ in the last bit of a weight only; see kernels/cpu/sampling.py.
    assert found.token_ids == expected.token_ids
    assert not found.failed


@pytest.mark.parametrize("features", [f for f in FEATURES if f.get("top_k", 0) <= 64], ids=str)
def test_ties_are_kept_and_chosen_as_the_reference_does(features: dict) -> None:
    logits = (random(300, 200, torch.float32) / 3 * 4).round() / 4
    params = [SamplingParams(**features)] * 300
    assert sampled(logits, params, kernels=True).token_ids == sampled(logits, params, kernels=False).token_ids


@pytest.mark.parametrize("features", [{}, {"top_p": 0.7}, {"top_k": 30}, {"min_p": 0.02}], ids=str)
def test_tokens_are_distributed_as_the_probabilities_say(features: dict) -> None:
    count = 20_000
    logits = random(1, 300, torch.float32)[0] / 2
    drawn = sampled(logits.expand(count, -1), [SamplingParams(**features)] * count, kernels=True).token_ids
    p = logits.double().softmax(0)
    order = p.argsort(descending=True)
    kept = torch.zeros(300, dtype=torch.bool)
    kept[order[: features.get("top_k", 300)]] = True
    kept[order[(p[order].cumsum(0) - p[order]) >= features.get("top_p", 1.0)]] = False
    kept &= p >= features.get("min_p", 0.0) * p.max()
    expected = (p * kept / p[kept].sum()).numpy() * count
    seen = np.bincount(drawn, minlength=300)
    assert not seen[expected == 0].any()
    common = expected >= 5
    groups, wanted = np.append(seen[common], seen[~common].sum()), np.append(expected[common], expected[~common].sum())
    assert stats.chisquare(groups[wanted > 0], wanted[wanted > 0]).pvalue > 1e-4


def test_uniform_numbers_are_the_references() -> None:
    """Equal logits make the token the uniform number's place among them."""
    vocab, position = 4096, 17
    params = [SamplingParams(seed=seed) for seed in (0, 42, -1, 2**63 - 1)]
    found = sampled(torch.zeros(4, vocab), params, kernels=True, position=position).token_ids
    assert found == [int(uniform(p.seed % 2**64, position) * vocab) for p in params if p.seed is not None]


EDITS = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.4},
    {"repetition_penalty": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"logit_bias": {0: 4.0, 5: -100.0}},
    {"allowed_token_ids": [3, 9, 12]},
    {"allowed_token_ids": [3, 9, 12], "logit_bias": {9: 5.0}, "repetition_penalty": 1.2},
    {"bad_words_token_ids": [[4], [5, 6], [7, 8, 9]]},
    {"min_tokens": 50, "stop_token_ids": [2], "eos_token_ids": [1]},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [13, 64, 1000])
@pytest.mark.parametrize("choice", [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 5}], ids=str)
def test_edits_logits_as_the_reference_does(vocab: int, dtype: torch.dtype, choice: dict) -> None:
    params = [SamplingParams(max_tokens=64, **edits, **choice) for edits in [*EDITS, {}] for _ in range(4)]
    logits = random(len(params), vocab, dtype)
    before = logits.clone()
    found, expected = (sampled(logits, params, kernels=kernels, known=30) for kernels in (True, False))
    assert found.token_ids == expected.token_ids
    assert torch.equal(logits, before)


def test_a_row_does_not_depend_on_its_neighbours_or_threads() -> None:
    params = [SamplingParams(**features) for features in FEATURES]
    logits = random(len(params), 5001, torch.bfloat16)
    together = sampled(logits, params, kernels=True).token_ids
    torch.set_num_threads(2)
    try:
        assert sampled(logits, params, kernels=True).token_ids == together
    finally:
        torch.set_num_threads(1)
    sampler = Sampler(5001, "cpu", seed=3)
    use_cpu_sampling(sampler)
    for i, p in enumerate(params):
        state = sampler.new_state(str(i), p, [], 0)
        assert sampler.sample(logits[i : i + 1], [state], [0]).values().token_ids == [together[i]]


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_numbers_fails_alone(value: float, features: dict) -> None:
    params = [SamplingParams(logprobs=2, **features)] * 5
    logits = random(5, 1000, torch.float32)
    healthy = sampled(logits, params, kernels=True)
    logits[2, 17] = value
    found = sampled(logits, params, kernels=True)
    assert list(found.failed) == [2]
    assert found.failed[2].code == "not_finite"
    assert 0 <= found.token_ids[2] < 1000
    assert [found.token_ids[i] for i in (0, 1, 3, 4)] == [healthy.token_ids[i] for i in (0, 1, 3, 4)]
    assert [found.logprobs[i] for i in (0, 1, 3, 4)] == [healthy.logprobs[i] for i in (0, 1, 3, 4)]


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_only_tokens_above_minus_infinity_are_chosen(features: dict) -> None:
    logits = torch.full((50, 1000), -math.inf)
    logits[:, [5, 999]] = 0.5
    found = sampled(logits, [SamplingParams(**features)] * 50, kernels=True)
    assert set(found.token_ids) <= {5, 999}
    assert not found.failed
    logits[7] = -math.inf
    assert list(sampled(logits, [SamplingParams(**features)] * 50, kernels=True).failed) == [7]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 5, 64])
@pytest.mark.parametrize("vocab", VOCABS)
def test_logprobs_are_the_references(vocab: int, count: int, dtype: torch.dtype) -> None:
    logits = random(5, vocab, dtype)
    if dtype is torch.float32:  # without ties, whose order is open
        logits += torch.linspace(0, 1e-3, vocab)
    own = torch.randint(0, vocab, (5,), generator=torch.Generator().manual_seed(1))
    ids, logprobs, ranks = CpuSampling().logprobs(logits, own, count)
    expected = token_logprobs(logits, own, count)
    torch.testing.assert_close(logprobs, expected.logprobs, rtol=1e-5, atol=2e-5)
    assert torch.equal(ranks, expected.ranks)
    torch.testing.assert_close(logits.gather(1, ids), logits.gather(1, expected.token_ids), rtol=0, atol=0)
    assert all(len(set(row[1:].tolist())) == len(row) - 1 for row in ids)


def test_no_rows() -> None:
    token_ids, peaks = CpuSampling().sample(torch.zeros(0, 100), [], [])
    assert token_ids.shape == peaks.shape == (0,)
    ids, logprobs, ranks = CpuSampling().logprobs(torch.zeros(0, 100), torch.zeros(0, dtype=torch.int64), 3)
    assert ids.shape == logprobs.shape == (0, 4)
    assert ranks.shape == (0,)


def arguments(**changes: torch.Tensor) -> list[torch.Tensor]:
    """Arguments of the operator for two rows of 10 logits."""
    good = {
        "logits": torch.zeros(2, 10),
        "params": torch.ones(2, 3, dtype=torch.float64),
        "numbers": torch.zeros(2, 3, dtype=torch.int64),
        "penalties": torch.ones(2, 3),
        "offsets": torch.tensor([[0, 1, 1, 2, 2, 2, 3, 0], [0, 1, 3, 3, 3, 3, 3, -1]]),
        "tokens": torch.tensor([1, 2, 3]),
        "biases": torch.zeros(3),
        "masks": torch.full((1, 1), -1, dtype=torch.int32),
    }
    return list((good | changes).values())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"logits": torch.zeros(10)}, "logits must be"),
        ({"logits": torch.zeros(3, 10)}, "params must be"),
        ({"params": torch.full((2, 3), math.nan, dtype=torch.float64)}, "temperature must be"),
        ({"numbers": torch.full((2, 3), -1)}, "top_k must not"),
        ({"numbers": torch.zeros(2, 2, dtype=torch.int64)}, "numbers must be"),
        ({"penalties": torch.ones(2, 2)}, "penalties must be"),
        ({"offsets": torch.tensor([[0, 1, 1, 2, 2, 2, 3, -1], [0, 1, 3, 3, 3, 3, 4, -1]])}, "offsets must ascend"),
        ({"offsets": torch.tensor([[0, 1, 1, 2, 1, 2, 3, -1], [0, 1, 3, 3, 3, 3, 3, -1]])}, "offsets must ascend"),
        ({"offsets": torch.tensor([[0, 4, 1, 2, 2, 2, 3, -1], [0, 1, 3, 3, 3, 3, 3, -1]])}, "offsets must ascend"),
        ({"offsets": torch.tensor([[0, 1, 1, 2, 2, 2, 3, 1], [0, 1, 3, 3, 3, 3, 3, -1]])}, "no such mask"),
        ({"masks": torch.zeros(1, dtype=torch.int32)}, "masks must be"),
        ({"offsets": torch.zeros(2, 5, dtype=torch.int64)}, "offsets must be"),
        ({"tokens": torch.tensor([1, 10, 3])}, "no such token"),
        ({"tokens": torch.tensor([1, -1, 3])}, "no such token"),
        ({"biases": torch.zeros(2)}, "equally long"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict, complaint: str) -> None:
    torch.ops.powerband.sample(*arguments())
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.powerband.sample(*arguments(**changes))


def test_refuses_tokens_that_are_not_there_in_logprobs() -> None:
    for token in (-1, 10):
        with pytest.raises(RuntimeError, match="no such token"):
            torch.ops.powerband.logprobs(torch.zeros(1, 10), torch.tensor([token]), 1)


def test_a_step_of_plain_greedy_rows_needs_only_the_heads_arg_max() -> None:
    sampler = Sampler(100, "cpu", seed=0)
    greedy = SamplingParams(temperature=0.0)
    others = [
        SamplingParams(),
        SamplingParams(temperature=0.0, logprobs=1),
        SamplingParams(temperature=0.0, logit_bias={1: 2.0}),
        SamplingParams(temperature=0.0, repetition_penalty=1.1),
    ]
    plain = sampler.new_state("a", greedy, [1], 1)
    assert sampler.wants_only_argmax([plain, plain])
    for i, params in enumerate(others):
        assert not sampler.wants_only_argmax([plain, sampler.new_state(str(i), params, [1], 1)])
    logits = random(2, 100, torch.bfloat16)
    logits[1, 3] = math.nan
    values, token_ids = logits.max(1)
    found = sampler.accept(token_ids, values).values()
    expected = sampler.sample(logits, [plain, plain], [1, 1]).values()
    assert found.token_ids[0] == expected.token_ids[0]
    assert list(found.failed) == list(expected.failed) == [1]
