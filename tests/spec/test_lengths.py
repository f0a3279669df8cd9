"""Distributions of token counts: drawn as they say, with the mean they say, against scipy."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest, lognorm

from powerband.errors import UsageError
from powerband.spec.workload.lengths import (
    MAX_TOKENS,
    Empirical,
    Fixed,
    LogNormal,
    Uniform,
    lengths_as_dict,
    lengths_from_dict,
    parse_lengths,
)

KINDS = [
    Fixed(512),
    Uniform(100, 200),
    LogNormal(500, 0.8),
    LogNormal(2, 1.0, high=50),
    LogNormal(600, 1.0, low=20, high=800),
    LogNormal(5.4, 0.0),
    LogNormal(10, 0.5, low=7, high=7),
    LogNormal(1000, 0.0, high=100),
    Empirical((10, 20, 400)),
    Empirical((5, 1, 9), (0.0, 2.5, 7.5)),
]


def drawn(lengths, number, seed=0):
    generator = random.Random(seed)
    return [lengths.draw(generator) for _ in range(number)]


@pytest.mark.parametrize("lengths", KINDS, ids=str)
def test_the_mean_is_that_of_what_is_drawn(lengths):
    sample = drawn(lengths, 20_000)
    assert lengths.mean == pytest.approx(np.mean(sample), abs=4 * np.std(sample) / math.sqrt(len(sample)) + 0.5)
    assert all(isinstance(length, int) and 1 <= length <= lengths.maximum for length in sample)


@pytest.mark.parametrize(
    "lengths",
    [LogNormal(2, 1.0, high=50), LogNormal(600, 1.0, low=20, high=800), LogNormal(30, 0.8, low=25, high=40)],
    ids=str,
)
def test_a_lognormals_mean_is_right_between_its_bounds(lengths):
    """Against the sum over every length of the probability that scipy gives it after rounding."""
    inner = np.arange(lengths.low, lengths.high)
    chance_of_more = lognorm(lengths.sigma, scale=lengths.median).sf(inner + 0.5)
    assert lengths.mean == pytest.approx(lengths.low + chance_of_more.sum(), abs=0.03)


def test_a_lognormal_is_drawn_as_one():
    assert kstest(drawn(LogNormal(1e6, 0.5), 3000), lognorm(0.5, scale=1e6).cdf).pvalue > 0.01


@pytest.mark.parametrize(
    ("lengths", "chances"),
    [
        (Uniform(3, 8), dict.fromkeys(range(3, 9), 1 / 6)),
        (Empirical((7, 3, 5, 3)), {7: 0.25, 3: 0.5, 5: 0.25}),
        (Empirical((1, 2, 3), (1, 0, 3)), {1: 0.25, 3: 0.75}),
    ],
)
def test_each_length_is_as_frequent_as_it_should_be(lengths, chances):
    found = Counter(drawn(lengths, 12_000))
    assert found.keys() == chances.keys()
    assert chisquare([found[k] for k in chances], [12_000 * p for p in chances.values()]).pvalue > 0.01


@pytest.mark.parametrize("lengths", KINDS[1:], ids=str)
def test_a_draw_takes_one_random_number(lengths):
    """So another distribution moves nothing that is drawn later."""
    ours, expected = random.Random(5), random.Random(5)
    lengths.draw(ours)
    expected.random()
    assert ours.getstate() == expected.getstate()


def test_a_long_list_of_weights_is_added_up_once():
    many = Empirical(tuple(range(1, 200_001)), (1.0,) * 200_000)
    assert np.mean(drawn(many, 5000)) == pytest.approx(many.mean, rel=0.05)  # minutes, if each draw did it


@pytest.mark.parametrize("lengths", KINDS, ids=str)
def test_they_come_back_from_json(lengths):
    assert lengths_from_dict(json.loads(json.dumps(lengths_as_dict(lengths))), param="prompt") == lengths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", Fixed(512)),
        (" 128 - 1024 ", Uniform(128, 1024)),
        ("lognormal:median=512,sigma=0.8", LogNormal(512, 0.8)),
        ("lognormal: median=512, sigma=0.8, low=16, high=4096", LogNormal(512, 0.8, 16, 4096)),
    ],
)
def test_lengths_are_written_as_people_write_them(text, expected):
    assert parse_lengths(text, param="prompt") == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-5",
        "5.5",
        "200-100",
        "99999999",
        "9" * 5000,
        "normal:mean=5",
        "lognormal",
        "lognormal:",
        "lognormal:median=512",
        "lognormal:median=512,sigma=0.8,",
        "lognormal:median=512,sigma=0.8,mode=3",
        "lognormal:median=512,median=5,sigma=0.8",
        "lognormal:median=512=3,sigma=0.8",
        "lognormal:median=nan,sigma=0.8",
        "lognormal:median=512,sigma=inf",
        "lognormal:median=512,sigma=0.8,high=1e4",
    ],
)
def test_what_is_no_length_names_the_option(text):
    with pytest.raises(UsageError) as caught:
        parse_lengths(text, param="output-tokens")
    assert caught.value.param == "output-tokens"
    assert caught.value.message.startswith("output-tokens is ")


@pytest.mark.parametrize(
    "values",
    [
        None,
        512,
        [512],
        {},
        {"kind": "normal"},
        {"kind": ["fixed"], "tokens": 5},
        {"kind": "fixed"},
        {"kind": "fixed", "tokens": "5"},
        {"kind": "fixed", "tokens": 5.0},
        {"kind": "fixed", "tokens": True},
        {"kind": "fixed", "tokens": MAX_TOKENS + 1},
        {"kind": "fixed", "tokens": 10**400},
        {"kind": "fixed", "tokens": 5, "most": 6},
        {"kind": "uniform", "low": 5, "high": 4},
        {"kind": "lognormal", "median": 10**400, "sigma": 1},
        {"kind": "lognormal", "median": "5", "sigma": 1},
        {"kind": "lognormal", "median": math.nan, "sigma": 1},
        {"kind": "empirical", "values": []},
        {"kind": "empirical", "values": [1, 2.5, 3]},
        {"kind": "empirical", "values": 7},
        {"kind": "empirical", "values": [1, 2], "weights": [1]},
        {"kind": "empirical", "values": [1, 2], "weights": [0, 0]},
        {"kind": "empirical", "values": [1, 2], "weights": [1, -1]},
        {"kind": "empirical", "values": [1, 2], "weights": [1, math.nan]},
        {"kind": "empirical", "values": [1, 2], "weights": [1, math.inf]},
        {"kind": "empirical", "values": [1, 2], "weights": ["1", 1]},
        {"kind": "empirical", "values": [1], "_cumulative": [1]},
    ],
    ids=str,
)
def test_what_is_no_distribution_names_where(values):
    with pytest.raises(UsageError) as caught:
        lengths_from_dict(values, param="prompt")
    assert caught.value.param == "prompt"
    assert len(caught.value.message) < 300


@given(
    median=st.floats(0.1, 1e6),
    sigma=st.floats(0, 10),
    bounds=st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)).map(sorted),
    seed=st.integers(0, 100),
)
def test_lengths_and_their_mean_stay_within_the_bounds(median, sigma, bounds, seed):
    low, high = bounds
    lengths = LogNormal(median, sigma, low, high)
    assert low * (1 - 1e-9) <= lengths.mean <= high * (1 + 1e-9)
    assert all(low <= length <= high for length in drawn(lengths, 20, seed))
