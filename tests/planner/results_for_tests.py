"""Findings as a search makes them, from a plain roofline: weights and KV read at each step, a queue that fills up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from powerband.planner.report.formatting import deployment_text, dollars
from powerband.planner.results import Evaluation, PlanResults, Prediction, Pruned
from powerband.spec.deployment import Deployment, EngineName, Quantization, Replica, ReplicaPool
from powerband.spec.slo import SLO

SLO_ = SLO.parse("ttft=1s@p95,tpot=60ms@p95")
WORKLOAD = {"name": "chat", "arrivals": {"kind": "rate", "rate": 3.0}, "requests": {"prompt": 1155, "output": 211}}
# Name: memory, GB/s, TFLOP/s, links GB/s, dollars.
DEVICES: dict[str, tuple[float, float, float, float, float]] = {
    "L4": (24e9, 300, 60, 16, 0.805),
    "A10G": (24e9, 600, 60, 16, 1.006),
    "A100-80G": (80e9, 2039, 250, 300, 3.43),
    "H100": (80e9, 3350, 700, 450, 6.88),
}
BYTES: dict[Quantization, float] = {"none": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.55}
PROMPT, OUTPUT, PARAMETERS, KV_BYTES = 1155, 211, 8.03e9, 131_072


def banded(value: float, band: float = 0.15) -> Prediction:
    return Prediction(value, value / (1 + band), value * (1 + band))


def evaluation(
    device: str = "L4",
    count: int = 2,
    *,
    tensor: int = 1,
    stages: int = 1,
    quantization: Quantization = "fp8",
    engine: EngineName = "vllm",
    rate: float = 3.0,
    **limits: Any,
) -> Evaluation:
    memory, bandwidth, flops, link, price = DEVICES[device]
    ranks = tensor * stages
    weights = PARAMETERS * BYTES[quantization] / ranks
    kv_tokens = int((memory * 0.9 - weights - 1.5e9) * ranks / KV_BYTES)
    arriving = rate / count
    prefill_s = 2 * PARAMETERS * PROMPT / (flops * 1e12 * 0.5 * tensor) + 2 * 32 * PROMPT * 8192 / (link * 1e9) * (
        tensor > 1
    )
    tpot_s = weights * stages / (bandwidth * 1e9 * 0.8) + 1.2e-3 + (tensor > 1) * 64 * 2e-5
    for _ in range(30):  # requests at once, and what they add
        busy = min(arriving * tpot_s * OUTPUT, 256.0)
        read = busy * (PROMPT + OUTPUT / 2) * KV_BYTES / ranks / (bandwidth * 1e9 * 0.8)
        tpot_s = weights * stages / (bandwidth * 1e9 * 0.8) + 1.2e-3 + read + (tensor > 1) * 64 * 2e-5
        tpot_s *= 1 / max(1 - arriving * prefill_s / stages, 0.05)
    load = min(arriving * prefill_s / stages + busy * 1366 / kv_tokens, 1.4)
    ttft_s = 2.2 * prefill_s / max(1 - load, 1e-9) + 0.02 if load < 0.98 else math.inf
    capacity = rate / load
    kept = 1 / (1 + math.exp(4 * (math.log(min(ttft_s, 1e3)) - 0.5))) if ttft_s < math.inf else 0.0
    kept = min(kept if tpot_s < 0.06 else kept * 0.4, 1.0)
    figures = {
        "ttft_s": banded(ttft_s, 0.25),
        "tpot_s": banded(tpot_s * 1.25, 0.12),
        "e2e_s": banded(ttft_s + tpot_s * 520, 0.15),
        "ttft_mean_s": banded(ttft_s / 2, 0.2),
        "tpot_mean_s": banded(tpot_s, 0.1),
        "e2e_mean_s": banded(ttft_s / 2 + tpot_s * OUTPUT),
        "attainment": Prediction(kept, kept * 0.97, min(kept * 1.02, 1.0)),
        "output_tokens_per_s": banded(min(rate, capacity) * OUTPUT, 0.03),
        "capacity": banded(capacity, 0.12),
    }
    settings = Replica(
        device=device,
        tensor_parallel=tensor,
        pipeline_parallel=stages,
        quantization=quantization,
        kv_precision="fp8" if quantization == "fp8" else "16bit",
        max_model_len=8192,
        **limits,
    )
    decode = 0.55 - 0.2 * load
    return Evaluation(
        deployment=Deployment(engine=engine, pools=(ReplicaPool(replica=settings, count=count),)),
        method="simulation" if kept > 0.2 else "closed form",
        figures=figures,
        meets_slo=figures["ttft_s"].high <= 1 and figures["tpot_s"].high <= 0.06,
        usd_per_hour=price * count * ranks,
        binds="queueing" if load > 0.9 else "bandwidth" if decode > 0.4 else "compute",
        operators={
            "projections": decode,
            "attention decode": 0.25 - 0.05 * load,
            "attention prefill": 0.02 + 0.2 * load,
            "head": 0.05,
            "collectives": 0.08 * (tensor > 1),
            "norms and activations": 0.06,
            "launches": 0.07 + 0.05 * load - 0.08 * (tensor > 1),
        },
        kv_tokens=kv_tokens,
        weights_bytes=int(weights),
        notes=("fp8 kernels of this device were not measured: bands are wider",) if device == "L4" else (),
    )


def mixed() -> Evaluation:
    """Two kinds of devices: requests are divided by the length of their prompts."""
    first, second = evaluation("L4", 3), evaluation("A100-80G", 1, quantization="none")
    pools = (replace(first.deployment.pools[0], max_prompt_tokens=1500), second.deployment.pools[0])
    return replace(
        second,
        deployment=Deployment(engine="vllm", pools=pools),
        usd_per_hour=3 * 0.805 + 3.43,
        notes=("Pools are played one by one.",),
    )


def all_evaluations(engines: tuple[EngineName, ...], limits: tuple[int, ...], rate: float) -> Iterator[Evaluation]:
    for engine in engines:
        for device in DEVICES:
            for quantization in BYTES:
                for tensor, stages in ((1, 1), (2, 1), (1, 2), (4, 1)):
                    for count in (1, 2, 3, 4, 6, 8):
                        if tensor * stages * count > 8 or (quantization == "fp8" and device.startswith("A1")):
                            continue
                        for seqs in limits:
                            yield evaluation(
                                device,
                                count,
                                tensor=tensor,
                                stages=stages,
                                quantization=quantization,
                                engine=engine,
                                rate=rate,
                                max_num_seqs=seqs,
                            )


def results(
    *,
    engines: tuple[EngineName, ...] = ("vllm",),
    limits: tuple[int, ...] = (256,),
    rate: float = 3.0,
    budget: float | None = 5.0,
    slo: SLO = SLO_,
    model: str = "meta-llama/Meta-Llama-3-8B-Instruct",
) -> PlanResults:
    """About 150 deployments for each engine and each of `limits` (max_num_seqs)."""
    marked = [
        replace(e, meets_slo=all(e.figures[f"{name}_s"].high <= limit for name, limit in slo.limits.items()))
        for e in _marked([*all_evaluations(engines, limits, rate), mixed()])
    ]
    good = [e for e in marked if e.meets_slo and (budget is None or (e.usd_per_hour or 0) <= budget)]
    good.sort(key=lambda e: (e.usd_per_hour or 0, e.figures["ttft_s"].value))
    chosen = good[0] if good else None
    ordered = sorted(marked, key=lambda e: (not e.meets_slo, e.usd_per_hour or 0, e.figures["ttft_s"].value))
    alternatives = {"nearest": min(marked, key=lambda e: e.figures["ttft_s"].value)}
    reasons: tuple[str, ...] = ("Nothing on offer answers in time.",)
    if chosen is not None:
        price = chosen.usd_per_hour or 0.0
        front = [e for e in ordered if not e.dominated]
        alternatives = {
            "cheaper": max((e for e in front if (e.usd_per_hour or 0) < price), key=lambda e: e.usd_per_hour or 0),
            "faster": min(
                (e for e in front if e.figures["ttft_s"].value < chosen.figures["ttft_s"].value * 0.7 and e.meets_slo),
                key=lambda e: e.usd_per_hour or 0,
            ),
        }
        reasons = (
            "What binds is the bandwidth of memory; a replica's time goes into projections 50%, attention decode 20%.",
            f"Cheaper: {deployment_text(alternatives['cheaper'].deployment)} would miss TTFT.",
            f"Faster: {deployment_text(alternatives['faster'].deployment)} for "
            f"{dollars(alternatives['faster'].usd_per_hour)} an hour.",
        )
    return PlanResults(
        model=model,
        objective="cost",
        rate=rate,
        slo=slo,
        workload=WORKLOAD,
        evaluations=tuple(ordered),
        pruned=(
            *(
                Pruned(f"vllm on 1 L4, none, TP {tp}", f"does not fit: needs {30.2 + tp} GB, has 22.1 GB", 3)
                for tp in range(1, 6)
            ),
            Pruned("vllm on A10G in fp8", "A10G has no fp8 units", 12),
            Pruned(
                "trtllm on L4 in int8", "it needs a checkpoint that was quantized so (ask for it with --quantization)"
            ),
        ),
        recommended=chosen,
        reasons=reasons,
        alternatives=alternatives,
        seconds=12.4,
        budget_usd_per_hour=budget,
    )


def _marked(found: list[Evaluation]) -> list[Evaluation]:
    """Dominated: another costs no more and is no slower in TTFT and TPOT."""
    points = [((e.usd_per_hour or 0), e.figures["ttft_s"].value, e.figures["tpot_s"].value) for e in found]
    marked = []
    for number, (one, point) in enumerate(zip(found, points, strict=True)):
        better = (all(b <= a for a, b in zip(point, other, strict=True)) and other != point for other in points)
        same_before = point in points[:number]
        marked.append(replace(one, dominated=any(better) or same_before))
    return marked
