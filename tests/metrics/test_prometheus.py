"""The exposition, parsed by prometheus_client: every alias exists and equals its twin."""

from dataclasses import asdict
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families

from powerband.core.kv_cache import CacheUsage
from powerband.core.scheduler import SchedulerStats
from powerband.metrics.prometheus import ALIASES, LATENCY_BUCKETS_S, EngineMetrics
from powerband.metrics.record import RequestRecord

# The names that others' dashboards, gateways and autoscalers read.
EXPECTED = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
    "num_preemptions": "counter",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "iteration_tokens_total": "histogram",
}
STATS = asdict(
    SchedulerStats(
        num_running=3,
        num_waiting=2,
        num_waiting_tokens=50,
        paused=False,
        cache=CacheUsage(num_blocks=8, num_used=2, num_cached=1),
        num_steps=9,
        num_requests=5,
        num_refused=1,
        num_preemptions=4,
        prompt_tokens=100,
        generation_tokens=10,
        prefix_queries=100,
        prefix_hits=60,
    )
)


@pytest.fixture
def metrics():
    metrics = EngineMetrics('a "model"')
    metrics.observe_first_tokens(1, ttft_s=0.2, prompt_tokens=9)
    metrics.observe_tokens(2, gap_s=0.01)
    metrics.observe_step(12)
    record = RequestRecord(
        scheduled_s=5.0,
        sent_s=5.0,
        chunk_times_s=(5.2, 5.21),
        chunk_tokens=(1, 2),
        prompt_tokens=9,
        output_tokens=3,
    )
    metrics.observe_request(record, finished_reason="stop", first_scheduled_s=5.05)
    metrics.observe_rejection("queue_full")
    metrics.update(STATS)
    return metrics


def parsed(metrics):
    return {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}


def values(family):
    samples = {}
    for sample in family.samples:
        labels = tuple(sorted(sample.labels.items()))
        samples[sample.name.removeprefix(family.name), labels] = sample.value
    return samples


def test_every_alias_exists_and_equals_its_twin(metrics):
    families = parsed(metrics)
    assert set(ALIASES.values()) == set(EXPECTED)
    for ours, theirs in ALIASES.items():
        alias = families[f"vllm:{theirs}"]
        assert alias.type == EXPECTED[theirs]
        assert alias.samples
        assert values(alias) == values(families[f"powerband_{ours}"])


def test_figures_are_what_was_observed(metrics):
    registry = metrics.registry
    labels = {"model_name": 'a "model"', "engine": "0"}

    def value(name, **more):
        return registry.get_sample_value(name, labels | more)

    assert value("vllm:num_requests_running") == 3
    assert value("vllm:kv_cache_usage_perc") == 0.25
    assert value("vllm:num_preemptions_total") == 4
    assert value("vllm:prefix_cache_hits_total") == 60
    assert value("vllm:prompt_tokens_total") == 9
    assert value("vllm:generation_tokens_total") == 3
    assert value("vllm:request_success_total", finished_reason="stop") == 1
    assert value("powerband_requests_refused_total", reason="queue_full") == 1
    assert value("vllm:inter_token_latency_seconds_count") == 2
    assert value("vllm:inter_token_latency_seconds_sum") == pytest.approx(0.01)
    assert value("vllm:request_queue_time_seconds_sum") == pytest.approx(0.05)
    assert value("vllm:request_prefill_time_seconds_sum") == pytest.approx(0.15)
    assert value("vllm:request_decode_time_seconds_sum") == pytest.approx(0.01)
    assert value("vllm:e2e_request_latency_seconds_sum") == pytest.approx(0.21)
    assert value("vllm:iteration_tokens_total_sum") == 12


def test_buckets_are_cumulative_and_end_with_all(metrics):
    buckets = [s.value for s in parsed(metrics)["powerband_ttft_seconds"].samples if s.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 1


def test_latency_buckets_resolve_a_healthy_queue():
    assert list(LATENCY_BUCKETS_S) == sorted(set(LATENCY_BUCKETS_S))
    assert sum(bound < 0.3 for bound in LATENCY_BUCKETS_S) > 20
    assert all(b / a < 1.5 for a, b in pairwise(LATENCY_BUCKETS_S) if b < 50)


def test_unknown_reasons_add_no_series(metrics):
    before = len(metrics.render().splitlines())
    metrics.observe_rejection("made_up_by_a_user")
    record = RequestRecord(scheduled_s=0.0, sent_s=0.0)
    metrics.observe_request(record, finished_reason="made_up", first_scheduled_s=0.0)
    assert len(metrics.render().splitlines()) == before


def test_two_replicas_in_one_process_do_not_clash():
    assert EngineMetrics("a").render() != EngineMetrics("b").render()
