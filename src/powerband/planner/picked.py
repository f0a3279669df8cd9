"""Deployments by name: the id that the page and the JSON show, and the one of a plan that --pick asks for."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from powerband.errors import UsageError
from powerband.planner.results import Evaluation, PlanResults
from powerband.spec.deployment import Deployment, EngineName, Replica, ReplicaPool

ROLES = ("recommended", "cheaper", "faster", "nearest")


def deployment_id(deployment: Deployment) -> str:
    """'vllm-4xL4-fp8-kvfp8-seqs64-tokens2048': unique among the deployments of a plan."""
    return f"{deployment.engine}-{'+'.join(_pool_id(pool) for pool in deployment.pools)}"


def replica_id(replica: Replica) -> str:
    """'L4-tp2-fp8-seqs256-tokens2048'."""
    parts = [
        re.sub(r"[^A-Za-z0-9.-]+", "_", replica.device),
        f"tp{replica.tensor_parallel}" if replica.tensor_parallel > 1 else "",
        f"pp{replica.pipeline_parallel}" if replica.pipeline_parallel > 1 else "",
        f"ep{replica.expert_parallel}" if replica.expert_parallel > 1 else "",
        "16bit" if replica.quantization == "none" else replica.quantization,
        f"kv{replica.kv_precision}" if replica.kv_precision != "16bit" else "",
        f"offload{replica.offload_share * 100:g}" if replica.offload_share else "",
        f"seqs{replica.max_num_seqs}-tokens{replica.max_num_batched_tokens}",
    ]
    return "-".join(part for part in parts if part)


def picked_count(pick: str | None, engine: EngineName, replica: Replica) -> int | None:
    """How many of these replicas --pick asks for; None: of others, or of several kinds."""
    found = re.fullmatch(rf"{engine}-([1-9]\d{{0,5}})x{re.escape(replica_id(replica))}", pick or "")
    return int(found[1]) if found is not None else None


def only_picked(pick: str | None, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The evaluations of this id, or all without one. Raises UsageError for an id that none has."""
    if pick is None or pick in ROLES:
        return list(evaluations)
    found = [one for one in evaluations if deployment_id(one.deployment) == pick]
    if not found:
        known = sorted({deployment_id(one.deployment) for one in evaluations})
        near = difflib.get_close_matches(pick, known, n=3, cutoff=0.0)
        raise UsageError(
            f"pick is '{pick}'; the search has no such deployment.",
            hint=f"It is one of {', '.join(ROLES)}, or an id from --html or --json, like {' or '.join(near)}.",
            param="pick",
        )
    return found


def picked(pick: str, results: PlanResults) -> Evaluation:
    """Raises UsageError for a role that no deployment has."""
    if pick not in ROLES:
        return results.recommended or results.evaluations[0]
    found = results.recommended if pick == "recommended" else results.alternatives.get(pick)
    if found is None:
        known = [*(["recommended"] if results.recommended else []), *results.alternatives]
        raise UsageError(
            f"pick is '{pick}'; this plan has none.", hint=f"It has: {', '.join(known) or 'none'}.", param="pick"
        )
    return found


def _pool_id(pool: ReplicaPool) -> str:
    limit = f"-prompts{pool.max_prompt_tokens}" if pool.max_prompt_tokens else ""
    return f"{pool.count}x{replica_id(pool.replica)}{limit}"
