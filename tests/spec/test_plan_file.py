"""A plan in its file: everything that reproduces a deployment, and nothing that nobody understands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from powerband.errors import UsageError
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.plan import Plan, PlanCost, Prediction, Promise, read_plan, write_plan
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import OpenLoop
from powerband.spec.workload.presets import preset
from powerband.spec.workload.workload import Workload

SMALL = Replica(device="L4", quantization="int8", max_model_len=4096, max_num_seqs=64)
LARGE = Replica(device="H100", tensor_parallel=2, max_model_len=8192)
PLAN = Plan(
    model="meta-llama/Llama-3.1-8B",
    workload=Workload(name="rag", arrivals=OpenLoop.at(8.0), requests=preset("rag").mix),
    slo=SLO.parse("ttft=1s@p95,tpot=60ms@p95"),
    promise=Promise(8.0, 1200.0),
    deployment=Deployment(
        engine="vllm", pools=(ReplicaPool(replica=SMALL, count=3, max_prompt_tokens=2000), ReplicaPool(replica=LARGE))
    ),
    predicted={"ttft_s": Prediction(0.6, 0.5, 0.8)},
    cost=PlanCost(usd_per_hour=9.4, usd_per_million_tokens=1.9, machines={"aws g6.xlarge": 3}),
)


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    write_plan(PLAN, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == PLAN


def test_the_file_says_every_limit_even_where_it_is_the_default(tmp_path: Path) -> None:
    write_plan(PLAN, tmp_path / "plan.yaml")
    replica = yaml.safe_load((tmp_path / "plan.yaml").read_text())["deployment"]["pools"][1]["replica"]
    assert replica["max_num_seqs"] == 256
    assert replica["pipeline_parallel"] == 1


def test_a_promise_alone_is_a_plan_too() -> None:
    bare = replace(PLAN, deployment=None, predicted={}, cost=None)
    assert Plan.from_dict(bare.as_dict()) == bare


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"engine": "fast"}, "plan: deployment: engine: 'fast'"),
        ({"pools": []}, "Pools take prompts up to"),
        ({"pools": [{"replica": {"device": "L4", "max_model_len": 4096, "speed": 1}}]}, "'speed' is unknown"),
        ({"pools": [{"replica": {"device": "L4", "max_model_len": 4096}, "longest_prompt": 5}]}, "Pools take prompts"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], sentence: str) -> None:
    values = PLAN.as_dict()
    values["deployment"] = {**values["deployment"], **change}
    with pytest.raises(UsageError, match=sentence.replace("(", r"\(")):
        Plan.from_dict(values)


def test_devices_are_those_of_all_pools() -> None:
    deployment = PLAN.deployment
    assert deployment is not None
    assert deployment.num_devices == 5


def test_a_plan_of_version_0_1_0_still_loads(tmp_path: Path) -> None:
    """plan.yaml was written by `powerband plan` before names changed; only a pool's limit was renamed."""
    saved = Path(__file__).parent / "written_by_0_1_0" / "plan.yaml"
    plan = read_plan(saved)
    assert plan.deployment is not None
    [pool] = plan.deployment.pools
    assert (plan.deployment.engine, pool.count, pool.replica.device) == ("vllm", 1, "L4")
    assert plan.slo is not None
    assert (plan.slo.ttft_s, plan.slo.tpot_s, plan.slo.attainment) == (1.0, 0.06, 0.95)
    assert (plan.promise.rate, plan.predicted["capacity"].low) == (2.0, 105.45156727642276)
    assert plan.cost is not None
    assert plan.cost.machines == {"gcp g2-standard-4": 1}
    write_plan(plan, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == saved.read_text().replace("longest_prompt", "max_prompt_tokens")
