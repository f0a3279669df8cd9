"""SGLang's server.

Options as https://docs.sglang.io/advanced_features/server_arguments.html has them for version 0.5. Its streams cannot
be resumed: they carry no token ids.
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
    ready_path: ClassVar[str] = "/health"

    def command(self, request: LaunchRequest) -> Command:
        context, replica = ModelContext(request.model, request.replica, self.name), request.replica
        context.require(long_prefill_token_threshold=0)
        program = find_executable(
            request.executable,
            variable="POWERBAND_SGLANG",
            program="sglang",
            module=_MODULE,
            install="pip install sglang",
        )
        start = () if _MODULE[-1] in program else ("serve",)
        options = {
            "--model-path": request.model,
            "--served-model-name": request.served_name,
            "--host": request.host,
            "--port": str(request.port),
            "--tensor-parallel-size": str(replica.tensor_parallel),
            "--pipeline-parallel-size": str(replica.pipeline_parallel),
            "--expert-parallel-size": str(replica.expert_parallel),
            "--context-length": str(replica.max_model_len),
            "--max-running-requests": str(replica.max_num_seqs),
            "--chunked-prefill-size": str(replica.max_num_batched_tokens),
            "--max-prefill-tokens": str(replica.max_num_batched_tokens),
            **_memory(context),
            **context.precision(_KV),
            **_drafts(context, request.draft_method),
        }
        flags = ["--enable-metrics", "--enable-cache-report"]
        if not replica.enable_prefix_caching:
            flags.append("--disable-radix-cache")
        key = read_key(request.api_key_file)
        if key:
            options["--api-key"] = key  # there is no file and no variable for it
        arguments = tuple(word for pair in options.items() for word in pair)
        return Command((*program, *start, *arguments, *flags, *request.extra))


def _memory(context: ModelContext) -> dict[str, str]:
    """SGLang's fraction is that of weights and KV cache alone; the plan's includes activations and buffers."""
    parts, replica = context.memory.parts, context.replica
    share = (parts["weights"] + parts["kv_cache"]) / context.profile.memory_bytes
    found = {"--mem-fraction-static": f"{share:.3f}"}
    if replica.offload_share:
        offloaded = layer_weight_bytes(context.spec, replica) * replica.offload_share
        found["--cpu-offload-gb"] = str(math.ceil(offloaded / 2**30))  # whole ones only
    return found


def _drafts(context: ModelContext, draft_method: str) -> dict[str, str]:
    draft_method = context.check_draft_method(draft_method)
    if not draft_method:
        return {}
    count = context.replica.draft_tokens
    if draft_method == "ngram":
        return {"--speculative-algorithm": "NGRAM", "--speculative-num-draft-tokens": str(count)}
    if draft_method == "mtp":
        raise UsageError(
            "mtp is not supported with sglang.", hint="Use ngram, or the name of a draft model.", param="draft_method"
        )
    return {
        "--speculative-algorithm": "STANDALONE",
        "--speculative-draft-model-path": draft_method,
        "--speculative-num-steps": str(count),
        "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": str(count + 1),  # including the verified token
    }
