"""The search: what it recommends, what it finds when nothing will do, and fleets of two kinds of devices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest

from model_configs import LLAMA_8B
from powerband.cost.latency import LatencyModel
from powerband.errors import UsageError
from powerband.planner.candidates import replica_options
from powerband.planner.estimates import estimate, sized_replicas
from powerband.planner.mixed_pools import mixed_deployments
from powerband.planner.plan_request import PlanRequest, mean_turns, request_tokens
from powerband.planner.results import PlanResults
from powerband.planner.search import search
from powerband.planner.simulation.task import SimulationTask, run_simulation_task
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.hardware.catalog import load_catalog
from powerband.spec.model.checkpoint_precision import CheckpointPrecision
from powerband.spec.model.reader import read_model_spec
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import OpenLoop
from powerband.spec.workload.lengths import Fixed, LogNormal, Uniform
from powerband.spec.workload.workload import Conversation, RequestMix, Workload

MIX = RequestMix(Uniform(100, 400), Uniform(10, 60))


def plan_request(
    devices: str = "A100-80G", *, rate: float = 4.0, slo: str = "ttft=1s,tpot=60ms", **values: Any
) -> PlanRequest:
    found = {
        "model": "llama",
        "spec": read_model_spec(LLAMA_8B),
        "stored": CheckpointPrecision(),
        "profiles": [load_catalog().find(name) for name in devices.split(",")],
        "engines": ("vllm",),
        "workload": Workload(name="test", arrivals=OpenLoop.at(rate), requests=values.pop("mix", MIX)),
        "rate": rate,
        "slo": SLO.parse(slo),
        "max_model_len": 1024,
        "max_devices": 2,
        "quantizations": ("none",),
        **values,
    }
    return PlanRequest(**found)


@pytest.fixture(scope="module", autouse=True)
def short_simulations() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("powerband.planner.search._SECONDS", 15.0)
        patch.setattr("powerband.planner.search._MIN_REQUESTS", 40)
        yield


@pytest.fixture(scope="module")
def found() -> PlanResults:
    return search(plan_request("L4,A100-80G"), workers=1)


def test_the_cheapest_that_keeps_the_slo_is_recommended(found: PlanResults) -> None:
    chosen = found.recommended
    assert chosen is not None
    assert chosen.method == "simulation"
    assert chosen.figures["attainment"].low >= 0.95
    assert chosen.figures["tpot_s"].high <= 0.06
    cheaper = [e for e in found.evaluations if e.meets_slo and (e.usd_per_hour or 0) < (chosen.usd_per_hour or 0)]
    assert not [e for e in cheaper if e.method == "simulation"]
    assert not chosen.dominated


def test_every_edge_of_a_band_is_on_its_side(found: PlanResults) -> None:
    for evaluation in found.evaluations:
        for name in ("ttft_s", "tpot_s", "e2e_mean_s"):
            figure = evaluation.figures[name]
            assert figure.low <= figure.value <= figure.high or math.isnan(figure.value)


def test_it_answers_what_is_asked_and_holds_a_little_more(found: PlanResults) -> None:
    chosen = found.recommended
    assert chosen is not None
    assert chosen.figures["output_tokens_per_s"].value == pytest.approx(4.0 * MIX.output.mean, rel=0.2)
    capacity = chosen.figures["capacity"]
    assert 4.0 <= capacity.low <= capacity.value <= capacity.high


def test_equal_questions_get_equal_answers(found: PlanResults) -> None:
    again = search(plan_request("L4,A100-80G"), workers=1)
    assert again.evaluations == found.evaluations


def test_an_slo_that_nothing_keeps_has_a_nearest_one() -> None:
    none = search(plan_request(slo="ttft=1s,tpot=1ms"), workers=1)
    assert none.recommended is None
    assert "nearest" in none.alternatives
    assert none.reasons


def test_a_budget_is_kept() -> None:
    none = search(plan_request(budget_usd_per_h=0.5), workers=1)
    assert none.recommended is None
    assert "budget" in " ".join(none.reasons)


def test_a_model_that_fits_nowhere_says_so() -> None:
    with pytest.raises(UsageError, match=r"needs .* GB"):
        search(plan_request("T4", max_devices=1, engines=("trtllm",)), workers=1)


def test_throughput_never_rises_when_a_replica_is_removed() -> None:
    asked = plan_request(rate=60.0, max_devices=4)
    replica = Replica(device="A100-80G", max_model_len=1024, max_num_seqs=16)

    def tokens_per_s(count: int) -> float:
        where = Deployment(engine="vllm", pools=(ReplicaPool(replica=replica, count=count),))
        return run_simulation_task(asked, SimulationTask(where, 60.0, 300)).figures["output_tokens_per_s"]

    rates = [tokens_per_s(count) for count in (1, 2, 3)]
    assert rates == sorted(rates)


def test_more_bandwidth_and_memory_is_never_slower() -> None:
    asked = plan_request(rate=12.0)
    [profile] = asked.profiles
    better = replace(profile, bandwidth_bytes_per_s=1.5 * profile.bandwidth_bytes_per_s)
    where = Deployment(engine="vllm", pools=(ReplicaPool(replica=Replica(device=profile.name, max_model_len=1024)),))
    slow, fast = (
        run_simulation_task(replace(asked, profiles=[one]), SimulationTask(where, 12.0, 200)).figures
        for one in (profile, better)
    )
    for name in ("ttft_mean_s", "tpot_mean_s", "e2e_mean_s"):
        assert fast[name] <= slow[name]


def test_the_closed_form_is_near_the_simulation() -> None:
    """Near enough to choose what to simulate: on average within a quarter."""
    asked = plan_request("L4,A100-80G", slo="ttft=1s,tpot=150ms")
    found, _ = replica_options(asked.spec, asked.stored, asked.space)
    requests = request_tokens(asked.schedule(4.0, 500))
    ratios = []
    for unit in sized_replicas(asked, [kind for kind in found if kind.replica.pipeline_parallel == 1], requests, 1.0):
        if unit.replica.max_num_seqs == 256 and unit.replica.max_num_batched_tokens == 2048:
            here = replace(asked, rate=0.5 * unit.slo_rate)
            guess = estimate(here, unit, 1)
            played = run_simulation_task(here, SimulationTask(guess.deployment, here.rate, 150))
            ratios += [guess.figures[name].value / played.figures[name] for name in ("tpot_mean_s", "e2e_mean_s")]
    assert ratios
    assert fmean(ratios) == pytest.approx(1.0, abs=0.25)


def test_answers_with_a_grammar_take_a_little_longer() -> None:
    def tpots_s(**mix: Any) -> tuple[float, float]:
        asked = plan_request("A100-80G", engines=("powerband",), mix=replace(MIX, **mix))
        [kind, *_], _ = replica_options(asked.spec, asked.stored, asked.space)
        [unit, *_] = sized_replicas(asked, [kind], request_tokens(asked.schedule(4.0, 300)), 1.0)
        guess = estimate(asked, unit, 1)
        played = run_simulation_task(asked, SimulationTask(guess.deployment, asked.rate, 60))
        return guess.figures["tpot_mean_s"].value, played.figures["tpot_mean_s"]

    for free_s, bound_s in zip(tpots_s(), tpots_s(form="structured"), strict=True):
        assert 1.005 < bound_s / free_s < 1.1


def test_a_candidate_in_closed_form_takes_a_few_milliseconds_at_most() -> None:
    """The project's goal is one; benchmarks/planner_speed.py measures it. Steps are what costs: they are counted."""
    asked, calls = plan_request("A100-80G"), 0
    real = LatencyModel.step_s

    def counting(self: LatencyModel, works: Any, sampled: int) -> float:
        nonlocal calls
        calls += 1
        return real(self, works, sampled)

    found, _ = replica_options(asked.spec, asked.stored, asked.space)
    requests = request_tokens(asked.schedule(4.0, 500))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatencyModel, "step_s", counting)
        number = len(list(sized_replicas(asked, found, requests, 1.0)))
    assert calls / number < 30


