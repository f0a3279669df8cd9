"""What a run's folder holds: all that was measured, nothing that is secret; it can be read back and replayed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from samples_for_tests import LIMITS, MIX, load, played, point, report, shared, workload

from powerband.bench.client.messages import ServerAddress
from powerband.bench.report.result_files import read_requests, read_run, write_run
from powerband.bench.report.results import (
    ClientMachine,
    FoundRate,
    OfferedLoad,
    ReportedAddress,
    error_groups,
    without_secrets,
)
from powerband.errors import EnvironmentFault, UsageError
from powerband.metrics.record import Outcome
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import ClosedLoop, OpenLoop, RatePhase, Replay
from powerband.spec.workload.lengths import Fixed
from powerband.spec.workload.traces import read_trace
from powerband.spec.workload.workload import Conversation, Workload


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path):
    loads = [load(rate, 120, failures=0.05) for rate in (4.0, 8.0)]
    found = FoundRate(4.0, (2.0, None), 0.97, (0.95, 0.99))
    run = replace(report(*(point(one, rate) for one, rate in zip(loads, (4.0, 8.0), strict=True))), found=found)
    write_run(run, loads, tmp_path)
    assert read_run(tmp_path) == run


def test_every_request_is_a_line_with_all_that_is_known_of_it(tmp_path: Path):
    result = load(requests=50, failures=0.2)
    write_run(report(point(result)), [result], tmp_path)
    (requests,) = read_requests(tmp_path, 1)
    names = set(msgspec.structs.asdict(result.samples[0]))
    assert names < set(json.loads((tmp_path / "requests.jsonl").read_text().splitlines()[0]))
    for line, sample in zip(requests, result.samples, strict=True):
        assert (line.outcome, line.error, line.output_tokens) == (sample.outcome, sample.error, sample.output_tokens)
        assert line.chunk_times_s == pytest.approx(sample.chunk_times_s, abs=1e-6)


@pytest.mark.parametrize(
    ("arrivals", "mix"),
    [
        (OpenLoop.at(6.0), shared()),
        (OpenLoop.at(2.0), replace(shared(), conversation=Conversation(Fixed(3), think_s=0.5))),
        (ClosedLoop(4), replace(MIX, conversation=Conversation(Fixed(2)))),
    ],
    ids=["shared prefixes", "conversations", "closed loop"],
)
def test_requests_can_be_replayed(tmp_path: Path, arrivals: OpenLoop | ClosedLoop, mix):
    schedule = workload(arrivals=arrivals, mix=mix).draw(7, num_requests=60)
    result = played(schedule)
    write_run(report(point(result)), [result], tmp_path)
    trace = read_trace(tmp_path / "requests.jsonl")
    again = Workload(name="again", arrivals=Replay(), requests=trace).draw(0)
    was = {r.segments: (r.turn, r.output_tokens) for chain in schedule.chains for r in chain.requests}
    now = {r.segments: (r.turn, r.output_tokens) for chain in again.chains for r in chain.requests}
    assert now == was
    if isinstance(arrivals, OpenLoop):
        first_s = schedule.chains[0].start_s  # a trace's times count from its first request
        starts = [chain.start_s - first_s for chain in schedule.chains]
        assert [chain.start_s for chain in again.chains] == pytest.approx(starts, abs=1e-6)


def test_lines_of_several_loads_are_no_one_trace(tmp_path: Path):
    loads = [load(requests=20), load(requests=20)]
    write_run(report(point(loads[0]), point(loads[1])), loads, tmp_path)
    with pytest.raises(UsageError, match="a second load begins"):
        read_trace(tmp_path / "requests.jsonl")


def test_text_with_any_line_separator_stays_in_its_line(tmp_path: Path):
    result = load(requests=3)
    odd = tuple(msgspec.structs.replace(sample, error="a\u2028b\x85c\nd") for sample in result.samples)
    result = replace(result, samples=odd)
    write_run(report(point(result)), [result], tmp_path)
    assert [line.error for line in read_requests(tmp_path, 1)[0]] == ["a\u2028b\x85c\nd"] * 3
    assert len(read_trace(tmp_path / "requests.jsonl").requests) == 3


def test_no_secret_is_told(tmp_path: Path):
    target = ServerAddress(base="http://h", endpoint="chat", model="m", headers={"Authorization": "Bearer s3cret"})
    words = (
        "bench",
        "--api-key",
        "s3cret",
        "--api-key=s3cret",
        "--header",
        "X-Key: s3cret",
        "--header=X: s3cret",
        "-x",
    )
    result = load(requests=5)
    run = replace(report(point(result)), target=ReportedAddress.of(target), command=without_secrets(words))
    write_run(run, [result], tmp_path)
    assert "s3cret" not in (tmp_path / "run.json").read_text() + (tmp_path / "requests.jsonl").read_text()
    assert run.command[-1] == "-x"


def test_the_machine_is_told_without_its_name():
    import socket

    machine = ClientMachine.here()
    assert machine.cpus >= 1
    assert socket.gethostname() not in str(machine)


def test_an_unknown_schema_is_not_guessed_at(tmp_path: Path):
    (tmp_path / "run.json").write_text('{"schema": "powerband.bench/2"}')
    with pytest.raises(
        UsageError, match=r"has the schema 'powerband\.bench/2'; this version reads 'powerband\.bench/1'"
    ):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        (("points", 0, "summary", "figures", "ttft_s", "mean_s"), "mean_s"),
        (("machine", "cpus"), "cpus"),
        (("points", 0, "seed"), "seed"),
        (("points",), "points"),
    ],
)
def test_a_missing_field_is_named(tmp_path: Path, path: tuple[str | int, ...], why: str):
    result = load(requests=30)
    write_run(report(point(result)), [result], tmp_path)
    values = whole = json.loads((tmp_path / "run.json").read_text())
    for key in path[:-1]:
        values = values[key]
    del values[path[-1]]
    (tmp_path / "run.json").write_text(json.dumps(whole))
    with pytest.raises(UsageError, match=rf"run\.json is broken: .*{why}"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"schema": ', "\udcff"])
def test_what_is_no_json_object_is_told(tmp_path: Path, content: str):
    (tmp_path / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"run\.json is broken"):
        read_run(tmp_path)


def test_a_broken_line_is_told_with_its_number(tmp_path: Path):
    result = load(requests=5)
    write_run(report(point(result)), [result], tmp_path)
    with (tmp_path / "requests.jsonl").open("a") as file:
        file.write('{"index": "six"}\n')
    with pytest.raises(UsageError, match="line 6"):
        read_requests(tmp_path, 1)


def test_a_folder_without_a_run_is_told(tmp_path: Path):
    with pytest.raises(UsageError, match="Cannot read"):
        read_run(tmp_path / "none")


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="Cannot write the results"):
        write_run(report(), [load()], tmp_path / "file" / "out")


def test_other_tools_names_stand_for_the_same_values(tmp_path: Path):
    result = load(requests=800)
    one = point(result)
    write_run(report(one), [result], tmp_path)
    aliases = json.loads((tmp_path / "run.json").read_text())["points"][0]["aliases"]
    ttft, tpot = one.summary.figures["service_ttft"], one.summary.figures["tpot"]
    assert aliases["vllm_mean_ttft_ms"] == aliases["sglang_mean_ttft_ms"] == pytest.approx(ttft.mean * 1000)
    assert aliases["vllm_p99_tpot_ms"] == pytest.approx((tpot.percentiles[99.0] or 0) * 1000)
    assert aliases["aiperf_inter_token_latency_avg_ms"] == aliases["guidellm_inter_token_latency_ms_mean"]
    assert aliases["vllm_output_throughput"] == pytest.approx(
        sum(s.output_tokens for s in result.samples) / result.wall_s
    )
    assert not any("itl" in name or "e2el" in name for name in aliases), "defined differently elsewhere"


def test_a_percentile_of_too_few_requests_has_no_alias_either(tmp_path: Path):
    result = load(requests=100)
    write_run(report(point(result)), [result], tmp_path)
    aliases = json.loads((tmp_path / "run.json").read_text())["points"][0]["aliases"]
    assert "vllm_median_ttft_ms" in aliases
    assert "vllm_p99_ttft_ms" not in aliases


def test_the_verdict_is_about_the_slo_and_only_where_the_client_was_honest():
    assert point(slo=LIMITS).verdict == "PASS"
    assert point(slo=SLO(ttft_s=0.01)).verdict == "MISSED"
    assert point(slo=None).verdict == "MEASURED"
    assert point(slo=LIMITS, saturated=True).verdict == "MISSED"
    assert point(replace(load(), stopped=True)).verdict == "MISSED"
    assert point(load(lag_s=0.05)).verdict == "INVALID"


def test_a_client_near_its_ceiling_is_not_believed():
    result = load()
    easy = point(result, ceiling_chunks_per_s=result.chunks_per_s / 0.69)
    hard = point(result, ceiling_chunks_per_s=result.chunks_per_s / 0.71)
    assert (easy.verdict, hard.verdict) == ("PASS", "INVALID")
    assert "71% of the chunks it can bear" in hard.client.fault


def test_a_run_in_which_nothing_was_scheduled_says_nothing():
    nothing = point(replace(load(), samples=()))
    assert nothing.verdict == "INVALID"
    assert "no request was scheduled" in nothing.client.fault


def test_failures_that_differ_in_numbers_only_are_one_kind():
    result = load(requests=400, failures=0.3)
    groups = error_groups(result.samples)
    assert len(groups) == 3
    assert sum(group.count for group in groups) == sum(s.outcome is not Outcome.OK for s in result.samples)
    assert [group.count for group in groups] == sorted((group.count for group in groups), reverse=True)


def test_short_and_uncounted_answers_are_counted():
    result = load(requests=10)
    first, second, *rest = result.samples
    first = msgspec.structs.replace(first, output_tokens=first.asked_tokens - 1)
    second = msgspec.structs.replace(second, counted_by="chunks")
    one = point(replace(result, samples=(first, second, *rest)))
    assert (one.short_answers, one.uncounted) == (1, 1)


def test_the_offered_load_is_a_rate_or_a_number_of_users():
    schedule = workload(5.0).draw(0, num_requests=500)
    assert OfferedLoad.of(OpenLoop.at(5.0), schedule) == OfferedLoad("rate", 5.0)
    assert OfferedLoad.of(ClosedLoop(12), schedule) == OfferedLoad("concurrency", 12)
    ramp = OpenLoop((RatePhase(0, 20, 10),))
    mean = OfferedLoad.of(ramp, workload(arrivals=ramp).draw(0, duration_s=10.0))
    assert (mean.kind, mean.value) == ("rate", pytest.approx(10, rel=0.3))


def test_what_a_search_found_is_the_headline():
    found = FoundRate(12.34, (10.0, 14.0), 0.96, (0.94, 0.98))
    assert replace(report(), found=found).headline == (
        "12.3 requests/s is the highest rate that keeps the SLO "
        "(certainly kept up to 10, certainly missed from 14 on; 95 % each)."
    )
    assert (
        replace(report(), found=replace(found, requests_per_s=0.0)).headline == "No rate that was tried keeps the SLO."
    )
    assert report().headline == ""
