"""A point's figures under the names that other tools give to the same: same formula, same unit as in their files.

Given only where the definition is the same. Not among them, because theirs differ: vLLM's ITL (gaps between
chunks, whatever they carry), SGLang's TPOT (its end is the stream's, not the last token's), GuideLLM's TPOT (E2E / n),
and every end-to-end latency (theirs counts from sending). Latencies here are those of the window, throughputs of the
whole run, as those tools count them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from powerband.metrics.figures import Distribution

if TYPE_CHECKING:
    from powerband.bench.report.results import Point

# Statistic → how the tool writes it. Percentiles as numbers.
_VLLM: dict[str | float, str] = {"mean": "mean", 50.0: "median", 99.0: "p99"}
_AIPERF: dict[str | float, str] = {"mean": "avg", 50.0: "p50", 90.0: "p90", 95.0: "p95", 99.0: "p99"}
_GUIDELLM: dict[str | float, str] = {"mean": "mean", 50.0: "p50", 90.0: "p90", 95.0: "p95", 99.0: "p99"}
# Our figure → name with a place for the statistic, and the statistics.
_LATENCIES: dict[str, tuple[tuple[str, dict[str | float, str]], ...]] = {
    "service_ttft": (
        ("vllm_{}_ttft_ms", _VLLM),
        ("sglang_{}_ttft_ms", _VLLM),
        ("aiperf_time_to_first_token_{}_ms", _AIPERF),
        ("guidellm_time_to_first_token_ms_{}", _GUIDELLM),
    ),
    "tpot": (
        ("vllm_{}_tpot_ms", _VLLM),
        ("aiperf_inter_token_latency_{}_ms", _AIPERF),
        ("guidellm_inter_token_latency_ms_{}", _GUIDELLM),
    ),
}


def aliases(point: Point) -> dict[str, float]:
    """Other tools' names → values, without percentiles of too few requests."""
    found: dict[str, float] = {}
    for figure, names in _LATENCIES.items():
        distribution = point.summary.figures.get(figure)
        if distribution is None:
            continue
        for name, statistics in names:
            for statistic, written in statistics.items():
                value = _statistic(distribution, statistic)
                if value is not None:
                    found[name.format(written)] = value * 1000
    for tool in ("vllm", "sglang"):
        found[f"{tool}_request_throughput"] = point.whole.requests_per_s
        found[f"{tool}_output_throughput"] = point.whole.output_tokens_per_s
    return found


def _statistic(distribution: Distribution, which: str | float) -> float | None:
    return distribution.mean if isinstance(which, str) else distribution.percentiles[which]