def test_conversations_arrive_at_the_rate_and_count_by_their_turns() -> None:
    talk = RequestMix(Fixed(50), Fixed(20), conversation=Conversation(Fixed(4), think_s=1.0))
    asked = plan_request(mix=talk)
    schedule = asked.schedule(4.0, 400)
    assert mean_turns(schedule) == 4
    found, _ = replica_options(asked.spec, asked.stored, asked.space)
    unit = next(iter(sized_replicas(asked, found, request_tokens(schedule), 4.0)))
    assert estimate(asked, unit, 1).figures["output_tokens_per_s"].value == pytest.approx(4 * 4 * 20)


def test_fleets_send_short_prompts_to_one_device_and_long_ones_to_another() -> None:
    asked = plan_request(
        "L4,A100-80G",
        slo="ttft=3s,tpot=200ms",
        mix=RequestMix(LogNormal(200, 1.2, high=3000), Fixed(30)),
        max_model_len=4096,
        max_devices=8,
    )
    found, _ = replica_options(asked.spec, asked.stored, asked.space)
    requests = request_tokens(asked.schedule(4.0, 500))
    mixed = mixed_deployments(asked, list(sized_replicas(asked, found, requests, 1.0)), requests, 1.0)
    assert mixed
    for fleet in mixed:
        short, long = fleet.deployment.pools
        assert short.replica.device != long.replica.device
        assert short.max_prompt_tokens is not None
        assert fleet.deployment.num_devices <= 8
    played = run_simulation_task(asked, SimulationTask(mixed[0].deployment, 4.0, 150))
    assert played.figures["attainment"] > 0.8


def test_at_a_low_rate_the_highest_one_is_not_the_last_that_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried are at most eight times the asked rate: beyond, a fast device's rate is the closed form's."""
    for name in ("_BISECTIONS", "_MAX_SIMULATED", "_FRONTIER_SIMULATED", "_MAX_ALTERNATIVE_ROUNDS"):
        monkeypatch.setattr(f"powerband.planner.search.{name}", 1)
    chosen = search(plan_request("A100-80G", rate=0.02, max_devices=1), workers=1).recommended
    assert chosen is not None
    capacity = chosen.figures["capacity"]
    assert capacity.low == pytest.approx(8 * 0.02)
    assert capacity.value > 1.0
    assert capacity.high >= capacity.value
