"""The page's answers at other rates and limits are the planner's own, and its plan files and commands are a plan's."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_plan_search import plan_request

from powerband.cost.latency import LatencyModel
from powerband.errors import UsageError
from powerband.planner.candidates import replica_options
from powerband.planner.estimates import SizedReplica, deployment_price, replica_counts, sized_replicas
from powerband.planner.picked import deployment_id, picked
from powerband.planner.plan_request import PlanRequest, mean_turns, request_tokens
from powerband.planner.remedies import meets_slo
from powerband.planner.report.page_data import page_data
from powerband.planner.results import Evaluation, PlanResults
from powerband.planner.search import search
from powerband.planner.selection import plan_from
from powerband.planner.simulation.task import SimulationTask, run_simulation_task
from powerband.spec.plan import Plan
from powerband.spec.slo import SLO

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs node")
COMMAND = (
    "powerband",
    "plan",
    "a model",
    "--devices",
    "L4,A100-80G",
    "--rate",
    "4",
    "--slo=ttft=1s,tpot=60ms",
    "--json",
    "-o",
    "x.yaml",
)
REQUEST = plan_request("L4,A100-80G", max_devices=4)


@pytest.fixture(scope="module", autouse=True)
def short_simulations() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("powerband.planner.search._SECONDS", 10.0)
        patch.setattr("powerband.planner.search._MIN_REQUESTS", 40)
        yield


@pytest.fixture(scope="module")
def found() -> PlanResults:
    return search(REQUEST, workers=1)


@pytest.fixture(scope="module")
def page(found: PlanResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's own JavaScript, with the page's data in `data`."""
    script = tmp_path_factory.mktemp("page") / "estimates.js"
    source = files("powerband.planner.report").joinpath("page", "estimates.js").read_text()
    script.write_text(f"{source}\nconst data = {json.dumps(page_data(found, COMMAND))};\n")
    return script


@pytest.fixture(scope="module")
def units() -> dict[Any, SizedReplica]:
    schedule = REQUEST.schedule(REQUEST.rate, 2000)
    kinds, _ = replica_options(REQUEST.spec, REQUEST.stored, REQUEST.space)
    return {
        unit.replica: unit for unit in sized_replicas(REQUEST, kinds, request_tokens(schedule), mean_turns(schedule))
    }


def in_page(page: Path, expression: str) -> Any:
    """What it answers."""
    script = f"{page.read_text()}\nconsole.log(JSON.stringify({expression}));\n"
    made = subprocess.run([str(NODE), "-"], input=script, capture_output=True, text=True, check=True, timeout=60)
    return json.loads(made.stdout)


def answers(page: Path, *questions: tuple[float, float | None, float | None]) -> list[dict[str, Any]]:
    """To questions of (rate, TTFT, TPOT): {evaluations, recommended, isMoved}."""
    asked = json.dumps([dict(zip(("rate", "ttft", "tpot"), one, strict=True)) for one in questions])
    found = in_page(page, f"{asked}.map((question) => Estimates.answer(data, question))")
    return [one | {"by_id": {each["id"]: each for each in one["evaluations"]}} for one in found]


def test_at_the_asked_point_the_page_shows_the_plan_itself(found: PlanResults, page: Path):
    (shown,) = answers(page, (REQUEST.rate, 1.0, 0.06))
    assert not shown["isMoved"]
    assert found.evaluations[shown["recommended"]] is found.recommended
    assert [one["meets_slo"] for one in shown["evaluations"]] == [one.meets_slo for one in found.evaluations]


def test_estimates_at_another_rate_are_the_closed_form_times_what_simulations_found(
    found: PlanResults, units: dict[Any, SizedReplica], page: Path
):
    rates, compared = (1.0, 3.1, 9.0, 25.0), 0
    for rate, answer in zip(rates, answers(page, *((rate, 1.0, 0.06) for rate in rates)), strict=True):
        for one in found.evaluations:
            pool, name = one.deployment.pools[0], deployment_id(one.deployment)
            if one.curve is None or name not in answer["by_id"]:
                continue
            form = units[pool.replica].forms[0]
            exact, load = form.at(rate / pool.count), rate / pool.count / form.capacity
            for figure, seconds in (("ttft_s", exact.ttft_high_s), ("tpot_s", exact.tpot_high_s)):
                shown = answer["by_id"][name]["figures"][figure]
                if shown is None:
                    assert load > 0.99
                elif load < 0.95:
                    assert shown[0] == pytest.approx(seconds * one.corrections.get(figure, 1.0), rel=0.03)
                    compared += 1
    assert compared > 100


def test_limits_at_the_simulated_rate_are_judged_by_the_simulated_requests(found: PlanResults, page: Path):
    for one in [one for one in found.evaluations if one.method == "simulation" and one.curve is not None][:2]:
        ttft_s, tpot_s = one.figures["ttft_s"].high, one.figures["tpot_s"].high
        limits = [(ttft_s * factor, tpot_s * factor) for factor in (0.7, 0.97, 1.03, 1.3)]
        found_by_page = answers(page, *((REQUEST.rate, *pair) for pair in limits))
        for (ttft_s, tpot_s), answer in zip(limits, found_by_page, strict=True):
            again = replace(REQUEST, slo=SLO(ttft_s=ttft_s, tpot_s=tpot_s))
            shown = answer["by_id"][deployment_id(one.deployment)]
            assert (shown["how"], shown["meets_slo"]) == ("simulation", meets_slo(again, slowly(again, one)))


def slowly(request: PlanRequest, one: Evaluation) -> Any:
    """As the search simulates it at the band's slow edge."""
    replica = one.deployment.pools[0].replica
    band = LatencyModel(request.spec, request.profile(replica.device), replica, one.deployment.engine).band
    return run_simulation_task(request, SimulationTask(one.deployment, request.rate, 40, slowdown=1 + band))


