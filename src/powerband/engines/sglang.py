"""SGLang's server.

Options as https://docs.sglang.io/advanced_features/server_arguments.html has them for version 0.5. Its streams cannot
be resumed: they carry no token ids.
"""

from __future__ import annotations

import math

from powerband.engines.base import EngineAdapter
from powerband.engines.capabilities import EngineCapabilities
from powerband.engines.launch import Command, LaunchRequest, read_key
from powerband.errors import UsageError

_KV = {"16bit": "auto", "fp8": "fp8_e4m3"}
_MODULE = ("-m", "sglang.launch_server")


def _command(request: LaunchRequest) -> Command:
    replica = request.replica
    request.require(long_prefill_token_threshold=0)
    program = request.find_program("sglang", module=_MODULE, install="pip install sglang")
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
        **_memory(request),
        **request.precision(_KV),
        **_drafts(request),
    }
    flags = ["--enable-metrics", "--enable-cache-report"]
    if not replica.enable_prefix_caching:
        flags.append("--disable-radix-cache")
    key = read_key(request.api_key_file)
    if key:
        options["--api-key"] = key  # there is no file and no variable for it
    arguments = tuple(word for pair in options.items() for word in pair)
    return Command((*program, *start, *arguments, *flags, *request.extra))


def _memory(request: LaunchRequest) -> dict[str, str]:
    """SGLang's fraction is that of weights and KV cache alone; the plan's includes activations and buffers."""
    parts, replica = request.memory.parts, request.replica
    share = (parts["weights"] + parts["kv_cache"]) / request.profile.memory_bytes
    found = {"--mem-fraction-static": f"{share:.3f}"}
    if replica.offload_share:
        offloaded = request.layer_weight_bytes * replica.offload_share
        found["--cpu-offload-gb"] = str(math.ceil(offloaded / 2**30))  # whole ones only
    return found


def _drafts(request: LaunchRequest) -> dict[str, str]:
    draft_method = request.check_draft_method()
    if not draft_method:
        return {}
    count = request.replica.draft_tokens
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


SGLANG = EngineAdapter(
    name="sglang",
    display_name="SGLang",
    owned_by="sglang",
    capabilities=EngineCapabilities(
        kinds=("cuda", "rocm"), supports_cpu_offload=True, online_quantizations=("none", "fp8")
    ),
    command=_command,
    metrics={  # only with --enable-metrics
        "running": (b"sglang:num_running_reqs",),
        "waiting": (b"sglang:num_queue_reqs",),
        "kv_usage": (b"sglang:token_usage",),
        "preemptions": (b"sglang:num_retracted_reqs",),
        "prompt_tokens": (b"sglang:prompt_tokens_total",),
        "output_tokens": (b"sglang:generation_tokens_total",),
    },
    histograms={"ttft": b"sglang:time_to_first_token_seconds", "queue": b"sglang:queue_time_seconds"},
    supports_n=True,
    returns_continuous_usage=True,
)
