"""When requests arrive: the processes against scipy, and against how other tools' processes go wrong."""

import itertools
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, expon, gamma, kstest

from powerband.errors import UsageError
from powerband.spec.workload.arrivals import (
    MAX_CONCURRENCY,
    ClosedLoop,
    OpenLoop,
    RatePhase,
    Replay,
    arrivals_as_dict,
    arrivals_from_dict,
)

RATE, DURATION_S = 200.0, 10.0


def times_of(process, seed=0, number=None, end_s=math.inf):
    times = itertools.islice(process.times(random.Random(f"{seed}/arrivals")), number)
    return list(itertools.takewhile(lambda time_s: time_s < end_s, times))


# --- a Poisson process, and what is none -----------------------------------------------------------------------------


def ours(seed):
    return times_of(OpenLoop.at(RATE), seed, end_s=DURATION_S)


def rescaled_to_end_on_time(seed):
    """vLLM: so many arrivals, the last exactly when the rate says."""
    times = np.cumsum(np.random.default_rng(seed).exponential(1 / RATE, int(RATE * DURATION_S)))
    return times * DURATION_S / times[-1]


def relative_sleeps(seed):
    """SGLang: each gap is slept, and each sleep ends a millisecond late."""
    times = np.cumsum(np.random.default_rng(seed).exponential(1 / RATE, int(2 * RATE * DURATION_S)) + 0.001)
    return times[times < DURATION_S]


def copied_generators(seed, workers=10):
    """GuideLLM: each worker has the same random numbers, and adds its gaps to an offset that all share."""
    gaps = np.random.default_rng(seed).exponential(1 / RATE, int(2 * RATE * DURATION_S / workers))
    times = np.cumsum(np.repeat(gaps, workers))
    return times[times < DURATION_S]


def uniform_within_seconds(seed):
    """As many in each second as the rate says, somewhere in it."""
    generator = np.random.default_rng(seed)
    return np.sort(np.concatenate([second + generator.random(int(RATE)) for second in range(int(DURATION_S))]))


def dispersion_is_poisson(counts):
    """(n − 1)·variance/mean of Poisson counts is chi-square with n − 1 degrees of freedom."""
    statistic = (len(counts) - 1) * np.var(counts, ddof=1) / np.mean(counts)
    low, high = chi2.ppf((0.0005, 0.9995), len(counts) - 1)
    return low <= statistic <= high


def what_is_wrong(process):
    """The ways in which it is no Poisson process of RATE."""
    runs = [np.asarray(process(seed)) for seed in range(60)]
    counts = [len(run) for run in runs]
    found = set()
    if kstest(np.diff(runs[0]), expon(scale=1 / RATE).cdf).pvalue < 0.001:
        found.add("gaps")
    # Over windows a twentieth of a second long, and of a whole second: 10 and 200 arrivals.
    for name, windows in (("short windows", 200), ("seconds", 10)):
        parts = [np.histogram(run, windows, (0, DURATION_S))[0] for run in runs[:10]]
        if not dispersion_is_poisson(np.concatenate(parts)):
            found.add(name)
    if not dispersion_is_poisson(counts):
        found.add("runs")
    expected = RATE * DURATION_S
    if abs(np.mean(counts) - expected) > 4 * math.sqrt(expected / len(counts)):
        found.add("rate")
    return found


def test_an_open_loop_is_a_poisson_process():
    assert what_is_wrong(ours) == set()


@pytest.mark.parametrize(
    ("process", "caught_by"),
    [
        (rescaled_to_end_on_time, {"runs"}),
        (relative_sleeps, {"gaps", "short windows", "rate"}),
        (copied_generators, {"gaps", "short windows", "seconds", "runs"}),
        (uniform_within_seconds, {"seconds", "runs"}),
    ],
)
def test_other_tools_faults_are_caught(process, caught_by):
    assert what_is_wrong(process) >= caught_by


# --- bursts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("burstiness", [0.0625, 0.25, 1.0, 4.0])
def test_gaps_are_gamma_distributed(burstiness):
    gaps = np.diff(times_of(OpenLoop.at(5.0, burstiness), number=4000))
    whole = gamma(burstiness, scale=1 / (5.0 * burstiness))
    gaps = gaps[gaps > 1e-9]  # below, a difference of two times has no digits left
    assert kstest(gaps, lambda x: 1 - whole.sf(x) / whole.sf(1e-9)).pvalue > 0.01


