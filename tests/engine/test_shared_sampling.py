"""Many answers to one request, and parameters at their extremes: what they cost, and that they stay finite."""

from __future__ import annotations

import gc
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from powerband.core.params import MAX_BAD_WORD_TOKENS, SamplingParams
from powerband.core.request import EngineRequest
from powerband.engine.client.messages import MessageCodec, Submit, ToEngine
from powerband.engine.kernels.cpu import library
from powerband.engine.sampling.cpu import use_cpu_sampling
from powerband.engine.sampling.logits import BadWords
from powerband.engine.sampling.sampler import Sampler
from powerband.errors import InvalidRequest

CPU = torch.device("cpu")
VOCABULARY = 300


def plain_sampler() -> Sampler:
    return Sampler(VOCABULARY, "cpu", seed=1)


def kernel_sampler() -> Sampler:
    if library.load().tier == "off":
        pytest.skip("no compiler here")
    sampler = plain_sampler()
    use_cpu_sampling(sampler)
    return sampler


def choices(params: SamplingParams, prompts: list[list[int]]) -> list[EngineRequest]:
    """Each prompt n times, as the server makes them."""
    each = [params.for_choice(index) for index in range(params.n)]
    resumed: list[int] = []
    return [
        EngineRequest(id=f"{i}-{j}", token_ids=prompt, params=own, arrival_s=1.5, resumed_ids=resumed)
        for i, prompt in enumerate(prompts)
        for j, own in enumerate(each)
    ]


@pytest.mark.parametrize("seed", [None, 7])
def test_what_choices_share_crosses_to_the_engine_once(seed: int | None) -> None:
    params = SamplingParams(n=16, seed=seed, allowed_token_ids=list(range(60_000)))
    requests = choices(params, [[5] * 1000, [6] * 1000])
    [message] = Submit.of(requests)
    data = MessageCodec(ToEngine).encode(message)
    assert len(data) < 1.1 * len(msgspec.msgpack.encode(params)) + 2 * 1000 + 32 * 40
    received = list(MessageCodec(ToEngine).decode(data).requests())
    assert received == requests
    assert len({id(one.params.allowed_token_ids) for one in received}) == 1
    assert len({id(one.token_ids) for one in received}) == 2


def test_requests_that_differ_in_more_than_prompt_and_seed_are_sent_apart() -> None:
    one, two = choices(SamplingParams(n=2), [[1]])
    two.priority = 1
    other = choices(SamplingParams(temperature=0.5), [[2]])
    messages = Submit.of([one, two, *other])
    assert [list(message.requests()) for message in messages] == [[one], [two], other]


@pytest.mark.parametrize("make", [plain_sampler, kernel_sampler])
def test_states_whose_parameters_share_their_lists_share_their_tensors(make: Callable[[], Sampler]) -> None:
    sampler = make()
    params = SamplingParams(n=8, seed=3, allowed_token_ids=[7, 3, 7], logit_bias={3: 1.0}, bad_words_token_ids=[[3, 7]])
    states = [sampler.new_state(str(i), params.for_choice(i), [1, 2], 2) for i in range(8)]
    assert len({id(state.allowed) for state in states}) == 1
    found = sampler.sample(torch.randn(8, VOCABULARY), states, [2] * 8).values()
    assert set(found.token_ids) <= {3, 7}
    assert not found.failed
    del states
    gc.collect()
    assert not sampler._fixed, "nothing is kept once the requests have left"


def test_a_list_that_takes_the_place_of_one_that_is_gone_is_read_anew() -> None:
    sampler = plain_sampler()
    for allowed in range(50):
        state = sampler.new_state("r", SamplingParams(allowed_token_ids=[allowed]), [1], 1)
        assert sampler.sample(torch.randn(1, VOCABULARY), [state], [1]).values().token_ids == [allowed]


