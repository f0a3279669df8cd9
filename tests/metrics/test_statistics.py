"""Intervals and effects against scipy, against brute force, and by how often they hold."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, linregress, norm

from powerband.metrics.shown import share_text
from powerband.metrics.statistics import (
    MIN_FOR_INTERVAL,
    bootstrap,
    cliffs_delta,
    min_samples,
    percentile_interval,
    slope_per_s,
    wilson,
    z_of,
)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_a_two_sided_interval_reaches_as_far_as_scipys(confidence):
    assert z_of(confidence) == pytest.approx(norm.interval(confidence)[1])


@given(trials=st.integers(1, 5000), share=st.floats(0, 1), confidence=st.sampled_from([0.9, 0.95, 0.99]))
def test_wilsons_interval_is_scipys(trials, share, confidence):
    successes = round(share * trials)
    theirs = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert wilson(successes, trials, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("trials", [1, 60, 528, 4999])
def test_an_interval_of_all_or_none_holds_that_share_exactly(trials):
    assert wilson(trials, trials)[1] == 1.0
    assert wilson(0, trials)[0] == 0.0
    assert share_text(wilson(trials, trials)[1]) == "100 %"


def test_without_trials_every_share_is_possible():
    assert wilson(0, 0) == (0.0, 1.0)


def coverage(n, q):
    """Exact: how often the interval of n samples holds the percentile. Between two ranks it does when as many samples
    lie below the percentile, which is binomial.
    """
    low, high = percentile_interval(range(1, n + 1), q)
    return binom.cdf(high - 1, n, q / 100) - binom.cdf(low - 1, n, q / 100)


@pytest.mark.parametrize("q", [50.0, 90.0, 95.0, 99.0])
def test_an_interval_of_a_percentile_holds_what_it_says(q):
    fewest = max(min_samples(q), MIN_FOR_INTERVAL)
    sizes = [*range(fewest, fewest + 60), *np.geomspace(fewest + 60, 20_000, 40).astype(int)]
    found = [coverage(n, q) for n in sizes]
    assert min(found) > 0.945
    assert np.mean(found) < 0.975  # and is no wider than it must be
    assert coverage(min_samples(q) // 2 or 1, q) < 0.95  # which is why fewer are not told


def test_the_interval_holds_in_a_simulation():
    generator = np.random.default_rng(0)
    truth = -math.log(0.05)
    runs = np.sort(generator.exponential(size=(2000, 200)), axis=1)
    held = sum(low <= truth <= high for low, high in (percentile_interval(run, 95.0) for run in runs))
    assert held / 2000 == pytest.approx(coverage(200, 95.0), abs=0.015)


def test_five_samples_must_lie_beyond_a_percentile():
    assert [min_samples(q) for q in (0.0, 50.0, 90.0, 95.0, 99.0, 99.9)] == [1, 1, 50, 100, 500, 5000]


def difference_of_means(first, second):
    return sum(second) / len(second) - sum(first) / len(first)


def test_a_bootstrap_interval_holds_the_difference_of_means(monkeypatch):
    monkeypatch.setattr("powerband.metrics.statistics._BOOTSTRAP_SAMPLES", 400)  # of 2000, a hundred times
    generator = np.random.default_rng(1)
    held = 0
    for number in range(100):
        first, second = generator.exponential(1.0, 40), generator.exponential(1.5, 60)
        low, high = bootstrap(first.tolist(), second.tolist(), difference_of_means, paired=False, seed=number)
        held += low <= 0.5 <= high
    assert 88 <= held <= 99


def test_pairs_tell_more_than_the_same_samples_apart():
    generator = np.random.default_rng(2)
    first = generator.exponential(1.0, 100)
    second = first + generator.normal(0.1, 0.01, 100)
    paired, apart = (
        bootstrap(first.tolist(), second.tolist(), difference_of_means, paired=paired) for paired in (True, False)
    )
    assert 0.09 < paired[0] < 0.1 < paired[1] < 0.11
    assert apart[1] - apart[0] > 10 * (paired[1] - paired[0])


def test_the_same_seed_is_the_same_interval():
    first, second = [1.0, 2.0, 5.0], [2.0, 2.5, 9.0]
    one, same, other = (bootstrap(first, second, difference_of_means, paired=False, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one != other


def test_a_bootstrap_of_nothing_and_of_false_pairs():
    assert all(math.isnan(edge) for edge in bootstrap([], [1.0], difference_of_means, paired=False))
    with pytest.raises(ValueError, match="2 and 1 samples are no pairs"):
        bootstrap([1.0, 2.0], [1.0], difference_of_means, paired=True)


samples = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30)


@given(first=samples, second=samples)
def test_cliffs_delta_is_that_of_all_pairs(first, second):
    pairs = [(a, b) for a in first for b in second]
    expected = (sum(b > a for a, b in pairs) - sum(b < a for a, b in pairs)) / len(pairs)
    assert cliffs_delta(first, second) == pytest.approx(expected)


def test_cliffs_delta_at_its_ends():
    assert (cliffs_delta([1, 2], [3, 4]), cliffs_delta([3, 4], [1, 2]), cliffs_delta([1, 2], [1, 2])) == (1, -1, 0)
    assert math.isnan(cliffs_delta([], [1.0]))


@given(
    st.lists(st.tuples(st.floats(0, 1000), st.floats(-100, 100)), min_size=4, max_size=50), st.sampled_from([0, 1e6])
)
def test_a_slope_is_scipys(points, start_s):
    times, values = zip(*points, strict=True)
    times = [start_s + time_s for time_s in times]  # of a clock that has run for long
    assume(np.ptp(times) > 1 and np.ptp(values) > 0.1)
    theirs = linregress(times, values)
    assume(theirs.stderr > 1e-6)
    slope, certainty = slope_per_s(times, values)
    assert slope == pytest.approx(theirs.slope, rel=1e-6, abs=1e-9)
    assert certainty == pytest.approx(theirs.slope / theirs.stderr, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("times", "values", "expected"),
    [
        ([], [], (0.0, 0.0)),
        ([0.0, 1.0], [0.0, 5.0], (0.0, 0.0)),  # two points are always a line
        ([3.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], (0.0, 0.0)),
        ([0.0, 1.0, 2.0], [4.0, 4.0, 4.0], (0.0, 0.0)),
        ([0.0, 1.0, 2.0], [0.0, 2.0, 4.0], (2.0, math.inf)),
        ([0.0, 1.0, 2.0], [4.0, 2.0, 0.0], (-2.0, -math.inf)),
    ],
)
def test_slopes_at_their_edges(times, values, expected):
    assert slope_per_s(times, values) == expected