@pytest.mark.parametrize("burstiness", [0.0625, 0.25, 1.0, 4.0])
def test_burstiness_sets_the_gaps_coefficient_of_variation(burstiness):
    gaps = np.diff(times_of(OpenLoop.at(5.0, burstiness), number=4000))
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(1 / math.sqrt(burstiness), rel=0.1)


@pytest.mark.parametrize("burstiness", [0.0625, 0.5, 1.0, 4.0])
def test_the_first_arrival_is_that_of_a_process_that_has_always_been_running(burstiness):
    """Its distribution is the integral of the gap's survival function: x·(1 − F(x)) + F of one shape higher."""
    firsts = [times_of(OpenLoop.at(1.0, burstiness), seed, number=1)[0] for seed in range(2000)]
    gap, longer = gamma(burstiness, scale=1 / burstiness), gamma(burstiness + 1, scale=1 / burstiness)
    assert kstest(firsts, lambda x: x * gap.sf(x) + longer.cdf(x)).pvalue > 0.01


def ordinary(seed, burstiness, end_s):
    """A process that begins with an arrival, as if by chance: too many follow a burst's beginning."""
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / burstiness, 1000)
    return int(np.sum(np.cumsum(gaps) < end_s))


def test_bursty_runs_have_as_many_arrivals_as_the_rate_says():
    """On average; a process that starts at an arrival has (CV² − 1)/2 more: with CV 4, 7.5 more than 60."""
    counts = [len(times_of(OpenLoop.at(1.0, 1 / 16), seed, end_s=60.0)) for seed in range(2000)]
    error = np.std(counts) / math.sqrt(len(counts))
    assert abs(np.mean(counts) - 60) < 3 * error
    assert np.mean([ordinary(seed, 1 / 16, 60.0) for seed in range(2000)]) - 60 > 6 * error


def test_constant_arrivals_are_equally_spaced_and_centred():
    assert times_of(OpenLoop.at(4.0, math.inf), end_s=1.0) == [0.125, 0.375, 0.625, 0.875]


# --- rates that change -----------------------------------------------------------------------------------------------


def expected_until(time_s, phases):
    """The rate's integral, by the trapezoid rule."""
    total = 0.0
    for phase in phases:
        part = min(max(time_s, 0.0), phase.seconds)
        reached = phase.start + (phase.end - phase.start) * part / phase.seconds
        total += (phase.start + reached) / 2 * part
        time_s -= phase.seconds
    return total


PHASES = {
    "from 0": (RatePhase(0, 100, 20),),
    "to 0": (RatePhase(100, 0, 20),),
    "steps, one of them silent": (RatePhase(20, 20, 10), RatePhase(0, 0, 5), RatePhase(80, 80, 10)),
    "up and down": (RatePhase(1, 50, 10), RatePhase(50, 50, 10), RatePhase(50, 2, 10)),
}


@pytest.mark.parametrize("phases", PHASES.values(), ids=PHASES)
def test_a_changing_rate_gives_as_many_arrivals_as_its_integral(phases):
    constant = times_of(OpenLoop(phases, math.inf))
    expected = sum(phase.arrivals for phase in phases)
    assert len(constant) == round(expected)
    assert [expected_until(time_s, phases) for time_s in constant] == pytest.approx(np.arange(len(constant)) + 0.5)


@pytest.mark.parametrize("phases", PHASES.values(), ids=PHASES)
def test_seen_at_unit_rate_it_is_poisson_again(phases):
    counted = [expected_until(time_s, phases) for time_s in times_of(OpenLoop(phases), seed=3)]
    assert len(counted) > 500
    assert kstest(np.diff(counted), expon.cdf).pvalue > 0.01


def test_nothing_arrives_in_a_silent_phase():
    phases = PHASES["steps, one of them silent"]
    times = times_of(OpenLoop(phases))
    assert sum(time_s < 10 for time_s in times) > 100 < sum(time_s >= 15 for time_s in times)
    assert not [time_s for time_s in times if 10 < time_s < 15]


def test_arrivals_end_with_the_last_phase():
    assert max(times_of(OpenLoop((RatePhase(50, 50, 2),)))) < 2


rates = st.floats(0, 1000)
phase_lists = st.lists(st.builds(RatePhase, rates, rates, st.floats(0.01, 5)), min_size=1, max_size=4).filter(
    lambda phases: 0.5 < sum(phase.arrivals for phase in phases) < 3000
)
burstinesses = st.one_of(st.floats(0.01, 1e6), st.just(1.0), st.just(math.inf))


