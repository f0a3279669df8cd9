"""The simulator: against queueing theory, and against what can be reckoned by hand."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest
from plans import NO_HOST, PlainModel, deployment, drawn, played

from powerband.metrics.figures import Window, summarize
from powerband.metrics.record import Outcome
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.workload.arrivals import ClosedLoop
from powerband.spec.workload.lengths import Fixed, LogNormal, Uniform
from powerband.spec.workload.workload import Conversation, SharedPrefix


def constant(step_s: float) -> PlainModel:
    return PlainModel(step_s, 0.0, 0.0)


def test_one_request_takes_its_prefill_and_its_decodes() -> None:
    host = replace(NO_HOST, step_s=1e-3, per_request_s=1e-4, arrival_s=0.02, answer_s=5e-3)
    record = played(drawn(1, output=Fixed(3)), model=PlainModel(0.01, 1e-5, 0.0, host)).records[0]
    assert record.ttft_s == pytest.approx(0.02 + 1.1e-3 + 0.01 + 100e-5 + 5e-3)
    assert record.tpot_s == pytest.approx(1.1e-3 + 0.01 + 1e-5)
    assert (record.prompt_tokens, record.output_tokens, record.chunk_tokens) == (100, 3, (1, 1, 1))


def test_overlapped_host_work_is_hidden_behind_the_device() -> None:
    host = replace(NO_HOST, step_s=4e-3, overlapped=True)
    assert played(drawn(1), model=PlainModel(0.01, 0, 0, host)).records[0].tpot_s == pytest.approx(0.01)
    slow = replace(host, step_s=0.015)  # the last step awaits no other
    assert played(drawn(1), model=PlainModel(0.01, 0, 0, slow)).records[0].tpot_s == pytest.approx(0.015, rel=0.03)


def queue(load: float, num_requests: int, seed: int) -> tuple[list[float], list[float]]:
    """Arrivals and waits of requests that are served one at a time, each for 10 ms."""
    schedule = drawn(num_requests, rate=load / 0.01, prompt=Fixed(8), output=Fixed(1), seed=seed)
    one = deployment(max_num_seqs=1, enable_prefix_caching=False)
    records = played(schedule, one, constant(0.01)).records
    return [record.scheduled_s for record in records], [(record.ttft_s or 0) - 0.01 for record in records]


@pytest.mark.parametrize("load", [0.3, 0.5])
def test_constant_service_waits_as_the_queue_m_d_1(load: float) -> None:
    """Pollaczek and Khinchine: mean wait = load · service / (2 · (1 − load))."""
    waits = [wait for seed in range(2) for wait in queue(load, 10_000, seed)[1]]
    assert fmean(waits) == pytest.approx(load * 0.01 / (2 * (1 - load)), rel=0.02)


def test_every_wait_follows_from_the_one_before() -> None:
    """Lindley's recursion, at a load where means of a few thousand requests are still far from the theory's."""
    times, waits = queue(0.9, 3000, seed=1)
    expected = 0.0
    for i, wait in enumerate(waits):
        expected = max(expected + 0.01 - (times[i] - times[i - 1]), 0.0) if i else 0.0
        assert wait == pytest.approx(expected, abs=1e-9)


def test_a_closed_loop_keeps_littles_law() -> None:
    """Users = throughput · (time in the system + time to think)."""
    users, think_s = 12, 0.5
    schedule = drawn(1500, output=Uniform(5, 60), arrivals=ClosedLoop(users, think_s))
    simulation = played(schedule, deployment(max_num_seqs=8))
    late = [r for r in simulation.records if r.scheduled_s > 5]
    end_s = 0.8 * max(r.scheduled_s for r in late)  # after that, the first users have no more to ask
    done = [r for r in late if r.scheduled_s + (r.e2e_s or 0) <= end_s]
    per_s = len(done) / (end_s - 5)
    assert per_s * (fmean(r.e2e_s or 0 for r in done) + think_s) == pytest.approx(users, rel=0.05)


def test_tokens_are_conserved() -> None:
    schedule = drawn(300, rate=40, prompt=LogNormal(150, 1.0, high=900), output=Uniform(1, 90))
    simulation = played(schedule, deployment(2, max_num_seqs=16), num_blocks=160)
    planned = [request for chain in schedule.chains for request in chain.requests]
    assert [r.output_tokens for r in simulation.records] == [request.output_tokens for request in planned]
    assert [r.prompt_tokens for r in simulation.records] == [request.new_tokens for request in planned]
    assert all(sum(r.chunk_tokens) == r.output_tokens for r in simulation.records)
    assert simulation.total("num_preemptions") > 0


def test_equal_seeds_give_equal_results() -> None:
    def run() -> object:
        talk = Conversation(Uniform(1, 4), think_s=0.2)
        schedule = drawn(80, output=Uniform(1, 40), conversation=talk, prefix=SharedPrefix(Fixed(64), 3), seed=5)
        return played(schedule, deployment(2, draft_tokens=3, draft_acceptance=0.6)).records

    assert run() == run()


def test_a_prompt_that_is_too_long_is_refused() -> None:
    simulation = played(drawn(3, prompt=Fixed(300)), deployment(max_model_len=200))
    assert [record.outcome for record in simulation.records] == [Outcome.REFUSED] * 3
    assert summarize(simulation.records, Window(0, 10)).outcomes == {"refused": 3}


def test_a_shared_prefix_is_computed_once() -> None:
    simulation = played(drawn(50, prefix=SharedPrefix(Fixed(64))))
    assert [record.cached_tokens for record in simulation.records] == [0] + [64] * 49
    assert simulation.total("prefix_hits") == 49 * 64


def test_a_later_turn_finds_all_that_was_said_before() -> None:
    talk = Conversation(Fixed(3), think_s=1.0)
    schedule = drawn(3, prompt=Fixed(40), output=Fixed(20), conversation=talk)
    records = played(schedule).records
    assert [record.prompt_tokens for record in records] == [40, 100, 160]
    # Whole blocks of 16; the last answer token was never an input, so that its block is not complete in the cache.
    assert [record.cached_tokens for record in records] == [0, 48, 112]
    for before, after, request in zip(records, records[1:], schedule.chains[0].requests[1:], strict=False):
        assert after.scheduled_s == pytest.approx(before.chunk_times_s[-1] + request.think_s)


def test_a_conversation_stays_with_its_replica() -> None:
    talk = Conversation(Fixed(5), think_s=0.1)
    records = played(drawn(100, rate=2, conversation=talk), deployment(4)).records
    turns = [request.turn for chain in drawn(100, rate=2, conversation=talk).chains for request in chain.requests]
    assert all(record.cached_tokens > 0 for record, turn in zip(records, turns, strict=True) if turn)


def test_replicas_share_the_load() -> None:
    schedule = drawn(400, rate=60, output=Uniform(5, 60))
    one, four = (played(schedule, deployment(count, max_num_seqs=4)) for count in (1, 4))
    assert max(r.busy_s for r in four.replicas) < 1.3 * min(r.busy_s for r in four.replicas)
    assert four.seconds < one.seconds


def test_prompts_go_to_the_pool_for_their_length() -> None:
    short, long = (Replica(device="none", max_model_len=4096) for _ in range(2))
    mixed = Deployment(
        engine="vllm", pools=(ReplicaPool(replica=short, max_prompt_tokens=200), ReplicaPool(replica=long))
    )
    schedule = drawn(100, prompt=Uniform(100, 1000))
    short_tokens, long_tokens = (r.prefix_queries for r in played(schedule, mixed).replicas)
    lengths = [request.new_tokens for chain in schedule.chains for request in chain.requests]
    assert short_tokens == sum(n for n in lengths if n <= 200)
    assert long_tokens == sum(n for n in lengths if n > 200)


def test_two_pipeline_stages_take_nearly_twice_the_throughput_of_one_with_the_same_step() -> None:
    """The step's time is that of all stages together; while one request is in the second, others are in the first."""
    schedule = drawn(200, rate=1000, output=Fixed(50))
    one = played(schedule, deployment(max_num_seqs=8), constant(0.02))
    two_stages = PlainModel(0.02, 0.0, 0.0, num_stages=2)
    two = played(schedule, deployment(max_num_seqs=16, pipeline_parallel=2), two_stages)
    assert two.seconds == pytest.approx(one.seconds / 2, rel=0.1)


