"""Plan results as plain tables for --json: names that stay, with their units, and nothing that JSON cannot hold.

    {schema, model, objective, rate_requests_per_s, slo, budget_usd_per_hour, workload, seconds, reasons,
     recommended, alternatives: indices into evaluations (null: none),
     evaluations: [{id, name, engine, pools, method, figures: {name: {value, low, high}}, …}], the best first
     pruned: [{what, reason, count}]}

What never ends is null.
"""

from __future__ import annotations

import math
from typing import Any

from powerband.planner.picked import deployment_id
from powerband.planner.report.formatting import NEVER_S, deployment_text
from powerband.planner.results import Evaluation, PlanResults, Prediction
from powerband.spec.deployment import ReplicaPool
from powerband.spec.yaml_codec import as_record

SCHEMA = "powerband.findings/1"
# Figures whose unit is not in their name.
_NAMES = {"attainment": "attainment_share", "capacity": "capacity_requests_per_s"}


def results_as_dict(results: PlanResults) -> dict[str, Any]:
    numbers = {id(evaluation): number for number, evaluation in enumerate(results.evaluations)}

    def number_of(evaluation: Evaluation | None) -> int | None:
        if evaluation is None:
            return None
        found = numbers.get(id(evaluation))
        return found if found is not None else results.evaluations.index(evaluation)

    return {
        "schema": SCHEMA,
        "model": results.model,
        "objective": results.objective,
        "rate_requests_per_s": results.rate,
        "slo": results.slo.as_dict(),
        "budget_usd_per_hour": results.budget_usd_per_hour,
        "price_origins": dict(results.price_origins),
        "workload": dict(results.workload),
        "cut": results.cut,
        "seconds": results.seconds,
        "reasons": list(results.reasons),
        "recommended": number_of(results.recommended),
        "alternatives": {name: number_of(one) for name, one in results.alternatives.items()},
        "evaluations": [evaluation_as_dict(evaluation) for evaluation in results.evaluations],
        "pruned": [as_record(one, complete=True) for one in results.pruned],
    }


def evaluation_as_dict(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "id": deployment_id(evaluation.deployment),
        "name": deployment_text(evaluation.deployment),
        "engine": evaluation.deployment.engine,
        "devices": evaluation.deployment.num_devices,
        "pools": [_pool(pool) for pool in evaluation.deployment.pools],
        "method": evaluation.method,
        "meets_slo": evaluation.meets_slo,
        "dominated": evaluation.dominated,
        "usd_per_hour": evaluation.usd_per_hour,
        "machines": dict(evaluation.machines),
        "usd_per_million_tokens": evaluation.usd_per_million_tokens,
        "figures": {_NAMES.get(name, name): _banded(figure) for name, figure in evaluation.figures.items()},
        "binds": evaluation.binds,
        "operator_shares": dict(evaluation.operators),
        "kv_tokens": evaluation.kv_tokens,
        "weights_bytes": evaluation.weights_bytes,
        "notes": list(evaluation.notes),
    }


def _pool(pool: ReplicaPool) -> dict[str, Any]:
    return {
        "count": pool.count,
        "max_prompt_tokens": pool.max_prompt_tokens,
        "longest_prompt_tokens": pool.max_prompt_tokens,  # its name in 0.1: for this release
        "replica": as_record(pool.replica, complete=True),
    }


def _banded(figure: Prediction) -> dict[str, float | None]:
    return {name: finite(getattr(figure, name)) for name in ("value", "low", "high")}


def finite(value: float) -> float | None:
    """None: it never ends."""
    return value if math.isfinite(value) and value < NEVER_S else None
