"""RequestRecord's figures on a request worked out by hand, and percentiles against numpy and scipy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import scoreatpercentile

from powerband.metrics.record import Outcome, RequestRecord, percentile, pooled_itl_s

# Scheduled at 10, sent late at 10.5; one token at 12, two at 13, one at 16.
RECORD = RequestRecord(
    scheduled_s=10.0,
    sent_s=10.5,
    chunk_times_s=(12.0, 13.0, 16.0),
    chunk_tokens=(1, 2, 1),
    prompt_tokens=7,
    output_tokens=4,
)


def test_latency_figures_follow_the_definitions():
    assert RECORD.send_lag_s == 0.5
    assert RECORD.ttft_s == 2.0
    assert RECORD.service_ttft_s == 1.5
    assert RECORD.tpot_s == 4.0 / 3
    assert RECORD.itl_samples_s() == [0.5, 0.5, 3.0]
    assert RECORD.stall_s == 3.0
    assert RECORD.e2e_s == 6.0


def test_itl_samples_are_as_many_as_tokens_after_the_first_chunk():
    assert len(pooled_itl_s([RECORD, RECORD])) == 2 * (4 - 1)


def test_one_token_has_a_ttft_but_no_tpot():
    record = RequestRecord(scheduled_s=0.0, sent_s=0.0, chunk_times_s=(1.0,), chunk_tokens=(1,), output_tokens=1)
    assert (record.ttft_s, record.tpot_s, record.stall_s, record.e2e_s) == (1.0, None, None, 1.0)


def test_a_refused_request_has_no_figures():
    record = RequestRecord(scheduled_s=0.0, sent_s=0.1, outcome=Outcome.REFUSED)
    assert (record.ttft_s, record.service_ttft_s, record.tpot_s, record.e2e_s) == (None,) * 4
    assert record.itl_samples_s() == []


samples = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(values=samples, q=st.floats(0, 100))
def test_percentile_equals_numpy_and_scipy(values, q):
    ours = percentile(values, q)
    assert ours == pytest.approx(np.percentile(values, q), rel=1e-9, abs=1e-6)
    assert ours == pytest.approx(scoreatpercentile(values, q), rel=1e-9, abs=1e-6)


def test_percentile_of_nothing_is_nan_and_out_of_range_is_an_error():
    assert math.isnan(percentile([], 50))
    with pytest.raises(ValueError, match="between 0 and 100, not at 101"):
        percentile([1.0], 101)
