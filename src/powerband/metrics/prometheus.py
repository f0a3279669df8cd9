"""The metrics of one replica, under Powerband's names and under those that vLLM's dashboards and autoscalers read.

Each figure is kept once and shown under both names, so that the two cannot differ. Label sets are closed: the model's
served name, and reasons from a fixed list; nothing in a request can add a time series.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from powerband.metrics.record import RequestRecord

FINISHED_REASONS = ("stop", "length", "abort", "error")
REFUSED_REASONS = ("queue_full", "deadline_infeasible", "context_length_exceeded", "invalid_request", "other")

# Eight buckets per decade in the range where latencies are compared, fewer where they only need to be seen.
_STEPS = (1.0, 1.3, 1.8, 2.4, 3.2, 4.2, 5.6, 7.5)
LATENCY_BUCKETS_S = (*(round(step * 10.0**e, 7) for e in range(-4, 2) for step in _STEPS), 100.0, 300.0, 1000.0)
TOKEN_BUCKETS = tuple(2**e for e in range(21))
RATIO_BUCKETS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0, 10.0)

_HISTOGRAMS = {
    # name: (vLLM's name, '' for none, what it is, buckets)
    "ttft_seconds": ("time_to_first_token_seconds", "Arrival to first output token", LATENCY_BUCKETS_S),
    "itl_seconds": ("inter_token_latency_seconds", "Between output tokens of a request", LATENCY_BUCKETS_S),
    "tpot_seconds": ("request_time_per_output_token_seconds", "Mean time per output token", LATENCY_BUCKETS_S),
    "e2e_seconds": ("e2e_request_latency_seconds", "Arrival to last output token", LATENCY_BUCKETS_S),
    "queue_seconds": ("request_queue_time_seconds", "Arrival to first scheduled", LATENCY_BUCKETS_S),
    "prefill_seconds": ("request_prefill_time_seconds", "First scheduled to first output token", LATENCY_BUCKETS_S),
    "decode_seconds": ("request_decode_time_seconds", "First to last output token", LATENCY_BUCKETS_S),
    "request_prompt_tokens": ("request_prompt_tokens", "Prompt tokens of a request", TOKEN_BUCKETS),
    "request_generation_tokens": ("request_generation_tokens", "Output tokens of a request", TOKEN_BUCKETS),
    "step_tokens": ("iteration_tokens_total", "Prompt and output tokens that one step completed", TOKEN_BUCKETS),
    "step_residual_ratio": ("", "Observed seconds of a step by predicted ones, of every eighth step", RATIO_BUCKETS),
}
_GAUGES = {
    # figure: (our name, vLLM's name, what it is)
    "num_running": ("requests_running", "num_requests_running", "Requests being computed"),
    "num_waiting": ("requests_waiting", "num_requests_waiting", "Requests in the queue"),
    "kv_usage": ("kv_cache_usage_ratio", "kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1"),
}
_COUNTERS = {
    "num_preemptions": ("preemptions", "num_preemptions", "Requests put back to make room in the KV cache"),
    "prefix_queries": ("prefix_cache_queries", "prefix_cache_queries", "Prompt tokens looked up"),
    "prefix_hits": ("prefix_cache_hits", "prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "prompt_tokens": ("prompt_tokens", "prompt_tokens", "Prompt tokens of requests that got a first token or a vector"),
    "generation_tokens": ("generation_tokens", "generation_tokens", "Output tokens"),
}

# Ours to vLLM's, without prefixes and without the "_total" of counters.
ALIASES = {ours: theirs for ours, (theirs, _, _) in _HISTOGRAMS.items() if theirs}
ALIASES |= {ours: theirs for ours, theirs, _ in (*_GAUGES.values(), *_COUNTERS.values())}
ALIASES["requests_finished"] = "request_success"


class Histogram:
    """Counts in buckets. Plain integers: one thread observes, and a scrape from another sees a moment's state."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, weight: int = 1) -> None:
        """`weight` samples of `value`."""
        self.counts[bisect_left(self.bounds, value)] += weight
        self.sum += value * weight

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, samples up to it), ending with +Inf."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(float(bound)), total))
        return buckets


