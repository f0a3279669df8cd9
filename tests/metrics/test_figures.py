"""From records to figures: by hand on four requests, against a second calculation in numpy on many."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerband.metrics.figures import PERCENTILES, Distribution, Window, summarize
from powerband.metrics.record import Outcome, RequestRecord, pooled_itl_s
from powerband.metrics.slo import slo_misses
from powerband.spec.slo import SLO


def record(scheduled_s=0.0, chunks=((1.0, 1),), **fields):
    """chunks: (seconds after it was scheduled, tokens) each."""
    times, tokens = zip(*chunks, strict=True) if chunks else ((), ())
    values = {
        "sent_s": scheduled_s,
        "chunk_times_s": tuple(scheduled_s + time_s for time_s in times),
        "chunk_tokens": tuple(tokens),
        "output_tokens": sum(tokens),
    }
    return RequestRecord(scheduled_s=scheduled_s, **(values | fields))


def lagging(lags_s, ttft_s=0.1):
    return [record(float(n), ((ttft_s, 1),), sent_s=n + lag_s) for n, lag_s in enumerate(lags_s)]


EVERYTHING = Window(0.0, 1e9)

# --- by hand ---------------------------------------------------------------------------------------------------------

# Window from 10 to 20. Tokens in it: 0 of early's 2 at 9 and 1 of its at 12; 1 + 2 + 1 of good; 1 of slow's 2.
EARLY = record(8.0, ((1.0, 2), (4.0, 1)), prompt_tokens=100)
GOOD = record(10.0, ((0.5, 1), (1.0, 2), (2.0, 1)), sent_s=10.002, prompt_tokens=40, cached_tokens=10)
SLOW = record(18.0, ((2.0, 1), (5.0, 1)), prompt_tokens=60)
REFUSED = record(20.0, (), outcome=Outcome.REFUSED)
LATE = record(20.5, ((0.1, 1),), prompt_tokens=7)
FOUR = [EARLY, GOOD, SLOW, REFUSED, LATE]
MEASURED = Window(10.0, 20.0)
PROMISE = SLO(ttft_s=1.0, tpot_s=1.0)


def test_requests_count_where_they_were_scheduled_and_tokens_where_they_arrived():
    summary = summarize(FOUR, MEASURED, PROMISE)
    assert summary.scheduled == 3  # good, slow and refused
    assert summary.outcomes == {"ok": 2, "refused": 1}
    assert summary.request_rate == 0.3
    assert summary.output_tokens_per_s == (1 + 4 + 1) / 10
    assert summary.prompt_tokens_per_s == (40 + 60) / 10  # first tokens at 10.5 and 20.0
    assert summary.cached_share == 10 / 100


def test_attainment_is_of_all_that_were_scheduled():
    summary = summarize(FOUR, MEASURED, PROMISE)
    assert summary.good == 1
    assert summary.attainment == 1 / 3
    assert summary.goodput == 1 / 10
    assert summary.misses == {"ttft": 1, "tpot": 1, "refused": 1}
    low, high = summary.attainment_interval
    assert 0.05 < low < 1 / 3 < high < 0.8


def test_latencies_are_of_requests_that_succeeded_and_lag_of_all():
    figures = summarize(FOUR, MEASURED).figures
    assert (figures["ttft"].minimum, figures["ttft"].maximum, figures["ttft"].mean) == (0.5, 2.0, 1.25)
    assert figures["service_ttft"].minimum == pytest.approx(0.498)
    assert (figures["tpot"].minimum, figures["tpot"].maximum) == (0.5, 3.0)
    assert (figures["stall"].minimum, figures["stall"].maximum) == (1.0, 3.0)
    assert (figures["e2e"].minimum, figures["e2e"].maximum) == (2.0, 5.0)
    assert (figures["itl"].count, figures["itl"].mean) == (4, (0.25 + 0.25 + 1 + 3) / 4)
    assert (figures["send_lag"].count, figures["send_lag"].maximum) == (3, pytest.approx(0.002))


def test_without_an_slo_nothing_is_judged():
    summary = summarize(FOUR, MEASURED)
    assert (summary.attainment, summary.attainment_interval, summary.goodput, summary.misses) == (None, None, None, {})


def test_both_ends_of_the_window_belong_to_it():
    window = Window(1.0, 2.0)
    records = [record(time_s, ((0.0, 1),)) for time_s in (0.999, 1.0, 2.0, 2.001)]
    summary = summarize(records, window)
    assert (summary.scheduled, summary.output_tokens_per_s) == (2, 2.0)


@pytest.mark.parametrize("outcome", [Outcome.ERROR, Outcome.REFUSED, Outcome.TIMED_OUT])
def test_whatever_failed_is_a_miss_however_fast_it_was(outcome):
    summary = summarize([record(), record(outcome=outcome)], EVERYTHING, SLO(ttft_s=9.0))
    assert (summary.good, summary.attainment, summary.misses) == (1, 0.5, {outcome.value: 1})


def test_what_the_client_abandoned_counts_only_where_a_limit_had_passed():
    waits = [record(chunks=(), outcome=Outcome.ABORTED, ended_s=waited_s) for waited_s in (0.5, 8.9, 9.1)]
    summary = summarize([record(), *waits], EVERYTHING, SLO(ttft_s=9.0))
    assert (summary.scheduled, summary.undecided, summary.judged) == (4, 2, 2)
    assert (summary.good, summary.attainment, summary.misses) == (1, 0.5, {"ttft": 1})
    assert summary.outcomes == {"ok": 1, "aborted": 3}


@pytest.mark.parametrize(
    ("one", "slo", "reasons"),
    [
        (record(0.0, ((0.5, 1),)), SLO(ttft_s=0.5), []),
        (record(0.0, ((0.5001, 1),)), SLO(ttft_s=0.5), ["ttft"]),
        (record(0.0, ((0.5, 1),), sent_s=0.4), SLO(ttft_s=0.3), ["ttft"]),  # late by its client: no excuse
        (record(0.0, ((9.0, 1),)), SLO(tpot_s=0.01, stall_s=0.01), []),  # a single token
        (record(0.0, ((1.0, 1), (2.0, 4))), SLO(tpot_s=0.25), []),
        (record(0.0, ((1.0, 1), (2.0, 4))), SLO(tpot_s=0.24), ["tpot"]),
        (record(0.0, ((1.0, 1), (2.0, 4))), SLO(stall_s=0.9, e2e_s=1.9), ["stall", "e2e"]),
        (record(0.0, ()), SLO(ttft_s=9.0, tpot_s=9.0, stall_s=9.0, e2e_s=9.0), ["ttft", "e2e"]),  # an empty answer
        (record(0.0, ()), SLO(tpot_s=9.0), []),
        (record(0.0, (), outcome=Outcome.TIMED_OUT), SLO(), ["timed_out"]),
        (record(0.0, (), outcome=Outcome.ABORTED, ended_s=2.0), SLO(), None),
        (record(0.0, (), outcome=Outcome.ABORTED, ended_s=2.0), SLO(ttft_s=2.0, stall_s=1.0, tpot_s=1.0), None),
        (record(0.0, (), outcome=Outcome.ABORTED, ended_s=2.0), SLO(ttft_s=1.9, e2e_s=1.9), ["ttft", "e2e"]),
        (record(0.0, ((1.0, 1),), outcome=Outcome.ABORTED, ended_s=4.0), SLO(ttft_s=1.0, stall_s=3.0), None),
        (record(0.0, ((1.0, 1),), outcome=Outcome.ABORTED, ended_s=4.0), SLO(stall_s=2.9, e2e_s=3.9), ["stall", "e2e"]),
        (record(0.0, ((1.0, 1), (2.0, 1)), outcome=Outcome.ABORTED, ended_s=2.0), SLO(tpot_s=0.9), ["tpot"]),
    ],
)
def test_why_a_request_missed(one, slo, reasons):
    assert slo_misses(one, slo) == reasons


def test_the_guides_example_of_coordinated_omission():
    """docs/benchmarking.md: 50 ms, and a pause from 20 to 30 s; waiting for an answer hides who would have come."""

    def asked(scheduled_s):
        return record(scheduled_s, ((max(30.0 - scheduled_s, 0.0) * (scheduled_s >= 20.0) + 0.05, 1),))

    minute, slo = Window(0.0, 60.0), SLO(ttft_s=0.5)
    open_loop = summarize([asked(number / 10) for number in range(600)], minute, slo)
    users, time_s = [], 0.0
    while time_s < 60.0 - 1e-6:
        users.append(asked(round(time_s, 6)))
        time_s += users[-1].ttft_s
    closed_loop = summarize(users, minute, slo)
    assert (closed_loop.scheduled, open_loop.scheduled) == (1000, 600)
    means = [round(1000 * summary.figures["ttft"].mean) for summary in (closed_loop, open_loop)]
    assert means == [60, 892]
    p99 = [summary.figures["ttft"].percentiles[99.0] for summary in (closed_loop, open_loop)]
    assert p99 == pytest.approx([0.05, 9.45], abs=0.005)
    assert [closed_loop.attainment, open_loop.attainment] == pytest.approx([0.999, 0.84], abs=0.001)


# --- few and none ----------------------------------------------------------------------------------------------------


def test_no_request_is_no_figure():
    summary = summarize([], Window(0.0, 10.0), SLO(ttft_s=1.0))
    assert (summary.scheduled, summary.figures, summary.misses, summary.client_fault) == (0, {}, {}, "")
    assert (summary.attainment, summary.attainment_interval, summary.goodput) == (None, (0.0, 1.0), 0.0)


def test_one_request_at_once_has_latencies_and_no_rates():
    """A window that ends with the only arrival has no length: nothing per second can be said."""
    summary = summarize([record(0.0, ((0.5, 1), (1.5, 1)))], Window(0.0, 0.0), SLO(ttft_s=1.0))
    assert (summary.request_rate, summary.output_tokens_per_s, summary.goodput) == (0.0, 0.0, 0.0)
    assert (summary.attainment, summary.figures["ttft"].percentiles[50.0]) == (1.0, 0.5)
    assert summary.figures["ttft"].intervals[50.0] is None


def test_no_samples_are_no_distribution():
    assert Distribution.of([]) is None
    assert Distribution.of_itl([]) is None
    assert Distribution.of_itl([record(0.0, ()), record()]) is None


@pytest.mark.parametrize(("q", "fewest"), [(90.0, 50), (95.0, 100), (99.0, 500)])
def test_a_percentile_needs_five_samples_beyond_it(q, fewest):
    before, enough = (Distribution.of(float(n) for n in range(count)) for count in (fewest - 1, fewest))
    assert (before.percentiles[q], before.intervals[q]) == (None, None)
    assert enough.percentiles[q] == pytest.approx(np.percentile(range(fewest), q))
    low, high = enough.intervals[q]
    assert low < enough.percentiles[q] < high


def test_the_medians_interval_needs_six_samples():
    five, six = (Distribution.of(float(n) for n in range(count)) for count in (5, 6))
    assert (five.percentiles[50.0], five.intervals[50.0]) == (2.0, None)
    assert six.intervals[50.0] == (0.0, 5.0)


def test_inter_token_latencies_have_no_intervals():
    """Gaps of one answer depend on each other."""
    distribution = Distribution.of_itl([record(0.0, [(float(n), 1) for n in range(1000)])])
    assert distribution.percentiles[99.0] == 1.0
    assert set(distribution.intervals.values()) == {None}


def test_what_a_server_claims_of_its_tokens_costs_no_memory():
    """10^12 tokens in a second: one sample in 10^12 is the slow one."""
    distribution = Distribution.of_itl([record(0.0, ((1.0, 1), (2.0, 10**12), (5.0, 1)))])
    assert distribution.count == 10**12 + 1
    assert distribution.percentiles == dict.fromkeys(PERCENTILES, pytest.approx(1e-12))
    assert distribution.maximum == 3.0
    absurd = Distribution.of_itl([record(0.0, ((1.0, 1), (2.0, 2**62), (3.0, 2**62), (4.0, 2**62)))])
    assert absurd.percentiles[99.0] == pytest.approx(2**-62)


# --- the client's honesty --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "is_at_fault"),
    [
        (lagging([0.0049] * 600), False),
        (lagging([0.0051] * 600), True),
        # 1 % of the median TTFT, where that is more
        (lagging([0.0099] * 600, ttft_s=1.0), False),
        (lagging([0.0101] * 600, ttft_s=1.0), True),
        # fewer than one in a hundred may be late, not more
        (lagging([0.5] * 5 + [0.0] * 595), False),
        (lagging([0.5] * 7 + [0.0] * 593), True),
        # of few, one or two prove nothing, unless they are so late that all are on average
        (lagging([0.02] * 2 + [0.0] * 38), False),
        (lagging([0.02] * 3 + [0.0] * 37), True),
        (lagging([0.3] + [0.0] * 39), True),
        ([], False),
    ],
)
def test_a_client_that_is_late_makes_the_run_invalid(records, is_at_fault):
    assert bool(summarize(records, EVERYTHING).client_fault) == is_at_fault


def test_failures_count_in_the_lag_and_not_in_the_median():
    late = [record(0.0, (), sent_s=0.006, outcome=Outcome.TIMED_OUT)]
    assert summarize(late, EVERYTHING).client_fault
    slow = [record(0.0, ((1.0, 1),), outcome=Outcome.ERROR, sent_s=0.006)] * 9
    assert summarize(slow, EVERYTHING).client_fault


def test_the_fault_is_told_with_its_measure():
    assert summarize(lagging([0.02] * 600), EVERYTHING).client_fault == (
        "the client sent 600 of 600 requests more than 5.0 ms late, up to 20.0 ms"
    )


# --- against a second calculation ------------------------------------------------------------------------------------


def some_records(seed, number):
    """Answers of one to forty chunks, most of one token, some coalesced, some failed."""
    generator = random.Random(seed)
    made = []
    for _ in range(number):
        scheduled_s = generator.uniform(0, 100)
        time_s, chunks = generator.expovariate(2.0), []
        for _ in range(generator.randrange(41)):
            chunks.append((time_s, generator.choice((1, 1, 1, 4))))
            time_s += generator.expovariate(20.0)
        made.append(
            record(
                scheduled_s,
                tuple(chunks),
                sent_s=scheduled_s + generator.expovariate(1000.0),
                outcome=generator.choices(list(Outcome), (20, 1, 1, 1, 1))[0],
                prompt_tokens=generator.randrange(1000),
                cached_tokens=generator.randrange(100),
            )
        )
    return made


def _had_passed(r, slo):
    """Abandoned at its last chunk, or when it was sent."""
    times = r.chunk_times_s
    if not times:
        return max(r.sent_s - r.scheduled_s, 0) > slo.ttft_s
    n = sum(r.chunk_tokens)
    return times[0] - r.scheduled_s > slo.ttft_s or (n > 1 and (times[-1] - times[0]) / (n - 1) > slo.tpot_s)


def by_numpy(records, window, slo):
    """The definitions of DESIGN.md once more, written without a look at how figures.py does it."""
    inside = [r for r in records if window.start_s <= r.scheduled_s <= window.end_s]
    ok = [r for r in inside if r.outcome == "ok"]
    some = [r for r in ok if r.chunk_times_s]
    gaps = [np.diff(r.chunk_times_s) for r in some]
    tokens = [(t, k) for r in records for t, k in zip(r.chunk_times_s, r.chunk_tokens, strict=True)]
    figures = {
        "ttft": [r.chunk_times_s[0] - r.scheduled_s for r in some],
        "service_ttft": [r.chunk_times_s[0] - r.sent_s for r in some],
        "tpot": [
            (r.chunk_times_s[-1] - r.chunk_times_s[0]) / (sum(r.chunk_tokens) - 1)
            for r in some
            if sum(r.chunk_tokens) >= 2
        ],
        "stall": [gap.max() for gap in gaps if len(gap)],
        "e2e": [r.chunk_times_s[-1] - r.scheduled_s for r in some],
        "itl": np.concatenate(
            [np.repeat(gap / r.chunk_tokens[1:], r.chunk_tokens[1:]) for gap, r in zip(gaps, some, strict=True)]
        ),
        "send_lag": [r.sent_s - r.scheduled_s for r in inside if r.outcome != "aborted"],
    }
    judged = [r for r in inside if r.outcome != "aborted" or _had_passed(r, slo)]
    good = [
        r
        for r in some
        if r.chunk_times_s[0] - r.scheduled_s <= slo.ttft_s
        and (r.chunk_times_s[-1] - r.chunk_times_s[0]) <= slo.tpot_s * (sum(r.chunk_tokens) - 1)
    ]
    length_s = window.end_s - window.start_s
    return {
        "figures": figures,
        "attainment": len(good) / len(judged),
        "goodput": len(good) / length_s,
        "request_rate": len(inside) / length_s,
        "output_tokens_per_s": sum(k for t, k in tokens if window.start_s <= t <= window.end_s) / length_s,
    }


@pytest.mark.parametrize("seed", range(4))
def test_figures_equal_a_second_calculation(seed):
    records, window, slo = some_records(seed, 800), Window(10.0, 95.0), SLO(ttft_s=0.8, tpot_s=0.05)
    ours, theirs = summarize(records, window, slo), by_numpy(records, window, slo)
    for name in ("attainment", "goodput", "request_rate", "output_tokens_per_s"):
        assert getattr(ours, name) == pytest.approx(theirs[name]), name
    assert 0.2 < ours.attainment < 0.8
    assert ours.figures.keys() == theirs["figures"].keys()
    for name, samples in theirs["figures"].items():
        found = ours.figures[name]
        assert found.count == len(samples) >= 500, name
        assert (found.mean, found.minimum, found.maximum) == pytest.approx(
            (np.mean(samples), min(samples), max(samples))
        )
        assert found.percentiles == pytest.approx({q: np.percentile(samples, q) for q in PERCENTILES}), name


chunk_lists = st.lists(st.tuples(st.floats(0, 5), st.integers(1, 9)), max_size=8).map(sorted)


@given(st.lists(chunk_lists, min_size=1, max_size=12))
def test_inter_token_latencies_are_as_if_each_sample_were_written_out(answers):
    records = [record(0.0, tuple(chunks)) for chunks in answers]
    samples, found = pooled_itl_s(records), Distribution.of_itl(records)
    if not samples:
        assert found is None
        return
    assert (found.count, found.minimum, found.maximum) == (len(samples), min(samples), max(samples))
    assert found.mean == pytest.approx(np.mean(samples), abs=1e-12)
    for q, value in found.percentiles.items():
        assert value is None or value == pytest.approx(np.percentile(samples, q), abs=1e-12)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_a_distribution_is_numpys(samples):
    found = Distribution.of(samples)
    assert found.mean == pytest.approx(np.mean(samples))
    assert found.percentiles[50.0] == pytest.approx(np.median(samples))
    assert not math.isnan(found.maximum)
