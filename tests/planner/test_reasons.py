"""Reasons name figures that are in the evaluations, and fall silent where there is nothing to compare with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from model_configs import model_config
from powerband.planner.candidates import ReplicaOption, SearchSpace, replica_options
from powerband.planner.report.formatting import deployment_text
from powerband.planner.report.reasons import reasons
from powerband.planner.results import Evaluation, Prediction, Pruned
from powerband.spec.deployment import Deployment, Replica, ReplicaPool
from powerband.spec.hardware.catalog import load_catalog
from powerband.spec.model.checkpoint_precision import read_for_planning
from powerband.spec.slo import SLO

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
SLO_ = SLO.parse("ttft=1s@p95,tpot=60ms@p95")


def evaluation(device: str, count: int, ttft_s: float, dollars: float, *, tp: int = 1) -> Evaluation:
    replica = Replica(device=device, tensor_parallel=tp, max_model_len=8192)
    return Evaluation(
        deployment=Deployment(engine="vllm", pools=(ReplicaPool(replica=replica, count=count),)),
        method="simulation",
        figures={
            "ttft_s": Prediction(ttft_s, ttft_s * 0.8, ttft_s * 1.2),
            "tpot_s": Prediction(0.04, 0.035, 0.045),
            "capacity": Prediction(count * 2.5, count * 2.2, count * 2.8),
            "output_tokens_per_s": Prediction(800.0, 790.0, 800.0),
        },
        meets_slo=ttft_s * 1.2 <= 1,
        usd_per_hour=dollars,
        binds="bandwidth",
        operators={"projections": 0.6, "attention decode": 0.2, "head": 0.1, "norms and activations": 0.1},
        kv_tokens=40_000,
        weights_bytes=16 << 30,
    )


def told(
    chosen: Evaluation | None, *others: Evaluation, budget: float | None = None, **alternatives: Evaluation
) -> str:
    all_of_them = [*([chosen] if chosen else []), *others]
    return "\n".join(reasons(chosen, all_of_them, alternatives, slo=SLO_, rate=8.0, budget_usd_per_h=budget))


def test_what_binds_and_where_the_time_goes() -> None:
    assert "the bandwidth of memory" in told(evaluation("L4", 4, 0.6, 2.8))
    assert "projections 60%, attention decode 20%, head 10%." in told(evaluation("L4", 4, 0.6, 2.8))


def test_one_replica_less_is_said_to_break_what_it_breaks() -> None:
    chosen, fewer = evaluation("L4", 4, 0.6, 2.8), evaluation("L4", 3, 1.4, 2.1)
    assert "3 of these replicas would not do: TTFT would be 1.40 s (1.12–1.68 s) of 1.00 s." in told(chosen, fewer)
    assert "would not do" not in told(chosen, evaluation("L4", 3, 0.7, 2.1))


def test_what_a_cheaper_and_a_faster_choice_give_up() -> None:
    chosen = evaluation("L4", 4, 0.6, 2.8)
    text = told(chosen, cheaper=evaluation("L4", 3, 0.9, 2.1), faster=evaluation("H100", 1, 0.1, 5.6))
    but = "but TTFT is predicted as 900 ms (0.720–1.08 s), and 1.08 s would be more than 1.00 s."
    assert f"Cheaper: vLLM on 3 × L4 saves $0.70 an hour, {but}" in text
    assert "Faster: vLLM on 1 × H100 (TTFT 600 ms → 100 ms, TPOT 40.0 ms → 40.0 ms), for 2 times the price." in text


def test_the_price_at_which_another_device_would_do() -> None:
    text = told(evaluation("L4", 4, 0.6, 2.8), evaluation("A100-80G", 1, 0.2, 3.5))
    assert "vLLM on 1 × A100-80G would be as cheap if its price fell by 20% (from $3.50 to $2.80 an hour)." in text


def test_when_nothing_keeps_the_slo_the_nearest_is_named() -> None:
    nearest = evaluation("L4", 8, 1.5, 5.6)
    text = told(None, nearest, nearest=nearest)
    assert "Nearest is vLLM on 8 × L4: TTFT would be 1.50 s (1.20–1.80 s) of 1.00 s." in text


def test_a_budget_that_is_too_small_says_what_is_enough() -> None:
    text = told(None, evaluation("L4", 4, 0.6, 2.8), evaluation("H100", 1, 0.1, 5.6), budget=1.0)
    assert "The budget of $1.00 an hour is too small" in text
    assert "vLLM on 4 × L4 at $2.80" in text


def test_deployments_are_named_as_people_do() -> None:
    layout = Replica(device="L4", tensor_parallel=2, pipeline_parallel=2, quantization="fp8", max_model_len=64)
    alone = Replica(device="A10G", quantization="int8", offload_share=0.4, max_model_len=64)
    mixed = Deployment(
        engine="trtllm",
        pools=(ReplicaPool(replica=layout, count=3, max_prompt_tokens=1000), ReplicaPool(replica=alone)),
    )
    assert deployment_text(mixed) == (
        "TensorRT-LLM on 3 × (4 L4, TP 2 × PP 2, fp8) for prompts up to 1,000 tokens and "
        "1 × A10G int8 40% of weights in host memory"
    )
    assert replace(mixed, engine="vllm", pools=mixed.pools[1:]).num_devices == 1


def test_where_blocks_of_scales_leave_tensor_parallelism_out_the_reason_says_what_would_allow_it(
    tmp_path: Path,
) -> None:
    """Qwen2.5-72B in AWQ has 29,568 inputs of down_proj in groups of 128; Qwen publishes it padded to 29,696."""

    def options(width: int) -> tuple[list[ReplicaOption], list[Pruned]]:
        config = model_config(8192, 80, 64, 8, width, 152064, model_type="qwen2")
        file = tmp_path / "config.json"
        file.write_text(json.dumps({**config, "quantization_config": AWQ}))
        profile = load_catalog().find("A100-80G")
        space = SearchSpace(profiles=[profile], engines=["vllm"], max_devices=4, max_model_len=4096)
        return replica_options(*read_for_planning(file), space)

    found, pruned = options(29568)
    assert {option.replica.tensor_parallel for option in found} == {1}
    nearest = evaluation("A100-80G", 4, 2.63, 20.27)
    found_reasons = reasons(
        None, [nearest], {"nearest": nearest}, slo=SLO_, rate=1.0, budget_usd_per_h=None, pruned=pruned
    )
    text = "\n".join(found_reasons)
    assert "With tensor parallelism it would be faster, but the checkpoint does not allow it" in text
    assert "each of 4 ranks would have 7392 inputs of down_proj" in text
    assert "a checkpoint with 29696 of them" in text
    assert {option.replica.tensor_parallel for option in options(29696)[0]} == {1, 2, 4}
