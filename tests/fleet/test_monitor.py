"""The monitor against services with known faults: found soon, with the right cause, and without false alarms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.watcher import EPOCH, FAULT_S, SLO_HERE, Bed, Event, run
from hypothesis import given
from hypothesis import strategies as st

from powerband.cli.main import main
from powerband.fleet.monitor.incidents import Finding, Incident, Incidents, read_incidents
from powerband.fleet.monitor.monitor import Monitor
from powerband.fleet.monitor.replica_metrics import median_ratio, read_metrics, steps_between
from powerband.fleet.monitor.residuals import Cusum, distance_from_peers
from powerband.fleet.monitor.slo_burn import SLOBurn
from powerband.fleet.monitor.state import HostLoad, Observation, SLOTarget, read_host_load
from powerband.gateway.snapshot import PoolSnapshot, ReplicaSnapshot
from powerband.metrics.prometheus import EngineMetrics
from powerband.spec.slo import SLO

FINDING = Finding(kind="replica", subject="r1", cause="down", what="Replica r1 is away.", evidence={"away_s": 4.0})


def test_faults_are_found_and_nothing_else_is() -> None:
    """The floors are far below what benchmarks/watcher.py measures over many seeds (docs/benchmarks.md)."""
    score = run(seed=1, replicas=3, hours=1.5, calibrated=True)
    assert score.recall >= 0.9
    assert score.precision >= 0.9
    assert max(delay for delays in score.found.values() for delay in delays) < FAULT_S


@pytest.mark.parametrize("kind", ["burst", "mix", "blind", "restart"])
def test_opens_no_incident_without_a_fault(kind: str) -> None:
    bed = Bed(5, [Event(kind, 60.0, 300.0, "r1" if kind == "blind" else "")], replicas=3)
    assert bed.play(330.0) == ()


def test_an_incident_has_subject_cause_times_and_action() -> None:
    (incident,) = Bed(3, [Event("slow2", 60.0, 200.0, "r1")], replicas=3).play(300.0)
    assert (incident.subject, incident.cause, incident.action) == ("r1", "slow_replica", "eject_replica")
    assert 65 < incident.opened_at - EPOCH < 110
    assert incident.closed_at is not None
    assert 200 < incident.closed_at - EPOCH < 270
    assert "those of the others do not" in incident.what
    assert 1.6 < float(incident.evidence["ratio"]) < 2.4


def test_replaces_no_failing_replica_under_overload() -> None:
    bed = Bed(3, [Event("overload", 60.0, 200.0), Event("errors", 90.0, 200.0, "r1")], replicas=3)
    incidents = bed.play(200.0)
    assert {(one.kind, one.cause) for one in incidents} == {("promise", "load"), ("replica", "errors")}
    assert {action.kind for action in bed.actions} == {"add_replica"}


# ---- attainment


def kept(good: int, bad: int, *, seconds: int = 60, slo: SLO = SLO_HERE) -> SLOBurn:
    """As many requests, evenly over so many seconds before second 1000."""
    attainment = SLOBurn(slo)
    total = good + bad
    for number in range(total):
        is_miss = bad and number % (total / bad) < 1
        attainment.add(1000 - seconds + seconds * number / total, ["ttft"] if is_miss else [])
    return attainment


def test_burn_rate_is_one_if_the_slo_is_just_met() -> None:
    attainment = kept(950, 50)
    assert attainment.window(1000, 60).attainment == 0.95
    assert attainment.burn_rate(1000, 60) == pytest.approx(1.0)
    assert attainment.alert(1000) is None


def test_a_fast_burn_is_an_alert_within_seconds() -> None:
    attainment = kept(200, 100)
    alert = attainment.alert(1000)
    assert alert is not None
    assert alert.name == "fast"
    assert attainment.misses(1000, 60) == {"ttft": 100}


def test_a_few_misses_among_few_requests_are_no_alert() -> None:
    assert kept(4, 1).alert(1000) is None


def test_an_alert_ends_when_requests_meet_the_slo_again() -> None:
    attainment = kept(200, 100)
    for second in range(1000, 1065):
        for _ in range(5):
            attainment.add(second, [])
    assert attainment.alert(1065) is None


def test_an_slo_of_half_the_requests_can_be_violated() -> None:
    slo = SLO(ttft_s=1.0, attainment=0.5)
    assert kept(5, 95, slo=slo).alert(1000) is not None
    assert kept(45, 55, slo=slo).alert(1000) is None


@given(st.lists(st.tuples(st.floats(0, 30000), st.booleans()), max_size=60), st.sampled_from([10, 60, 3600]))
def test_windows_count_the_requests_that_completed_in_them(ends: list[tuple[float, bool]], window_s: int) -> None:
    attainment = SLOBurn(SLO_HERE)
    ends = sorted(ends)
    for time_s, good in ends:
        attainment.add(time_s, [] if good else ["ttft"])
    now_s = ends[-1][0] if ends else 0.0
    # Seconds are counted as a whole.
    inside = [good for time_s, good in ends if int(time_s) >= now_s - window_s]
    share = attainment.window(now_s, window_s)
    assert (share.good, share.total) == (sum(inside), len(inside))


# ---- residuals


@pytest.mark.parametrize(("residual", "windows"), [(0.69, 1), (0.30, 3), (0.18, 7)])
def test_cusum_accumulates_residuals_beyond_the_slack(residual: float, windows: int) -> None:
    cusum = Cusum()
    for _ in range(windows):
        assert not cusum.is_up
        cusum.push(residual)
    assert cusum.is_up
    assert cusum.size == pytest.approx(residual)
    cusum.push(0.0)
    assert cusum.is_up
    cusum.push(0.0)
    assert not cusum.is_up


@given(st.lists(st.floats(-0.1, 0.1), max_size=100))
def test_cusum_is_quiet_within_the_slack(residuals: list[float]) -> None:
    cusum = Cusum()
    for residual in residuals:
        cusum.push(residual)
    assert (cusum.is_up, cusum.is_down) == (False, False)


def test_cusum_detects_both_directions() -> None:
    cusum = Cusum()
    for _ in range(3):
        cusum.push(-0.4)
    assert cusum.is_down
    assert not cusum.is_up


def test_the_distance_is_from_the_median_of_the_others() -> None:
    assert distance_from_peers({"a": 0.7, "b": 0.0, "c": 0.1}) == pytest.approx({"a": 0.65, "b": -0.4, "c": -0.25})
    assert distance_from_peers({"a": 0.7}) == {}


def test_reads_the_metrics_of_our_own_engine() -> None:
    metrics = EngineMetrics("demo")
    before = read_metrics(metrics.render().decode())
    for ratio in (1.9, 2.0, 2.0, 2.1, 2.2):
        metrics.observe_residual(ratio)
    metrics.observe_first_tokens(2, ttft_s=0.1, prompt_tokens=7)
    after = read_metrics(metrics.render().decode())
    assert after.processed_tokens == 9
    assert median_ratio(steps_between(before, after)) == pytest.approx(2.0, abs=0.2)
    assert steps_between(after, before) == {}  # it began anew


@pytest.mark.parametrize("text", ["", "nonsense", 'powerband_step_residual_ratio_bucket{le="x"} 1', "vllm:x{} NaN"])
def test_reads_nothing_from_a_page_that_is_not_prometheus_text(text: str) -> None:
    assert read_metrics(text).processed_tokens is None


# ---- invariants and the host


def looked(
    watcher: Monitor, seconds: int, replica: Callable[[int], ReplicaSnapshot], metrics: str | None, **more: object
):
    peer = ReplicaSnapshot(id="r2", state="ready")
    for second in range(seconds):
        pools = (PoolSnapshot(model="demo", replicas=(replica(second), peer)),)
        told = {} if metrics is None else {"r1": metrics}
        actions = watcher.observe(
            Observation(now_s=EPOCH + second, clock_s=second, pools=pools, metrics=told, **more)  # type: ignore[arg-type] # host
        )
    return actions


def test_silence_with_requests_in_flight_is_a_hang() -> None:
    watcher = Monitor(SLOTarget(slo=SLO(ttft_s=1.0)))
    busy = "powerband_generation_tokens_total 100"  # and stays there
    looked(watcher, 9, lambda s: ReplicaSnapshot(id="r1", state="ready", inflight=2, silent_s=float(s)), busy)
    (incident,) = watcher.incidents.open
    assert (incident.cause, incident.subject, incident.action) == ("hang", "r1", "restart_replica")


def test_long_responses_that_are_not_streamed_are_no_hang() -> None:
    watcher = Monitor(SLOTarget(slo=SLO(ttft_s=1.0)))
    for second in range(60):
        pools = (
            PoolSnapshot(
                model="demo",
                replicas=(ReplicaSnapshot(id="r1", state="ready", inflight=2, silent_s=float(second)),),
            ),
        )
        told = {"r1": f"powerband_generation_tokens_total {100 + second}"}
        watcher.observe(Observation(now_s=EPOCH + second, clock_s=second, pools=pools, metrics=told))
    assert watcher.incidents.open == ()


def test_kv_cache_in_use_without_requests_is_a_leak() -> None:
    watcher = Monitor(SLOTarget(slo=SLO(ttft_s=1.0)))
    idle = "powerband_requests_running 0\npowerband_requests_waiting 0\npowerband_kv_cache_usage_ratio {}"
    looked(watcher, 30, lambda s: ReplicaSnapshot(id="r1", state="ready"), idle.format(0.0))
    assert watcher.incidents.open == ()
    looked(watcher, 30, lambda s: ReplicaSnapshot(id="r1", state="ready"), idle.format(0.4))
    assert [one.cause for one in watcher.incidents.open] == ["leak"]


def test_a_machine_without_memory_is_an_incident_and_a_busy_one_is_not() -> None:
    busy = HostLoad(load=20.0, cores=2, cpu_pressure=0.9, memory_bytes=1000, available_memory_bytes=500)
    watcher = Monitor(SLOTarget(slo=SLO(ttft_s=1.0)))
    looked(watcher, 20, lambda s: ReplicaSnapshot(id="r1", state="ready"), None, host=busy)
    assert watcher.incidents.open == ()
    full = HostLoad(load=0.1, cores=2, memory_bytes=1000, available_memory_bytes=10)
    looked(watcher, 20, lambda s: ReplicaSnapshot(id="r1", state="ready"), None, host=full)
    assert [(one.kind, one.cause) for one in watcher.incidents.open] == [("host", "memory")]


def test_reads_the_load_of_the_machine(tmp_path: Path) -> None:
    assert read_host_load(tmp_path) is None
    (tmp_path / "proc" / "pressure").mkdir(parents=True)
    (tmp_path / "proc" / "loadavg").write_text("1.50 1.0 0.9 1/100 42\n")
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:  2048 kB\nMemAvailable:  1024 kB\n")
    (tmp_path / "proc" / "pressure" / "cpu").write_text("some avg10=12.50 avg60=1.0 avg300=0.5 total=1\n")
    host = read_host_load(tmp_path)
    assert host is not None
    assert (host.load, host.cpu_pressure, host.memory_pressure) == (1.5, 0.125, None)
    assert (host.memory_bytes, host.available_memory_bytes) == (2 << 20, 1 << 20)


def test_actions_come_one_at_a_time_and_never_take_the_last_replica() -> None:
    away = tuple(ReplicaSnapshot(id=f"r{n}", state="ejected") for n in range(3))
    watcher = Monitor(SLOTarget(slo=SLO(ttft_s=1.0)))
    taken = []
    for second in range(40):
        seen = Observation(now_s=EPOCH + second, clock_s=second, pools=(PoolSnapshot(model="demo", replicas=away),))
        taken += [(second, action.kind, action.replica) for action in watcher.observe(seen)]
    assert [(kind, replica) for _, kind, replica in taken] == [("restart_replica", "r0"), ("restart_replica", "r1")]
    assert taken[1][0] - taken[0][0] >= 30


# ---- incidents


def test_incidents_survive_a_restart_and_close(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    path = tmp_path / "incidents.json"
    first = Incidents(path, lambda change, incident: told.append((change, incident.id)))
    (opened,) = first.update(1000.0, [FINDING])
    first.record_action(opened.id, "restarted")
    first.update(1001.0, [FINDING])
    second = Incidents(path, lambda change, incident: told.append((change, incident.id)))
    assert second.open[0].done == ("restarted",)
    assert second.update(1010.0, [FINDING]) == []
    second.update(1030.0, [])
    assert len(second.open) == 1  # hysteresis
    second.update(1041.0, [])
    assert second.open == ()
    assert told == [("opened", opened.id), ("closed", opened.id)]
    assert read_incidents(path)[0].closed_at == 1041.0


def test_an_incident_that_returns_soon_is_reopened() -> None:
    incidents = Incidents()
    (opened,) = incidents.update(1000.0, [FINDING])
    incidents.update(1031.0, [])
    (again,) = incidents.update(1060.0, [FINDING])
    assert again.id == opened.id
    incidents.update(1091.0, [])
    (later,) = incidents.update(1200.0, [FINDING])
    assert later.id != opened.id


def test_a_damaged_file_costs_only_the_history(tmp_path: Path) -> None:
    path = tmp_path / "incidents.json"
    path.write_bytes(b'[{"id": 3')
    incidents = Incidents(path)
    assert incidents.all == ()
    incidents.update(1000.0, [FINDING])
    assert len(read_incidents(path)) == 1


def test_monitoring_goes_on_with_a_full_disk(tmp_path: Path) -> None:
    incidents = Incidents(tmp_path / "missing" / "incidents.json")
    assert len(incidents.update(1000.0, [FINDING])) == 1
    (tmp_path / "missing").mkdir()
    incidents.update(1001.0, [FINDING])
    assert len(read_incidents(tmp_path / "missing" / "incidents.json")) == 1


def test_the_command_shows_incidents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POWERBAND_STATE", str(tmp_path))
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "desired.json").write_text("{}")
    incidents = Incidents(tmp_path / "demo" / "incidents.json")
    incidents.update(1000.0, [FINDING])
    incidents.update(1040.0, [Finding(kind="promise", subject="service", cause="load", what="Too much comes.")])
    assert main(["incidents"]) == 0
    shown = capsys.readouterr().out
    assert "Too much comes." in shown
    assert "Replica r1 is away." not in shown
    assert main(["incidents", "demo", "--all", "--json"]) == 0
    values: list[Incident] = json.loads(capsys.readouterr().out)
    assert [value["cause"] for value in values] == ["load", "down"]  # type: ignore[index] # parsed from JSON
    assert main(["incidents", "demo", "--all"]) == 0
    assert "over, lasted 40 s" in capsys.readouterr().out


DEEP = b'[{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}]"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'["\xff"]', b"7", DEEP], ids=range(6))
def test_a_damaged_file_has_no_incidents(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "incidents.json"
    path.write_bytes(content)
    assert read_incidents(path) == ()
