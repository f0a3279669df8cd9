"""TensorRT-LLM's server, trtllm-serve, with its PyTorch backend.

Options as https://nvidia.github.io/TensorRT-LLM/commands/trtllm-serve/trtllm-serve.html has them for version 1.2; the
settings without an option are written to a file of LLM arguments
(https://nvidia.github.io/TensorRT-LLM/llm-api/reference.html). It supports no API key, and its streams cannot be
resumed: they carry no token ids.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from powerband.engines.base import EngineAdapter
from powerband.engines.capabilities import EngineCapabilities
from powerband.engines.launch import Command, LaunchRequest
from powerband.errors import UsageError
from powerband.folders import cache_directory

_KV = {"16bit": "auto", "fp8": "fp8"}


def _command(request: LaunchRequest) -> Command:
    replica = request.replica
    request.require(long_prefill_token_threshold=0, offload_share=0.0)
    request.to_quantize()  # raises an error: it only loads weights as stored
    if request.api_key_file is not None:
        raise UsageError(
            "trtllm-serve supports no API key.", hint="Let it listen on loopback only.", param="api_key_file"
        )
    program = request.find_program("trtllm-serve", install="pip install tensorrt_llm")
    options = {
        "--host": request.host,
        "--port": str(request.port),
        "--served_model_name": request.served_name,
        "--backend": "pytorch",
        "--tp_size": str(replica.tensor_parallel),
        "--pp_size": str(replica.pipeline_parallel),
        "--ep_size": str(replica.expert_parallel),
        "--max_seq_len": str(replica.max_model_len),
        "--max_batch_size": str(replica.max_num_seqs),
        "--max_num_tokens": str(max(replica.max_num_batched_tokens, replica.max_num_seqs)),
        "--kv_cache_free_gpu_memory_fraction": f"{_kv_share(request):.3f}",
        "--config": str(_write(_arguments(request))),
    }
    arguments = tuple(word for pair in options.items() for word in pair)
    return Command((*program, request.model, *arguments, "--enable_chunked_prefill", *request.extra))


def _kv_share(request: LaunchRequest) -> float:
    """The KV cache's fraction of the memory that weights and buffers leave free on a device."""
    parts = request.memory.parts
    left = request.profile.memory_bytes - sum(parts.values()) + parts["kv_cache"]
    return parts["kv_cache"] / left


def _arguments(request: LaunchRequest) -> dict[str, Any]:
    replica = request.replica
    kv = _KV.get(replica.kv_precision)
    if kv is None or (kv == "auto" and request.stored.kv_precision is not None):
        raise request.unsupported("kv_precision", f"The checkpoint has {request.stored.kv_precision or 'no scales'}.")
    found: dict[str, Any] = {
        "kv_cache_config": {"enable_block_reuse": replica.enable_prefix_caching, "dtype": kv},
        "enable_iter_perf_stats": True,
        "return_perf_metrics": True,  # without it there is no /prometheus/metrics
    }
    draft_method = request.check_draft_method()
    if draft_method == "ngram":
        found["speculative_config"] = {"decoding_type": "NGram", "max_draft_len": replica.draft_tokens}
    elif draft_method:
        raise UsageError(
            f"Draft method {draft_method} is not supported with trtllm.", hint="Use ngram.", param="draft_method"
        )
    return found


def _write(arguments: dict[str, Any]) -> Path:
    """Named by its content, so that equal replicas share it."""
    import yaml  # only to start replicas

    text = yaml.safe_dump(arguments)
    path = cache_directory() / "engines" / f"trtllm-{hashlib.sha256(text.encode()).hexdigest()[:16]}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


TRTLLM = EngineAdapter(
    name="trtllm",
    display_name="TensorRT-LLM",
    owned_by="tensorrt_llm",
    capabilities=EngineCapabilities(kinds=("cuda",)),
    command=_command,
    metrics_path="/prometheus/metrics",
    metrics={  # of recent versions, read in its code, not tried
        "running": (b"trtllm_num_requests_running",),
        "waiting": (b"trtllm_num_requests_waiting",),
        "kv_usage": (b"trtllm_kv_cache_utilization",),
        "prompt_tokens": (b"trtllm_prompt_tokens_total",),
        "output_tokens": (b"trtllm_generation_tokens_total",),
    },
    supports_n=True,
    returns_continuous_usage=True,
)
