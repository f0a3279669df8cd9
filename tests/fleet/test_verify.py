"""Verification of a plan: kept, broken, and unclear because of too few requests."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from powerband.bench.client.messages import Sample, ServerAddress
from powerband.bench.client.probe import ServerInfo
from powerband.bench.load import LoadResult
from powerband.bench.report.results import ClientMachine, OfferedLoad, ReportedAddress, RunReport, build_point, utc_now
from powerband.bench.server_metrics import ServerMetrics
from powerband.bench.session import Experiment
from powerband.fleet.report.verification_table import verification_lines
from powerband.fleet.verify import Verification, check_report, full_load_seed, verify
from powerband.metrics.record import Outcome
from powerband.spec.plan import Plan, Prediction, Promise
from powerband.spec.slo import SLO
from powerband.spec.workload.options import ArrivalOptions, MixOptions, requested_load

WORKLOAD = requested_load(ArrivalOptions(rate=10.0), MixOptions()).workload
PLAN = Plan(
    model="m",
    workload=WORKLOAD,
    slo=SLO(ttft_s=0.1, tpot_s=0.05),
    promise=Promise(10.0, 40.0),
    predicted={"ttft_s": Prediction(0.05, 0.04, 0.06)},
)


def sample(index: int, ttft_s: float = 0.05, **fields: object) -> Sample:
    """Five output tokens, 10 ms apart."""
    at_s = index / 10
    times = tuple(at_s + ttft_s + 0.01 * i for i in range(5))
    made = Sample(
        index=index,
        chain=index,
        scheduled_s=at_s,
        sent_s=at_s,
        chunk_times_s=times,
        chunk_tokens=(1,) * 5,
        prompt_tokens=10,
        output_tokens=5,
        asked_tokens=5,
    )
    return msgspec.structs.replace(made, **fields)


def verified(*samples: Sample, plan: Plan = PLAN) -> Verification:
    load = LoadResult(
        schedule=WORKLOAD.draw(0, num_requests=len(samples)),
        samples=samples,
        server=ServerMetrics(),
        wall_s=len(samples) / 10,
        client_share=0.0,
        chunks_per_s=0.0,
        unsent=0,
        stopped=False,
    )
    point = build_point(load, label="run", offered=OfferedLoad("rate", 10.0), warm_up=0.0, cool_down=0.0, slo=PLAN.slo)
    report = RunReport(
        started_at=utc_now(),
        command=(),
        powerband="0",
        machine=ClientMachine("cpu", 1, "Linux"),
        target=ReportedAddress.of(ServerAddress(base="http://x", endpoint="completions", model="m")),
        server=ServerInfo("powerband", "m", None),
        workload={},
        slo=PLAN.slo,
        seed=0,
        warm_up=0.0,
        cool_down=0.0,
        points=(point,),
    )
    return check_report(plan, report, load)


def line(found: Verification, name: str) -> tuple[str, str, str, str]:
    one = next(one for one in found.lines if one.name == name)
    return one.promised, one.predicted, one.measured, one.verdict


def test_compares_measured_promised_and_predicted() -> None:
    found = verified(*(sample(i) for i in range(200)))
    assert found.verdict == "kept"
    assert line(found, "TTFT p95") == ("≤ 100 ms", "50.0 ms (40.0 ms–60.0 ms)", "50.0 ms", "kept")
    assert line(found, "TPOT p95")[2:] == ("10.0 ms", "kept")
    assert line(found, "SLO attainment")[0] == "≥ 95 %"
    assert line(found, "output tokens/s")[3] == "kept"


@pytest.mark.parametrize(("ttft_s", "outside"), [(0.03, "below"), (0.05, ""), (0.08, "above")])
def test_a_figure_outside_its_predicted_band_is_named_though_it_is_kept(ttft_s: float, outside: str) -> None:
    found = verified(*(sample(i, ttft_s=ttft_s) for i in range(200)))
    assert found.verdict == "kept"
    assert next(one for one in found.lines if one.name == "TTFT p95").outside == outside
    shown = "\n".join(verification_lines(found))
    assert (f"Measured outside the predicted band: TTFT p95 {outside}" in shown) is bool(outside)


def test_a_run_that_says_nothing_keeps_nothing() -> None:
    found = verified(*(sample(i, sent_s=i / 10 + 0.04, ttft_s=0.09) for i in range(50)))
    shown = "\n".join(verification_lines(found))
    assert "The run says nothing about the service" in shown
    assert " kept" not in shown


def test_names_the_figure_that_is_broken() -> None:
    found = verified(*(sample(i, ttft_s=0.5) for i in range(200)))
    assert found.verdict == "broken"
    assert line(found, "TTFT p95")[3] == "broken"
    assert line(found, "TPOT p95")[3] == "kept"


def test_a_miss_that_may_be_chance_is_unclear() -> None:
    assert verified(*(sample(i, ttft_s=0.5 if i < 2 else 0.05) for i in range(20))).verdict == "unclear"


def test_few_requests_that_keep_the_promise_are_said_to_be_few() -> None:
    """Wilson's interval of n of n begins above 95 % from n = 73 on."""
    few = "\n".join(verification_lines(verified(*(sample(i) for i in range(20)))))
    assert "The promise is kept: 20 requests" in few
    assert "So few may keep it by chance; 73 tell more: --verify-seconds 11." in few
    enough = verification_lines(verified(*(sample(i) for i in range(100))))
    assert "by chance" not in "\n".join(enough)


