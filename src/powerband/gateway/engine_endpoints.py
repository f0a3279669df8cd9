"""What each engine calls its probe and its figures. Sources: their documentation, and vLLM's, TensorRT-LLM's and
llama.cpp's code.

SGLang shows metrics only with --enable-metrics; TensorRT-LLM shows these in recent versions, where its options ask for
them (read in its code, not tried). A replica that shows none is judged by its probe and by the bytes that come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from powerband.dispatch.backend import ReplicaLoad
from powerband.metrics.exposition import total
from powerband.spec.deployment import EngineName

# Servers that replicas may be. openai: any other that speaks OpenAI's API, such as Ollama, LM Studio, LocalAI and
# Dynamo: all that is known of it is that GET /v1/models lists what it serves.
ServerName = Literal[EngineName, "llamacpp", "openai"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEndpoints:
    """Paths, and names of metrics: requests running and waiting, share of KV cache in use (0 to 1), tokens so far.

    metrics_path '': it has no metrics that are known.
    """

    ready_path: str = "/health"
    metrics_path: str = "/metrics"
    running: bytes = b""
    waiting: bytes = b""
    kv_usage: bytes = b""
    tokens: tuple[bytes, ...] = ()  # counters: if they grow, the engine computes


ENGINE_ENDPOINTS: dict[ServerName, EngineEndpoints] = {
    "powerband": EngineEndpoints(
        ready_path="/readyz",  # says 503 when steps do not advance
        running=b"powerband_requests_running",
        waiting=b"powerband_requests_waiting",
        kv_usage=b"powerband_kv_cache_usage_ratio",
        tokens=(b"powerband_prompt_tokens_total", b"powerband_generation_tokens_total"),
    ),
    "vllm": EngineEndpoints(
        running=b"vllm:num_requests_running",
        waiting=b"vllm:num_requests_waiting",
        kv_usage=b"vllm:kv_cache_usage_perc",
        tokens=(b"vllm:prompt_tokens_total", b"vllm:generation_tokens_total"),
    ),
    "sglang": EngineEndpoints(
        running=b"sglang:num_running_reqs",
        waiting=b"sglang:num_queue_reqs",
        kv_usage=b"sglang:token_usage",
        tokens=(b"sglang:prompt_tokens_total", b"sglang:generation_tokens_total"),
    ),
    "trtllm": EngineEndpoints(
        metrics_path="/prometheus/metrics",
        running=b"trtllm_num_requests_running",
        waiting=b"trtllm_num_requests_waiting",
        kv_usage=b"trtllm_kv_cache_utilization",
        tokens=(b"trtllm_prompt_tokens_total", b"trtllm_generation_tokens_total"),
    ),
    "llamacpp": EngineEndpoints(  # metrics only with --metrics
        running=b"llamacpp:requests_processing",
        waiting=b"llamacpp:requests_deferred",
        kv_usage=b"llamacpp:kv_cache_usage_ratio",
        tokens=(b"llamacpp:prompt_tokens_total", b"llamacpp:tokens_predicted_total"),
    ),
    "openai": EngineEndpoints(ready_path="/v1/models", metrics_path=""),
}


def read_load(page: bytes, names: EngineEndpoints) -> ReplicaLoad:
    """From a page of metrics in Prometheus' text form; sums over label sets. A page of 100 kB takes 0.1 ms."""
    running, waiting = total(page, names.running), total(page, names.waiting)
    counts = [value for value in (total(page, name) for name in names.tokens) if value is not None]
    return ReplicaLoad(
        running=None if running is None else int(running),
        waiting=None if waiting is None else int(waiting),
        kv_usage=total(page, names.kv_usage),
        tokens=sum(counts) if counts else None,
    )