def test_what_the_recommended_one_holds_by_simulation_is_what_the_page_says(found: PlanResults, page: Path):
    chosen = found.recommended
    assert chosen is not None
    assert len(chosen.simulated) > 1
    name, holds = deployment_id(chosen.deployment), chosen.figures["capacity"].low
    missed = [one.rate for one in chosen.simulated if not any(x <= 1 and y <= 0.06 for x, y in one.kept_limits)]
    rates = {REQUEST.rate * 1.001: True, holds: True, **dict.fromkeys(missed, False)}
    rates = {rate: kept and rate <= holds for rate, kept in rates.items()}
    for kept, answer in zip(rates.values(), answers(page, *((rate, 1.0, 0.06) for rate in rates)), strict=True):
        shown = answer["by_id"][name]
        if answer["isMoved"]:
            assert (shown["meets_slo"], shown["how"]) == (kept, "simulation")
            assert shown["figures"]["capacity"][1] == pytest.approx(holds, rel=1e-4)


def test_every_deployment_s_highest_rate_is_the_planner_s(found: PlanResults, page: Path):
    rate = REQUEST.rate * 1.5
    (answer,) = answers(page, (rate, 1.0, 0.06))
    compared = 0
    for one in found.evaluations:
        shown = answer["by_id"].get(deployment_id(one.deployment))
        if one.curve is not None and shown is not None:
            holds = one.figures["capacity"].low
            assert shown["figures"]["capacity"][1] == pytest.approx(holds, rel=1e-3, abs=1e-6)
            assert shown["meets_slo"] == (holds >= rate)
            compared += 1
    assert compared > 20


def test_a_higher_rate_is_answered_with_more_replicas_at_their_own_price(
    found: PlanResults, units: dict[Any, SizedReplica], page: Path
):
    planned = {deployment_id(one.deployment): one.deployment for one in found.evaluations}
    (answer,) = answers(page, (60.0, 1.0, 0.2))
    added = [one for one in answer["evaluations"] if one["id"] not in planned]
    assert added
    for one in added:
        alike = next(known for name, known in planned.items() if _replicas(name) == _replicas(one["id"]))
        pool = replace(alike.pools[0], count=one["count"])
        deployment = replace(alike, pools=(pool,))
        assert deployment_id(deployment) == one["id"]
        assert deployment_price(REQUEST, deployment)["usd_per_hour"] == one["usd_per_hour"]
        request = replace(REQUEST, rate=60.0, pick=one["id"])
        assert replica_counts(request, units[pool.replica]) == [one["count"]], "--pick looks at this number"


def _replicas(name: str) -> str:
    return name.partition("x")[2]


def test_every_deployment_has_a_plan_file_that_is_its_plan(found: PlanResults, page: Path):
    texts = in_page(page, "data.evaluations.map((one) => Estimates.planFile(data, one, Estimates.asked(data)))")
    for text, one in zip(texts, found.evaluations, strict=True):
        ours, theirs = Plan.from_dict(yaml.load(text, yaml.CSafeLoader)), plan_from(REQUEST, one)
        assert (ours.model, ours.deployment) == (theirs.model, theirs.deployment)
        assert ours.workload.as_dict() == theirs.workload.as_dict()
        assert (ours.slo, ours.promise.rate) == (theirs.slo, theirs.promise.rate)
        assert ours.promise.output_tokens_per_s == pytest.approx(theirs.promise.output_tokens_per_s, rel=1e-5)
        for name, figure in theirs.predicted.items():
            if math.isfinite(figure.high):
                assert ours.predicted[name].high == pytest.approx(figure.high, rel=1e-5)
        assert (ours.cost and dict(ours.cost.machines)) == (theirs.cost and dict(theirs.cost.machines))
        assert text.startswith("# This deployment misses the SLO.") == (not one.meets_slo)


def test_its_command_finds_the_deployment_again(found: PlanResults, page: Path):
    one = next(one for one in found.evaluations if not one.meets_slo)
    name = deployment_id(one.deployment)
    text = in_page(page, f"Estimates.command(data, Estimates.asked(data), {json.dumps(name)})")
    expected = ["powerband", "plan", "a model", "--devices", "L4,A100-80G", "--rate", "4", "--slo", "ttft=1s,tpot=60ms"]
    assert shlex.split(text) == [*expected, "--pick", name, "-o", "plan.yaml"]
    (again,) = search(replace(REQUEST, pick=name), workers=1).evaluations
    assert (again.deployment, again.method) == (one.deployment, "simulation")


def test_a_moved_question_is_in_the_command(page: Path):
    text = in_page(page, 'Estimates.command(data, { rate: 6.5, ttft: null, tpot: 0.0455 }, "")')
    assert shlex.split(text)[5:9] == ["--rate", "6.5", "--slo", "tpot=45.5ms@p95"]
    assert SLO.parse("tpot=45.5ms@p95").tpot_s == pytest.approx(0.0455)


def test_ids_are_unique_in_a_plan(found: PlanResults):
    ids = [deployment_id(one.deployment) for one in found.evaluations]
    assert len(set(ids)) == len(ids)


def test_a_pick_that_does_not_exist_names_the_nearest(found: PlanResults):
    with pytest.raises(UsageError, match="has no such deployment") as refused:
        search(replace(REQUEST, pick="vllm-1xL5-16bit-seqs256-tokens2048"), workers=1)
    assert "vllm-1xL4-16bit-seqs256-tokens2048" in refused.value.hint
    with pytest.raises(UsageError, match="this plan has none"):
        picked("nearest", found)
    assert picked("recommended", found) is found.recommended
