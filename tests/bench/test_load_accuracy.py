"""What the client measures is what the server did: figures against a scripted server that knows the truth."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
from collections import Counter
from itertools import pairwise
from statistics import median

import pytest

from loads_for_tests import Run, best_of_five, close_s, load, schedule_of, worker_pids
from powerband.bench.client.messages import Endpoint
from powerband.bench.load import Live
from powerband.metrics.record import Outcome, percentile
from powerband.mock_server.behavior import Behavior
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import ClosedLoop
from powerband.spec.workload.schedule import Segment

PACED = Behavior(ttft_s=0.060, tpot_s=0.008)


def is_close(measured_s: float, true_s: float) -> bool:
    """Within 1 ms (more on a busy machine, see `close_s`) or 1 %."""
    return abs(measured_s - true_s) <= max(close_s(), 0.01 * true_s)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@best_of_five
def test_latencies_are_those_of_the_script(endpoint: Endpoint) -> None:
    run = load(PACED, schedule_of(30, 2.0, output=12), endpoint=endpoint)

    assert is_close(run.median("ttft"), 0.060)
    assert is_close(run.median("service_ttft"), 0.060)
    assert is_close(run.median("tpot"), 0.008)
    # The longest gap of each answer, beside that of the server: on a busy machine both are longer than the script's.
    written = [record.written_s for _, record in run.pairs()]
    longest_s = median(max(after - before for before, after in pairwise(times)) for times in written)
    assert is_close(run.median("stall"), longest_s)
    assert longest_s >= 0.008
    assert is_close(run.median("e2e"), 0.060 + 11 * 0.008)
    assert is_close(median(run.samples[0].record().itl_samples_s()), 0.008)
    assert {sample.output_tokens for sample in run.samples} == {12}
    assert {sample.prompt_tokens for sample in run.samples} == {12}


@best_of_five
def test_every_chunk_is_noted_when_the_server_sent_it() -> None:
    run = load(PACED, schedule_of(30, 2.0, output=12))

    late_s = []
    for sample, record in run.pairs():
        assert len(sample.chunk_times_s) == len(record.written_s) == 12
        for noted_s, written_at in zip(sample.chunk_times_s, record.written_s, strict=True):
            late_s.append(noted_s - (written_at - run.start_at))
    assert len(late_s) == 12 * 60
    assert -1e-4 < median(late_s) < close_s()
    assert percentile(late_s, 90) < 5 * close_s()  # of a machine that others use, too


@best_of_five
def test_requests_are_sent_at_their_times() -> None:
    run = load(PACED, schedule_of(50, 2.0, burstiness=1.0))

    planned = [chain.start_s for chain in run.result.schedule.chains]
    assert [sample.scheduled_s for sample in run.samples] == planned
    assert median(sample.sent_s - sample.scheduled_s for sample in run.samples) < close_s()
    arrived_s = [record.arrived_s - run.start_at for record in run.records]
    assert (
        median(at - planned_s for at, planned_s in zip(sorted(arrived_s), sorted(planned), strict=True)) < 2 * close_s()
    )


@pytest.mark.parametrize("usage", ["continuous", "end", "none"])
@best_of_five
def test_chunks_of_several_tokens_count_as_several(usage: str) -> None:
    run = load(Behavior(ttft_s=0.03, tpot_s=0.005, tokens_per_chunk=4, usage=usage), schedule_of(20, 1.0, output=16))  # type: ignore[arg-type]  # parametrized

    itl_s = median(value for sample in run.samples for value in sample.record().itl_samples_s())
    if usage == "none":  # a chunk is taken for a token, and the sample says so
        assert {sample.counted_by for sample in run.samples} == {"chunks"}
        assert {sample.output_tokens for sample in run.samples} == {4}
    else:
        assert {sample.counted_by for sample in run.samples} == {"usage"}
        assert {sample.output_tokens for sample in run.samples} == {16}
        assert {sum(sample.chunk_tokens) for sample in run.samples} == {16}
        assert is_close(run.median("tpot"), 3 * 4 * 0.005 / 15)
    if usage == "continuous":
        assert {sample.chunk_tokens for sample in run.samples} == {(4, 4, 4, 4)}
        assert is_close(itl_s, 0.005)


@best_of_five
def test_a_stall_of_the_server_is_in_the_figures_of_the_requests_that_came_in_it() -> None:
    """Coordinated omission: who waits for an answer before sending the next request sees one bad one, not eighty."""
    script = Behavior(ttft_s=0.020, tpot_s=0.002, stall_at_s=1.0, stall_s=2.0)
    run = load(script, schedule_of(40, 5.0, output=4))

    assert run.records[0].arrived_s - run.start_at < 0.1 + close_s()
    for sample in run.samples:
        into_s = sample.scheduled_s - run.samples[0].scheduled_s - 1.0
        ttft_s = sample.record().ttft_s
        assert ttft_s is not None
        if 0.05 < into_s < 1.9:
            assert abs(ttft_s - (2.0 - into_s + 0.020)) < 0.1 + close_s()
    ttfts = [sample.record().ttft_s or 0.0 for sample in run.samples]
    assert percentile(ttfts, 90) > 1.2
    assert percentile(ttfts, 50) < 0.1 + close_s()
    late_s = [sample.sent_s - sample.scheduled_s for sample in run.samples]
    assert median(late_s) < close_s(), "the client went on sending: the stall is the server's"

    slo = SLO(ttft_s=0.5, attainment=0.9)
    summary = run.summary(slo)
    hurt = sum(0 < sample.scheduled_s - run.samples[0].scheduled_s - 1.0 < 1.52 for sample in run.samples)
    assert summary.attainment is not None
    assert abs(summary.attainment - (1 - hurt / len(run.samples))) <= 4 / len(run.samples)
    assert summary.misses["ttft"] == len(run.samples) - summary.good

    naive = load(script, schedule_of(seconds=5.0, output=4, arrivals=ClosedLoop(1)))
    taken = [
        sample.record().e2e_s or 0.0 for sample in naive.samples
    ]  # the stall may come before or after the first token
    assert percentile(taken, 95) < 0.1 + close_s(), "it hardly notices that for 2 s of 5 nothing moved"
    assert max(taken) > 1.5


@best_of_five
def test_a_stall_is_the_longest_gap_of_the_streams_that_it_met() -> None:
    run = load(Behavior(ttft_s=0.02, tpot_s=0.01, stall_at_s=0.5, stall_s=0.4), schedule_of(20, 1.0, output=30))

    met = [
        (sample.record().stall_s or 0.0, record)
        for sample, record in run.pairs()
        if record.written_s[0] - run.records[0].arrived_s < 0.5 < record.written_s[-1] - run.records[0].arrived_s - 0.4
    ]
    assert len(met) >= 3
    for stall_s, record in met:
        true_s = max(later - earlier for earlier, later in zip(record.written_s, record.written_s[1:], strict=False))
        assert true_s > 0.39
        assert abs(stall_s - true_s) < 5 * close_s()
    assert is_close(median(stall for stall, _ in met), 0.410)


def test_errors_refusals_and_drops_are_misses_and_none_vanishes() -> None:
    script = Behavior(ttft_s=0.05, tpot_s=0.01, fail_every=5, drop_every=7, max_in_flight=4)
    run = load(script, schedule_of(60, 1.5, output=6))

    num_requests = run.result.schedule.num_requests
    assert [sample.index for sample in run.samples] == list(range(num_requests))
    outcomes = Counter(sample.outcome for sample in run.samples)
    statuses = Counter(record.status for record in run.records)
    dropped = sum(record.is_cancelled for record in run.records)
    assert outcomes[Outcome.REFUSED] == statuses[429] > 0
    assert dropped > 0
    assert outcomes[Outcome.ERROR] == statuses[500] + dropped
    assert outcomes[Outcome.OK] == num_requests - statuses[429] - statuses[500] - dropped
    summary = run.summary(SLO(ttft_s=10.0))
    assert summary.scheduled == num_requests
    assert summary.attainment == outcomes[Outcome.OK] / num_requests
    for sample, record in run.pairs():
        if record.is_cancelled:
            assert len(sample.chunk_times_s) == 2, "what came before the connection broke is kept"
            assert "connection" in sample.error


def test_what_is_never_answered_times_out() -> None:
    run = load(Behavior(ttft_s=60.0), schedule_of(20, 1.0), timeout_s=0.3)

    assert {sample.outcome for sample in run.samples} == {Outcome.TIMED_OUT}
    assert len(run.samples) == run.result.schedule.num_requests == 20
    assert run.summary(SLO(ttft_s=1.0)).attainment == 0.0
    assert run.result.wall_s < 30


def test_what_is_not_answered_when_the_run_ends_is_a_miss() -> None:
    run = load(Behavior(ttft_s=60.0), schedule_of(20, 1.0), drain_s=0.2)

    assert {sample.outcome for sample in run.samples} == {Outcome.TIMED_OUT}
    assert len(run.samples) == 20


@best_of_five
def test_a_saturated_server_serves_its_capacity() -> None:
    script = Behavior(ttft_s=0.02, tpot_s=0.01, slots=3)
    run = load(script, schedule_of(seconds=2.5, output=9, arrivals=ClosedLoop(6)))

    ended = [sample for sample in run.samples if sample.outcome is Outcome.OK]
    rate = len(ended) / max(sample.chunk_times_s[-1] for sample in ended)
    assert script.capacity(9) == pytest.approx(30.0)
    assert 0.85 * 30 < rate <= 30.5
    assert run.median("ttft") > 0.1, "who waits for a slot waits"


@best_of_five
def test_one_and_four_workers_send_the_same_and_see_the_same() -> None:
    schedule = schedule_of(40, 2.0, output=8, burstiness=1.0)
    one, four = load(PACED, schedule), load(PACED, schedule, workers=4)

    def sent(run: Run) -> dict[int, str]:
        return {sample.index: record.digest for sample, record in run.pairs()}

    assert sent(one) == sent(four)
    assert len(sent(one)) == schedule.num_requests
    assert sorted(record.digest for record in one.records) == sorted(record.digest for record in four.records)
    assert [s.scheduled_s for s in one.samples] == [s.scheduled_s for s in four.samples]
    for figure in ("ttft", "tpot", "e2e"):
        assert abs(one.median(figure) - four.median(figure)) < 2 * close_s()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the worker by /proc")
def test_a_client_that_stood_still_makes_the_run_invalid() -> None:
    """Stopped for 300 ms, the worker sends what was due late, and says so; it does not blame the server."""
    stopped: list[int] = []

    def stop_once(live: Live) -> None:
        if not stopped and live.elapsed_s > 0.5:
            stopped.extend(worker_pids())
            os.kill(stopped[0], signal.SIGSTOP)
            threading.Timer(0.3, os.kill, (stopped[0], signal.SIGCONT)).start()

    run = load(PACED, schedule_of(60, 2.0), watch=stop_once)

    assert stopped
    fault = run.summary().client_fault
    assert "requests more than 5.0 ms late" in fault
    late_s = max(sample.record().send_lag_s for sample in run.samples)
    assert late_s > 0.1
    assert len(run.samples) == run.result.schedule.num_requests


@best_of_five
def test_an_honest_client_does_not() -> None:
    assert load(PACED, schedule_of(40, 1.5)).summary().client_fault == ""


def test_a_body_that_takes_long_to_make_is_the_clients_fault() -> None:
    """A planted slow client: its loop makes bodies of millions of words while others are due."""
    schedule = schedule_of(60, 1.5)
    chains = list(schedule.chains)
    heavy = dataclasses.replace(chains[40].requests[0], segments=(Segment("heavy", 4_000_000),))
    chains[40] = dataclasses.replace(chains[40], requests=(heavy,))
    run = load(PACED, dataclasses.replace(schedule, chains=tuple(chains)))

    assert run.summary().client_fault != ""
    assert not math.isnan(run.median("ttft"))
