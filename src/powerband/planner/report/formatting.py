"""Deployments and their figures as people name them, the same in tables, pages and reasons."""

from __future__ import annotations

from collections.abc import Mapping

from powerband.engines.registry import ADAPTERS
from powerband.metrics.shown import plain, time_interval_text, time_text
from powerband.planner.results import Prediction
from powerband.spec.deployment import Deployment, Replica, ReplicaPool

NEVER_S = 1e6  # so long takes only what never ends
# What binds, in the words of a sentence.
BOUND_WORDS = {
    "memory": "memory for the KV cache",
    "bandwidth": "the bandwidth of memory",
    "compute": "arithmetic",
    "link": "links between devices",
    "host": "the host",
    "queueing": "waiting for a free replica",
}


def engine_text(deployment: Deployment) -> str:
    return ADAPTERS[deployment.engine].display_name


def deployment_text(deployment: Deployment) -> str:
    """'vLLM on 2 × L4 int8', 'vLLM on 1 × (4 L4, TP 4)', and for several pools who takes which prompts."""
    pools = [_pool_text(pool) for pool in deployment.pools]
    return f"{engine_text(deployment)} on {' and '.join(pools)}"


def replica_text(replica: Replica) -> str:
    """'L4 int8', '(4 L4, TP 2 × PP 2, fp8)'."""
    layout = layout_text(replica)
    precision = "" if replica.quantization == "none" else replica.quantization
    if replica.num_devices == 1:
        return " ".join(part for part in (replica.device, precision, layout) if part)
    return f"({', '.join(part for part in (f'{replica.num_devices} {replica.device}', layout, precision) if part)})"


def layout_text(replica: Replica) -> str:
    """'TP 2 × PP 2', 'TP 4, experts divided', 'weights 40 % in host memory'; '' for one device that holds all."""
    parts = [
        f"{name} {ranks}"
        for name, ranks in (("TP", replica.tensor_parallel), ("PP", replica.pipeline_parallel))
        if ranks > 1
    ]
    found = [" × ".join(parts)] if parts else []
    if replica.expert_parallel > 1:
        found.append("experts divided")
    if replica.offload_share:
        found.append(f"{replica.offload_share:.0%} of weights in host memory")
    return ", ".join(found)


def precision_text(replica: Replica) -> str:
    """'16-bit', 'int4, KV fp8'."""
    weights = "16-bit" if replica.quantization == "none" else replica.quantization.replace("_", " ")
    return weights if replica.kv_precision == "16bit" else f"{weights}, KV {replica.kv_precision}"


def banded_seconds(figure: Prediction) -> str:
    """'620 ms (510–800 ms)'; '∞' where requests pile up."""
    if figure.value >= NEVER_S:
        return brief_seconds(figure.value)
    high = "∞" if figure.high >= NEVER_S else None
    band = f"{brief_seconds(figure.low)}–{high}" if high else time_interval_text((figure.low, figure.high))
    return f"{brief_seconds(figure.value)} ({band})"


def brief_seconds(value: float) -> str:
    """Three digits that count: '62.3 ms', '1.24 s'; what never ends is '∞'."""
    return time_text(value) if value < NEVER_S else "∞"


def dollars(value: float | None) -> str:
    """'$4.60'; '-' where no price is known."""
    if value is None:
        return "-"
    return f"${value:,.2f}" if value >= 0.095 else f"${value:.3g}"


def price_lines(machines: Mapping[str, int], origins: Mapping[str, str]) -> list[str]:
    """Of each kind of machine: how many of it, and where its price comes from."""
    return [
        f"{count} × {plain(name)}" + (f": {plain(origin)}" if (origin := origins.get(name)) else "")
        for name, count in machines.items()
    ]


def _pool_text(pool: ReplicaPool) -> str:
    prompts = "" if pool.max_prompt_tokens is None else f" for prompts up to {pool.max_prompt_tokens:,} tokens"
    return f"{pool.count} × {replica_text(pool.replica)}{prompts}"
