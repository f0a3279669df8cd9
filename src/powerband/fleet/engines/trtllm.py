"""TensorRT-LLM's server, trtllm-serve, with its PyTorch backend.

Options as https://nvidia.github.io/TensorRT-LLM/commands/trtllm-serve/trtllm-serve.html has them for version 1.2; what
is no option stands in a file of LLM arguments (https://nvidia.github.io/TensorRT-LLM/llm-api/reference.html). It asks
for no key, and its streams cannot be resumed: they carry no token ids.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar

import yaml

from powerband.errors import UsageError
from powerband.fleet.engines.base import Command, LaunchRequest, ModelContext, find_executable
from powerband.folders import cache_directory
from powerband.spec.deployment import EngineName

_KV = {"16bit": "auto", "fp8": "fp8"}


class TensorRTAdapter:
    name: ClassVar[EngineName] = "trtllm"
    health_path: ClassVar[str] = "/health"
    ready_path: ClassVar[str] = "/health"
    resumes: ClassVar[bool] = False

    def command(self, order: LaunchRequest) -> Command:
        subject, replica = ModelContext(order.model, order.replica, self.name), order.replica
        subject.refuse(long_prefill_token_threshold=0, offload_share=0.0)
        subject.to_quantize()  # it loads what is stored, and nothing else
        if order.api_key_file is not None:
            raise UsageError(
                "trtllm-serve cannot ask for a key.", hint="Let it listen on loopback only.", param="api_key_file"
            )
        program = find_executable(
            order.executable,
            variable="POWERBAND_TRTLLM",
            program="trtllm-serve",
            module=(),
            install="pip install tensorrt_llm",
        )
        options = {
            "--host": order.host,
            "--port": str(order.port),
            "--served_model_name": order.served_name,
            "--backend": "pytorch",
            "--tp_size": str(replica.tensor_parallel),
            "--pp_size": str(replica.pipeline_parallel),
            "--ep_size": str(replica.expert_parallel),
            "--max_seq_len": str(replica.max_model_len),
            "--max_batch_size": str(replica.max_num_seqs),
            "--max_num_tokens": str(max(replica.max_num_batched_tokens, replica.max_num_seqs)),
            "--kv_cache_free_gpu_memory_fraction": f"{_kv_share(subject):.3f}",
            "--config": str(_write(_arguments(subject, order.drafter))),
        }
        told = tuple(word for pair in options.items() for word in pair)
        return Command((*program, order.model, *told, "--enable_chunked_prefill", *order.extra))


def _kv_share(subject: ModelContext) -> float:
    """Of what weights and buffers leave free on a device."""
    parts = subject.memory.parts
    left = subject.profile.memory_bytes - sum(parts.values()) + parts["kv_cache"]
    return parts["kv_cache"] / left


def _arguments(subject: ModelContext, drafter: str) -> dict[str, Any]:
    replica = subject.replica
    kv = _KV.get(replica.kv_precision)
    if kv is None or (kv == "auto" and subject.stored.kv_precision is not None):
        raise subject.cannot("kv_precision", f"The checkpoint has {subject.stored.kv_precision or 'no scales'}.")
    found: dict[str, Any] = {
        "kv_cache_config": {"enable_block_reuse": replica.enable_prefix_caching, "dtype": kv},
        "enable_iter_perf_stats": True,
        "return_perf_metrics": True,  # without it there is no /prometheus/metrics
    }
    drafter = subject.drafter(drafter)
    if drafter == "ngram":
        found["speculative_config"] = {"decoding_type": "NGram", "max_draft_len": replica.draft_tokens}
    elif drafter:
        raise UsageError(
            f"trtllm is not told a draft model ({drafter}) here.", hint="It can do: ngram.", param="drafter"
        )
    return found


def _write(arguments: dict[str, Any]) -> Path:
    """A file named by what it holds: written once, the same for all replicas."""
    text = yaml.safe_dump(arguments)
    path = cache_directory() / "engines" / f"trtllm-{hashlib.sha256(text.encode()).hexdigest()[:16]}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