@given(phases=phase_lists, burstiness=burstinesses, seed=st.integers(0, 9))
def test_arrivals_are_in_order_and_within_their_phases(phases, burstiness, seed):
    times = times_of(OpenLoop(tuple(phases), burstiness), seed)
    assert times == sorted(times)
    assert all(0 <= time_s <= sum(phase.seconds for phase in phases) * (1 + 1e-12) for time_s in times)


@given(rate=st.floats(0.01, 1e4), burstiness=burstinesses, seed=st.integers(0, 9))
def test_twice_the_rate_is_the_same_sequence_twice_as_fast(rate, burstiness, seed):
    slow, fast = (times_of(OpenLoop.at(r, burstiness), seed, number=50) for r in (rate, 2 * rate))
    assert fast == pytest.approx([time_s / 2 for time_s in slow], rel=1e-12)


# --- as files, and what is refused -----------------------------------------------------------------------------------

KINDS = [
    OpenLoop.at(3.5),
    OpenLoop.at(2, math.inf),
    OpenLoop((RatePhase(0, 10, 60), RatePhase(10, 10)), 0.25),
    ClosedLoop(16),
    ClosedLoop(3, 1.5),
    Replay(),
    Replay(2.5),
]


@pytest.mark.parametrize("arrivals", KINDS, ids=str)
def test_they_come_back_from_json(arrivals):
    text = json.dumps(arrivals_as_dict(arrivals), allow_nan=False)
    assert arrivals_from_dict(json.loads(text)) == arrivals


@pytest.mark.parametrize(
    "values",
    [
        None,
        "open",
        [],
        {},
        {"kind": "often"},
        {"kind": ["open"]},
        {"kind": "open"},
        {"kind": "open", "phases": 3},
        {"kind": "open", "phases": []},
        {"kind": "open", "phases": [5]},
        {"kind": "open", "phases": [{"start": 1}]},
        {"kind": "open", "phases": [{"start": "1", "end": 1}]},
        {"kind": "open", "phases": [{"start": 10**400, "end": 1}]},
        {"kind": "open", "phases": [{"start": math.nan, "end": 1}]},
        {"kind": "open", "phases": [{"start": 1, "end": 2}]},
        {"kind": "open", "phases": [{"start": 1, "end": 1, "minutes": 5}]},
        {"kind": "open", "phases": [{"start": 1, "end": 1}], "bursts": 1},
        {"kind": "closed", "concurrency": 2.5},
        {"kind": "closed", "concurrency": True},
        {"kind": "closed", "concurrency": 10**400},
        {"kind": "closed", "concurrency": 1, "think_s": math.inf},
        {"kind": "closed", "concurrency": 1, "think_s": "long"},
        {"kind": "replay", "speedup": None},
        {"kind": "replay", "speedup": 10**400},
    ],
    ids=str,
)
def test_what_is_no_process_is_a_usage_error(values):
    with pytest.raises(UsageError) as caught:
        arrivals_from_dict(values)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: OpenLoop.at(0), "The rate is 0: nothing would arrive."),
        (lambda: OpenLoop(()), "The rate is 0: nothing would arrive."),
        (lambda: OpenLoop.at(-1), "The load goes from -1 to -1 requests a second in inf s."),
        (lambda: OpenLoop.at(math.inf), "The load goes from inf to inf requests a second in inf s."),
        (lambda: RatePhase(1, 2), "A ramp needs a duration in seconds."),
        (lambda: RatePhase(1, 1, 0), "The load goes from 1 to 1 requests a second in 0 s."),
        (lambda: OpenLoop((RatePhase(1, 1), RatePhase(2, 2))), "Only the last phase may have no end."),
        (lambda: OpenLoop.at(1, 0), "burstiness is 0."),
        (lambda: OpenLoop.at(1, math.nan), "burstiness is nan."),
        (lambda: OpenLoop.at(1, 1e300), "burstiness is 1e+300."),  # the gamma generator would never return
        (lambda: ClosedLoop(0), "The load has 0 users, who wait 0.0 s between requests."),
        (lambda: ClosedLoop(MAX_CONCURRENCY + 1), "The load has 100001 users, who wait 0.0 s between requests."),
        (lambda: Replay(0), "speedup is 0."),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(UsageError) as caught:
        make()
    assert caught.value.message == sentence
