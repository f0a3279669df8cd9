"""The gateway's exposition, parsed by prometheus_client: what happened is what it says, in closed sets of series."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from requests_for_tests import finished

from powerband.gateway.observability.metrics import GatewayMetrics, GaugeSnapshot
from powerband.gateway.observability.slo import slo_violations
from powerband.gateway.routes import ModelRoute
from powerband.gateway.snapshot import PoolSnapshot, ReplicaSnapshot
from powerband.metrics.record import Outcome
from powerband.spec.slo import SLO

ROUTE = ModelRoute(name="demo", rate=3.0, slo=SLO(ttft_s=0.5, attainment=0.9))
POOL = PoolSnapshot(model="demo", queued=2, predicted_wait_s=0.7, replicas=(ReplicaSnapshot(id="r1", state="ready"),))


def samples(metrics: GatewayMetrics, moment: GaugeSnapshot | None = None) -> dict[str, float]:
    """{'name{label=value,…}': value}, labels in order, without those that are empty."""
    found = {}
    for family in text_string_to_metric_families(metrics.render(moment or GaugeSnapshot()).decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()) if value)
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def served() -> GatewayMetrics:
    metrics = GatewayMetrics(address="gateway.example", port=8080)
    metrics.serve([ROUTE])
    return metrics


def test_a_request_is_counted_under_our_names_and_opentelemetrys() -> None:
    metrics = served()
    metrics.observe(finished(ttft_s=0.2, tokens=5, gap_s=0.1, prompt_tokens=40, cached_tokens=16, queue_s=0.01))
    found = samples(metrics)
    assert found["powerband_gateway_requests_total{endpoint=chat,model_name=demo,outcome=ok,status=200}"] == 1
    assert found["powerband_gateway_tokens_total{kind=prompt,model_name=demo}"] == 40
    assert found["powerband_gateway_tokens_total{kind=cached,model_name=demo}"] == 16
    assert found["powerband_gateway_slo_requests_total{kept=true,model_name=demo}"] == 1
    assert abs(found["powerband_gateway_ttft_seconds_sum{model_name=demo}"] - 0.2) < 1e-9
    assert abs(found["powerband_gateway_tpot_seconds_sum{model_name=demo}"] - 0.1) < 1e-9
    labels = (
        "gen_ai_operation_name=chat,gen_ai_provider_name=powerband,gen_ai_request_model=demo,"
        "gen_ai_response_model=demo,{}server_address=gateway.example,server_port=8080"
    )
    plain = labels.format("")
    assert abs(found[f"gen_ai_server_time_to_first_token_seconds_sum{{{plain}}}"] - 0.2) < 1e-9
    assert found[f"gen_ai_client_token_usage_sum{{{labels.format('gen_ai_token_type=output,')}}}"] == 5
    assert found[f"gen_ai_server_request_duration_seconds_count{{{plain}}}"] == 1


def test_retries_failovers_and_truncated_answers_are_told_apart() -> None:
    metrics = served()
    metrics.observe(finished(replicas=("r1", "r2")))
    metrics.observe(finished(replicas=("r1", "r2"), resumed=1))
    metrics.observe(finished(outcome=Outcome.ERROR, error="engine_dead"))
    found = samples(metrics, GaugeSnapshot(pools=(POOL,)))
    assert [found[f"powerband_gateway_{name}_total{{model_name=demo}}"] for name in ("retries", "failovers")] == [1, 1]
    assert found["powerband_gateway_truncated_total{model_name=demo}"] == 1
    assert found["powerband_gateway_replica_requests_total{model_name=demo,outcome=error,replica=r1}"] == 1


def test_a_scrape_tells_queues_replicas_and_the_promise() -> None:
    found = samples(served(), GaugeSnapshot(pools=(POOL,), in_flight=7, ledger_rows_lost=3))
    assert found["powerband_gateway_in_flight{}"] == 7
    assert found["powerband_gateway_queued{model_name=demo}"] == 2
    assert found["powerband_gateway_predicted_wait_seconds{model_name=demo}"] == 0.7
    assert found["powerband_gateway_replica_state{model_name=demo,replica=r1,state=ready}"] == 1
    assert found["powerband_gateway_replica_state{model_name=demo,replica=r1,state=ejected}"] == 0
    assert found["powerband_gateway_promised_attainment{model_name=demo}"] == 0.9
    assert found["powerband_gateway_slo_limit_seconds{figure=ttft,model_name=demo}"] == 0.5
    assert found["powerband_gateway_ledger_rows_lost_total{}"] == 3


def test_nothing_that_a_client_sends_adds_a_series() -> None:
    metrics = served()
    metrics.observe(finished())
    metrics.observe(finished(outcome=Outcome.REFUSED, status=429, error="pool_full"))
    before = set(samples(metrics))
    for number in range(50):
        strange = finished(model=f"model-{number}", outcome=Outcome.REFUSED, status=429, error=f"code-{number}")
        metrics.observe(strange)
        metrics.observe_rejection(f"code-{number}")
    found = samples(metrics)
    assert set(found) == before
    assert found["powerband_gateway_refused_total{reason=other}"] == 100


def test_a_replica_that_is_gone_takes_its_series_with_it() -> None:
    metrics = served()
    for number in range(20):
        metrics.observe(finished(replicas=(f"old-{number}",)))
    metrics.observe(finished(replicas=("r1",)))
    found = [name for name in samples(metrics, GaugeSnapshot(pools=(POOL,))) if "replica_requests_total" in name]
    assert found == ["powerband_gateway_replica_requests_total{model_name=demo,outcome=ok,replica=r1}"]


def test_who_leaves_counts_only_when_a_limit_was_broken_by_then() -> None:
    slo = SLO(ttft_s=0.5)
    left = {"outcome": Outcome.ABORTED, "status": 499}
    assert slo_violations(finished(**left, ttft_s=0.2), slo) is None  # pressed stop
    assert slo_violations(finished(**left, ttft_s=0.9), slo) == ["ttft"]
    assert slo_violations(finished(**left, tokens=0, seconds=0.1), slo) is None
    assert slo_violations(finished(**left, tokens=0, seconds=3.0), slo) == ["ttft"]


def test_who_is_cut_off_by_a_gateway_that_ends_counts() -> None:
    assert slo_violations(finished(outcome=Outcome.ABORTED, status=503, tokens=0), SLO(ttft_s=0.5)) == ["aborted"]


def test_a_client_over_its_own_limit_breaks_no_promise_but_a_full_pool_does() -> None:
    slo = SLO(ttft_s=0.5)
    assert slo_violations(finished(outcome=Outcome.REFUSED, status=429, tokens=0), slo) is None
    assert slo_violations(finished(outcome=Outcome.REFUSED, status=503, tokens=0), slo) == ["refused"]


def test_an_answer_that_came_as_a_whole_tells_no_first_token() -> None:
    whole = finished(stream=False, tokens=0, seconds=3.0)
    assert slo_violations(whole, SLO(ttft_s=0.5)) == []
    assert slo_violations(whole, SLO(ttft_s=0.5, e2e_s=2.0)) == ["e2e"]
    metrics = served()
    metrics.observe(whole)
    assert samples(metrics)["powerband_gateway_ttft_seconds_count{model_name=demo}"] == 0


def test_models_that_come_and_go_leave_no_series_for_ever() -> None:
    metrics = served()
    pages = {}
    for number in range(60):
        metrics.serve([ROUTE, ModelRoute(name=f"m{number:02d}")])
        metrics.observe(finished(model=f"m{number:02d}"))
        if number in (30, 59):
            pages[number] = metrics.render(GaugeSnapshot())
    assert len(pages[59]) == len(pages[30])
    assert b'model_name="m59"' in pages[59]
    assert b'model_name="m58"' in pages[59]
    assert b'"m10"' not in pages[59]


def test_a_page_is_written_in_parts_of_one_family() -> None:
    metrics = served()
    parts = list(metrics.parts(GaugeSnapshot(pools=(POOL,))))
    assert b"".join(parts) == metrics.render(GaugeSnapshot(pools=(POOL,)))
    assert all(part.count(b"# HELP") == 1 for part in parts)