def test_accepted_drafts_save_steps() -> None:
    schedule = drawn(20, rate=1, output=Fixed(200))
    plain = played(schedule)
    drafted = played(schedule, deployment(draft_tokens=3, draft_acceptance=0.7))
    mean = 1 + 0.7 + 0.7**2 + 0.7**3  # tokens of a step
    steps = fmean(len(r.chunk_tokens) for r in drafted.records)
    assert 200 / steps == pytest.approx(mean, rel=0.05)
    assert [r.output_tokens for r in drafted.records] == [r.output_tokens for r in plain.records]


def test_more_bandwidth_is_never_slower() -> None:
    schedule = drawn(300, rate=25, prompt=LogNormal(200, 0.8, high=1500), output=Uniform(5, 80))
    slow, fast = (played(schedule, model=PlainModel(0.01 / f, 2e-5, 1e-7 / f)) for f in (1, 1.3))
    pairs = zip(slow.records, fast.records, strict=True)
    e2e = [(s.e2e_s or 0, f.e2e_s or 0) for s, f in pairs]
    assert sum(f for _, f in e2e) < sum(s for s, _ in e2e)
    assert fast.seconds <= slow.seconds + 1e-9


def test_a_pause_of_a_year_costs_no_time() -> None:
    """Replicas report their load once a second, but not through a pause; what comes after it is served as before."""
    early = drawn(2, output=Fixed(3))
    late = replace(early.chains[1], start_s=366 * 86400.0)
    paused = replace(early, chains=(early.chains[0], late), duration_s=late.start_s + 1)
    first, last = played(paused).records
    assert last.scheduled_s == late.start_s
    assert last.ttft_s == pytest.approx(first.ttft_s, abs=1e-6)