def test_a_run_with_a_late_client_is_invalid() -> None:
    found = verified(*(sample(i, sent_s=i / 10 + 0.04, ttft_s=0.09) for i in range(50)))
    assert found.verdict == "invalid"
    assert "late" in found.fault


def test_failed_requests_are_misses_and_missing_tokens_that_were_not_requested_are_not() -> None:
    found = verified(*(sample(i, outcome=Outcome.ERROR if i % 2 else Outcome.OK) for i in range(100)))
    assert found.verdict == "broken"
    assert found.errors == 50
    few = verified(*(sample(i, asked_tokens=3, output_tokens=3) for i in range(100)))
    assert few.verdict == "kept"
    assert few.requests == 100


@pytest.mark.parametrize("name", ["requests/s", "output tokens/s"])
def test_shows_the_request_rate(name: str) -> None:
    assert line(verified(*(sample(i) for i in range(100))), name)[0]


def test_an_invalid_answer_misses_the_slo_and_the_length_of_answers_with_a_form_is_not_judged() -> None:
    right = [sample(i, is_valid=True, asked_tokens=50) for i in range(180)]
    wrong = [sample(i, is_valid=False, asked_tokens=50) for i in range(180, 200)]
    found = verified(*right)
    assert found.verdict == "kept"
    assert line(found, "valid answers")[2] == "100 %"
    assert line(found, "output tokens/s")[3] == ""
    found = verified(*right, *wrong)
    assert found.verdict == "broken"
    assert line(found, "valid answers")[2] == "90.0 %"
    assert line(found, "SLO attainment")[3] == "broken"


@pytest.mark.parametrize(("name", "endpoint"), [("chat", "completions"), ("tools", "chat"), ("structured", "chat")])
def test_the_load_asks_for_what_the_workload_was_planned_with(
    monkeypatch: pytest.MonkeyPatch, name: str, endpoint: str
) -> None:
    asked: list[Experiment] = []

    class Session:
        def __init__(self, experiment: Experiment, **_: object) -> None:
            asked.append(experiment)
            raise KeyboardInterrupt

    monkeypatch.setattr("powerband.fleet.verify.BenchSession", Session)
    workload = requested_load(ArrivalOptions(rate=10.0), MixOptions(workload=name)).workload
    with pytest.raises(KeyboardInterrupt):
        verify(replace(PLAN, workload=workload), "http://x", model="m", api_key="", seconds=1.0)
    [target] = [one.target for one in asked]
    assert (target.endpoint, target.form) == (endpoint, "text" if name == "chat" else name)


@pytest.mark.parametrize("rate", [0.2, 0.5, 1.0])
def test_a_verification_at_a_low_rate_sends_the_promised_requests(rate: float) -> None:
    workload = requested_load(ArrivalOptions(rate=rate), MixOptions()).workload
    seed = full_load_seed(workload, rate, 60.0)
    assert workload.draw(seed, duration_s=60.0).num_requests >= 0.9 * rate * 60


def test_few_requests_at_a_low_rate_are_held_against_no_band_and_the_hint_is_of_the_promised_rate() -> None:
    slow = replace(PLAN, promise=Promise(0.2), predicted={"ttft_s": Prediction(0.5, 0.4, 0.6)})
    found = verified(sample(0), sample(90), plan=slow)
    assert found.verdict == "kept"
    lines = verification_lines(found)
    assert not any("Measured outside" in line for line in lines)
    assert "So few may keep it by chance; 73 tell more: --verify-seconds 511." in lines