def test_bad_words_are_found_as_a_search_finds_them() -> None:
    rng = random.Random(5)
    for _ in range(200):
        words = [[rng.randrange(3) for _ in range(rng.randint(2, 6))] for _ in range(rng.randint(1, 6))]
        output = [rng.randrange(3) for _ in range(rng.randint(0, 9))]
        found = BadWords(words, CPU)
        window = torch.full((found.max_length,), -1)
        known = min(found.max_length, len(output))
        window[found.max_length - known :] = torch.tensor(output[len(output) - known :])
        wanted = [-math.inf if output[-len(word) + 1 :] == word[:-1] else 0.0 for word in words]
        assert found.biases(window).tolist() == wanted
        assert found.last.tolist() == [word[-1] for word in words]


def test_bad_words_are_bounded_together() -> None:
    word = list(range(64))
    most = MAX_BAD_WORD_TOKENS // 64
    SamplingParams(bad_words_token_ids=[word] * most)
    with pytest.raises(InvalidRequest, match="more than 4096 tokens together") as caught:
        SamplingParams(bad_words_token_ids=[word] * most + [[1]])
    assert caught.value.param == "bad_words"


def test_reading_bad_words_ends_at_the_bound() -> None:
    encoded = []

    def encode(text: str) -> list[int]:
        encoded.append(text)
        return list(range(len(text)))

    with pytest.raises(InvalidRequest, match="bad_words"):
        SamplingParams(bad_words=["x" * 250] * 256).with_bad_word_ids(encode)
    assert len(encoded) < 40


EXTREMES: dict[str, list[Any]] = {
    "temperature": [0, 5e-324, 1e-39, 9.9e-6, 1e-5, 100],
    "top_p": [5e-324, 1e-300, 1e-45, 1e-39, 1e-8, 0.99999999999],
    "min_p": [5e-324, 1e-300, 1e-45, 1e-39, 1e-8, 1],
    "repetition_penalty": [0.01, 100],
    "presence_penalty": [-2, -5e-324, 1e-39, 2],
    "frequency_penalty": [-2, -5e-324, 1e-39, 2],
    "top_k": [1, 64, 65, 299, 300, 2**31 - 1],
    "logit_bias": [{5: 5e-324}, dict.fromkeys(range(300), -100), {5: 100}],
}


@pytest.mark.parametrize("make", [plain_sampler, kernel_sampler])
def test_no_value_that_is_accepted_makes_logits_that_are_not_numbers(make: Callable[[], Sampler]) -> None:
    sampler = make()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, VOCABULARY, generator=generator)
    kinds = torch.cat([3 * noise, 0 * noise, 1e4 * noise, -1e5 * noise.abs()])
    pairs = [
        {one: x, other: y}
        for one, other in itertools.combinations(EXTREMES, 2)
        for x in EXTREMES[one]
        for y in EXTREMES[other]
    ]
    for fields in pairs:
        states = [sampler.new_state("r", SamplingParams(**fields), [1, 2, 3, 5], 2)] * len(kinds)
        found = sampler.sample(kinds, states, [4] * len(kinds)).values()
        assert not found.failed, fields
        assert all(0 <= id < VOCABULARY for id in found.token_ids), fields


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e-39, 0.0099])
def test_a_penalty_that_leaves_float32_is_refused(penalty: float) -> None:
    with pytest.raises(InvalidRequest, match=r"it must be between 0\.01 and 100") as caught:
        SamplingParams(repetition_penalty=penalty)
    assert caught.value.param == "repetition_penalty"


def test_choices_take_seeds_in_a_row_and_share_everything_else() -> None:
    params = SamplingParams(n=3, seed=2**63 - 2, stop=["x"], temperature=0.5)
    each = [params.for_choice(index) for index in range(3)]
    assert [one.seed for one in each] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert {one.n for one in each} == {1}
    assert {id(one.stop) for one in each} == {id(params.stop)}
    unseeded = SamplingParams(n=1)
    assert unseeded.for_choice(5) is unseeded
