"""Promises as people write them, in files, and in sentences; and the quantities in them."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerband.errors import UsageError
from powerband.spec.quantities import number, seconds, share, shown_seconds
from powerband.spec.slo import SLO


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ttft=500ms,tpot=50ms", SLO(ttft_s=0.5, tpot_s=0.05)),
        ("ttft:500 tpot:50", SLO(ttft_s=0.5, tpot_s=0.05)),  # as vLLM's --goodput
        ("e2el:9000", SLO(e2e_s=9.0)),
        ("TTFT=1.5s, stall=2s, e2e=1m, attainment=99%", SLO(ttft_s=1.5, stall_s=2.0, e2e_s=60.0, attainment=0.99)),
        ("tpot=50ms,attainment=0.9", SLO(tpot_s=0.05, attainment=0.9)),
        ("ttft=1s@p99,tpot=60ms@p99", SLO(ttft_s=1.0, tpot_s=0.06, attainment=0.99)),
        ("ttft=1s@p90,tpot=60ms", SLO(ttft_s=1.0, tpot_s=0.06, attainment=0.9)),
    ],
)
def test_an_slo_is_read_as_people_write_it(text, expected):
    assert SLO.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "'' is not part of an SLO."),
        ("fast", "'fast' is not part of an SLO."),
        ("itl=50ms", "'itl=50ms' is not part of an SLO."),
        ("ttft=500ms,", "'' is not part of an SLO."),
        ("ttft=soon", "slo ttft is 'soon', which is not a duration."),
        ("ttft=", "slo ttft is '', which is not a duration."),
        ("ttft=-5", "slo ttft is '-5', which is not a duration."),
        ("ttft=nan", "slo ttft is 'nan', which is not a duration."),
        ("ttft=0", "slo has ttft_s: 0.0."),
        ("ttft=1s,ttft=2s", "The SLO 'ttft=1s,ttft=2s' says ttft twice."),
        ("e2e=1s,e2el=2s", "The SLO 'e2e=1s,e2el=2s' says e2e twice."),
        ("ttft=1s,attainment=101%", "attainment is '101%', which is not a fraction."),
        ("ttft=1s@p99,tpot=1s@p95", "The SLO 'ttft=1s@p99,tpot=1s@p95' names several shares of requests."),
        ("ttft=1s@p99,attainment=95%", "The SLO 'ttft=1s@p99,attainment=95%' names several shares of requests."),
        ("ttft=1s@px", "slo is 'x%', which is not a fraction."),
        ("ttft=1s,attainment=0", "attainment is '0', which is not a fraction."),
    ],
)
def test_what_is_none_is_told(text, sentence):
    with pytest.raises(UsageError) as caught:
        SLO.parse(text)
    assert caught.value.message == sentence


SLOS = [SLO(), SLO(ttft_s=0.5), SLO(ttft_s=0.5, tpot_s=0.05, stall_s=1, e2e_s=20.0, attainment=1.0)]


@pytest.mark.parametrize("slo", SLOS, ids=str)
def test_it_comes_back_from_json(slo):
    assert SLO.from_dict(json.loads(json.dumps(slo.as_dict()))) == slo


@pytest.mark.parametrize(
    "values",
    [
        None,
        5,
        ["ttft_s"],
        {"ttft": 0.5},
        {"ttft_s": "0.5"},
        {"ttft_s": True},
        {"ttft_s": 0},
        {"ttft_s": -1.0},
        {"ttft_s": math.nan},
        {"ttft_s": math.inf},
        {"attainment": 5},
        {"attainment": 0},
        {"attainment": None},
        {"attainment": math.nan},
        {5: 1},
    ],
    ids=str,
)
def test_what_is_none_in_a_file_is_a_usage_error(values):
    with pytest.raises(UsageError, match=r"^slo (is|has) ") as caught:
        SLO.from_dict(values)
    assert caught.value.param == "slo"


def test_limits_and_sentence_hold_what_is_limited_and_nothing_else():
    slo = SLO(ttft_s=0.5, e2e_s=90.0)
    assert slo.limits == {"ttft": 0.5, "e2e": 90.0}
    assert str(slo) == "TTFT ≤ 500ms, E2E ≤ 90s"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("500ms", 0.5), ("30", 30.0), ("2m", 120.0), ("1.5 h", 5400.0), (".5s", 0.5), ("250US", 0.00025), ("0s", 0.0)],
)
def test_times_have_units(text, expected):
    assert seconds(text, param="duration") == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "s", "5 days", "1e3s", "-1s", "5ss", "inf", "9" * 400, "9" * 400 + "h", "1m30s"])
def test_what_is_no_time_names_the_option(text):
    with pytest.raises(UsageError, match=r"^duration is '.*', which is not a duration\.") as caught:
        seconds(text, param="duration")
    assert caught.value.param == "duration"


def test_a_time_may_have_to_say_its_unit():
    assert seconds("5", param="slo", unit="ms") == 0.005
    with pytest.raises(UsageError, match="which is not a duration"):
        seconds("5", param="slo", unit=None)


@given(st.one_of(st.floats(1e-6, 1e9), st.integers(1, 10**6).map(lambda ms: ms / 1000)))
def test_a_time_is_shown_as_it_can_be_read(value):
    assert seconds(shown_seconds(value), param="x", unit=None) == pytest.approx(value, abs=1e-9, rel=1e-12)


def test_times_are_shown_short():
    assert [shown_seconds(value) for value in (0.0005, 0.05, 0.1, 0.3, 1.0, 2.5, 1_500_000.0)] == [
        "0.5ms",
        "50ms",
        "100ms",
        "300ms",
        "1s",
        "2.5s",
        "1500000s",
    ]


@pytest.mark.parametrize(("text", "expected"), [("95%", 0.95), ("0.95", 0.95), ("100 %", 1.0), ("1", 1.0)])
def test_shares(text, expected):
    assert share(text, param="attainment") == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "95", "0", "0%", "-5%", "nan", "1.01", "five"])
def test_what_is_no_share_names_the_option(text):
    with pytest.raises(UsageError, match=r"^attainment is '.*', which is not a fraction\."):
        share(text, param="attainment")


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "2e9", "much"])
def test_what_is_no_number_within_bounds_names_the_option(text):
    assert number("2.5", param="rate") == 2.5
    with pytest.raises(UsageError, match=r"^rate is '.*'; it must be a number above 0 and up to 1e\+09\."):
        number(text, param="rate")