class EngineMetrics(Collector):
    """Fed by the API process: by token outputs as they come, and by the scheduler's statistics several times a second.

    It registers itself with `registry` (its own when None; never the library's global one).
    """

    def __init__(self, model_name: str, registry: CollectorRegistry | None = None) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._histograms = {name: Histogram(bounds) for name, (_, _, bounds) in _HISTOGRAMS.items()}
        self._gauges = dict.fromkeys(_GAUGES, 0.0)
        self._counters = dict.fromkeys(_COUNTERS, 0.0)
        self._finished = dict.fromkeys(FINISHED_REASONS, 0)
        self._refused = dict.fromkeys(REFUSED_REASONS, 0)
        self.num_engine_restarts = 0  # set before each scrape
        self.registry = registry or CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def observe_tokens(self, num_tokens: int, *, gap_s: float) -> None:
        """Output tokens of one request that came together, `gap_s` after its previous ones."""
        self._counters["generation_tokens"] += num_tokens
        self._histograms["itl_seconds"].observe(gap_s / num_tokens, num_tokens)

    def observe_first_tokens(self, num_tokens: int, *, ttft_s: float, prompt_tokens: int) -> None:
        """The first output tokens of a request, and with them its prompt."""
        self._counters["generation_tokens"] += num_tokens
        self._counters["prompt_tokens"] += prompt_tokens
        self._histograms["ttft_seconds"].observe(ttft_s)

    def observe_step(self, num_tokens: int) -> None:
        """One message of outputs: its output tokens, and the prompts of requests that got their first token in it."""
        self._histograms["step_tokens"].observe(num_tokens)

    def observe_residual(self, ratio: float) -> None:
        """Observed / predicted seconds of a step."""
        self._histograms["step_residual_ratio"].observe(ratio)

    def observe_request(self, record: RequestRecord, *, finished_reason: str, first_scheduled_s: float) -> None:
        """A request is over. `first_scheduled_s` on the record's clock, 0 when it never was."""
        self._finished[finished_reason if finished_reason in self._finished else "error"] += 1
        self._observe("e2e_seconds", record.e2e_s)
        self._observe("tpot_seconds", record.tpot_s)
        self._observe("request_prompt_tokens", record.prompt_tokens)
        self._observe("request_generation_tokens", record.output_tokens)
        if first_scheduled_s:
            self._observe("queue_seconds", first_scheduled_s - record.sent_s)
            if record.chunk_times_s:
                self._observe("prefill_seconds", record.chunk_times_s[0] - first_scheduled_s)
                self._observe("decode_seconds", record.chunk_times_s[-1] - record.chunk_times_s[0])

    def observe_pooled(
        self, *, num_tokens: int, e2e_s: float | None, queue_s: float | None, finished_reason: str
    ) -> None:
        """A request is over whose prompt was pooled. e2e_s: until its vector was there; None: it never was."""
        self._finished[finished_reason if finished_reason in self._finished else "error"] += 1
        self._observe("e2e_seconds", e2e_s)
        self._observe("queue_seconds", queue_s)
        self._observe("request_prompt_tokens", num_tokens)
        if e2e_s is not None:
            self._counters["prompt_tokens"] += num_tokens

    def observe_rejection(self, code: str) -> None:
        """A request was refused before it ran; `code` is the error's."""
        self._refused[code if code in self._refused else "other"] += 1

    def update(self, stats: Mapping[str, Any]) -> None:
        """Take over a SchedulerStats, by field. Its counts run since the engine's start and begin again with it."""
        cache: Mapping[str, int] = stats["cache"]
        self._gauges["num_running"] = stats["num_running"]
        self._gauges["num_waiting"] = stats["num_waiting"]
        self._gauges["kv_usage"] = cache["num_used"] / cache["num_blocks"] if cache["num_blocks"] else 0.0
        for name in ("num_preemptions", "prefix_queries", "prefix_hits"):
            self._counters[name] = stats[name]

    def figures(self) -> dict[str, float]:
        """The counters and gauges by field."""
        return {**self._counters, **self._gauges}

    def render(self) -> bytes:
        """The text that /metrics answers (content type: prometheus_client.CONTENT_TYPE_LATEST)."""
        return generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        """Every figure under our name, then under its alias."""
        ours = [*self._gauge_families(), *self._counter_families(), *self._histogram_families()]
        for family in ours:
            yield _renamed(family, family.name, f"powerband_{family.name}")
        for family in ours:
            if family.name in ALIASES:
                yield _renamed(family, family.name, f"vllm:{ALIASES[family.name]}")

    def _observe(self, name: str, value: float | None) -> None:
        if value is not None:
            self._histograms[name].observe(value)

    def _gauge_families(self) -> Iterable[Metric]:
        for field, (name, _, what) in _GAUGES.items():
            family = GaugeMetricFamily(name, what, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), self._gauges[field])
            yield family

    def _counter_families(self) -> Iterable[Metric]:
        values = list(self._labels.values())
        for field, (name, _, what) in _COUNTERS.items():
            family = CounterMetricFamily(name, what, labels=list(self._labels))
            family.add_metric(values, self._counters[field])
            yield family
        by_reason = (
            ("requests_finished", "Requests that ended, by reason", "finished_reason", self._finished),
            ("requests_refused", "Requests refused before they ran, by reason", "reason", self._refused),
        )
        for name, what, label, counts in by_reason:
            family = CounterMetricFamily(name, what, labels=[*self._labels, label])
            for reason, count in counts.items():
                family.add_metric([*values, reason], count)
            yield family
        family = CounterMetricFamily(
            "engine_restarts", "Starts of the engine's process after the first", labels=list(self._labels)
        )
        family.add_metric(values, self.num_engine_restarts)
        yield family

    def _histogram_families(self) -> Iterable[Metric]:
        for name, (_, what, _) in _HISTOGRAMS.items():
            histogram = self._histograms[name]
            family = HistogramMetricFamily(name, what, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), histogram.cumulative(), histogram.sum)
            yield family


def _renamed(family: Metric, old: str, new: str) -> Metric:
    copy = Metric(new, family.documentation, family.type)
    copy.samples = [sample._replace(name=new + sample.name.removeprefix(old)) for sample in family.samples]
    return copy
