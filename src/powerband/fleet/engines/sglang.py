"""SGLang's server.

Options as https://docs.sglang.io/advanced_features/server_arguments.html has them for version 0.5. Its streams cannot
be resumed: nothing tells the token ids of what was sent.
"""

from __future__ import annotations

import math
from typing import ClassVar

from powerband.cost.replica_memory import layer_weight_bytes
from powerband.errors import UsageError
from powerband.fleet.engines.base import Command, LaunchRequest, ModelContext, find_executable, read_key
from powerband.spec.deployment import EngineName

_KV = {"16bit": "auto", "fp8": "fp8_e4m3"}
_MODULE = ("-m", "sglang.launch_server")


class SGLangAdapter:
    name: ClassVar[EngineName] = "sglang"
    health_path: ClassVar[str] = "/health"
    ready_path: ClassVar[str] = "/health"
    resumes: ClassVar[bool] = False

    def command(self, order: LaunchRequest) -> Command:
        subject, replica = ModelContext(order.model, order.replica, self.name), order.replica
        subject.refuse(long_prefill_token_threshold=0)
        program = find_executable(
            order.executable,
            variable="POWERBAND_SGLANG",
            program="sglang",
            module=_MODULE,
            install="pip install sglang",
        )
        start = () if _MODULE[-1] in program else ("serve",)
        options = {
            "--model-path": order.model,
            "--served-model-name": order.served_name,
            "--host": order.host,
            "--port": str(order.port),
            "--tensor-parallel-size": str(replica.tensor_parallel),
            "--pipeline-parallel-size": str(replica.pipeline_parallel),
            "--expert-parallel-size": str(replica.expert_parallel),
            "--context-length": str(replica.max_model_len),
            "--max-running-requests": str(replica.max_num_seqs),
            "--chunked-prefill-size": str(replica.max_num_batched_tokens),
            "--max-prefill-tokens": str(replica.max_num_batched_tokens),
            **_memory(subject),
            **subject.precision(_KV),
            **_drafts(subject, order.drafter),
        }
        flags = ["--enable-metrics", "--enable-cache-report"]
        if not replica.enable_prefix_caching:
            flags.append("--disable-radix-cache")
        key = read_key(order.api_key_file)
        if key:
            options["--api-key"] = key  # it knows no file and no variable for it
        told = tuple(word for pair in options.items() for word in pair)
        return Command((*program, *start, *told, *flags, *order.extra))


def _memory(subject: ModelContext) -> dict[str, str]:
    """Its share is that of weights and KV cache alone; the plan's holds activations and the rest as well."""
    parts, replica = subject.memory.parts, subject.replica
    share = (parts["weights"] + parts["kv_cache"]) / subject.profile.memory_bytes
    found = {"--mem-fraction-static": f"{share:.3f}"}
    if replica.offload_share:
        offloaded = layer_weight_bytes(subject.spec, replica) * replica.offload_share
        found["--cpu-offload-gb"] = str(math.ceil(offloaded / 2**30))  # whole ones only
    return found


def _drafts(subject: ModelContext, drafter: str) -> dict[str, str]:
    drafter = subject.drafter(drafter)
    if not drafter:
        return {}
    count = subject.replica.draft_tokens
    if drafter == "ngram":
        return {"--speculative-algorithm": "NGRAM", "--speculative-num-draft-tokens": str(count)}
    if drafter == "mtp":
        raise UsageError("sglang is not told mtp here.", hint="ngram, or a draft model's name.", param="drafter")
    return {
        "--speculative-algorithm": "STANDALONE",
        "--speculative-draft-model-path": drafter,
        "--speculative-num-steps": str(count),
        "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": str(count + 1),  # with the token that is certain
    }
