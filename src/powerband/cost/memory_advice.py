"""What to say when an engine does not fit: where the memory goes, and changes that help, each with its effect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from powerband.cost.sizing import LABELS, Sizing, as_option, readable
from powerband.errors import EnvironmentFault
from powerband.spec.model.counts import count_parameters
from powerband.spec.settings import memory_bytes

_SMALL_BUDGET = 512
_FEW_REQUESTS = 32


def explain_out_of_memory(sizing: Sizing) -> EnvironmentFault:
    """The error for a plan that cannot be: needs, what is there, and three ways out."""
    fixed = {name: size for name, size in sizing.parts(0).items() if name != "kv_cache"}
    needs = ", ".join(f"{LABELS[name]} {readable(size)}" for name, size in fixed.items() if size)
    left = sizing.available - sum(fixed.values())
    if left < 0:
        message = f"The engine does not fit: {needs} exceed the {readable(sizing.available)} available"
    else:
        message = (
            f"The KV cache does not fit: beside {needs}, {readable(left)} of {readable(sizing.available)} available "
            f"are left, and {_needed_text(sizing)}"
        )
    ways = _suggestions(sizing)[:3]
    hint = "Do one of: " + "; ".join(f"({i}) {way}" for i, way in enumerate(ways, 1)) + "."
    return EnvironmentFault(f"{message}.", hint=hint, code="memory_plan", param="max_model_len")


def _needed_text(sizing: Sizing) -> str:
    asked = sizing.settings.kv_cache_memory
    tokens = sizing.settings.max_model_len or sizing.settings.block_size
    one = f"a request of {tokens} tokens needs {readable(sizing.blocks_for(tokens) * sizing.block_bytes)}"
    if asked is None:
        return one
    if sizing.chosen_blocks() > sizing.max_blocks():
        return f"kv_cache_memory asks for {readable(memory_bytes(asked))}"
    return f"{one}, more than kv_cache_memory ({asked})"


def _suggestions(sizing: Sizing) -> list[str]:
    """Changes that help, those that suffice first."""
    settings = sizing.settings
    needed = sizing.blocks_for(settings.max_model_len or settings.block_size)
    limit = sizing.max_blocks()
    enough = [*_kv_cache_memory(sizing, needed, limit)]
    max_tokens = sizing.max_len(min(limit, sizing.chosen_blocks()))
    if settings.max_model_len is not None and 0 < max_tokens < settings.max_model_len:
        enough.append(f"--max-model-len {max_tokens} fits as things are")
    share = _sufficient_utilization(sizing, needed)
    if share is not None:
        gained = sizing.tokens_in(_max_blocks_with(sizing, gpu_memory_utilization=share))
        now = sizing.tokens_in(limit)
        enough.append(f"--gpu-memory-utilization {share} makes room for {gained} tokens (now {now})")
    partial = [*_larger_device(sizing, needed), *_smaller_model(sizing)]
    for text, changed in _smaller(sizing):
        after, freed = changed.max_blocks(), sizing.total(0) - changed.total(0)
        if after > limit < needed:
            room, now = changed.tokens_in(after), sizing.tokens_in(limit)
            effect = f"{text} frees {readable(freed)}: room for {room} tokens (now {now})"
            (enough if after >= needed else partial).append(effect)
    return enough + partial


def _kv_cache_memory(sizing: Sizing, needed: int, limit: int) -> list[str]:
    asked, tokens = sizing.settings.kv_cache_memory, sizing.tokens_in
    if asked is None or limit < needed:
        return []
    if sizing.chosen_blocks() > limit:
        size = as_option(limit * sizing.block_bytes, round_up=False)
        ways = [f"--kv-cache-memory {size} is the most that fits ({tokens(limit)} tokens)"]
    else:
        size = as_option(needed * sizing.block_bytes)
        ways = [f"--kv-cache-memory {size} holds {tokens(needed)} tokens (at most {tokens(limit)} fit)"]
    default = replace(sizing, settings=replace(sizing.settings, kv_cache_memory=None)).chosen_blocks()
    return [*ways, f"without --kv-cache-memory, the KV cache holds {tokens(default)} tokens"]


def _larger_device(sizing: Sizing, needed: int) -> list[str]:
    total = int(sizing.total(max(needed, sizing.chosen_blocks())) / sizing.usable_fraction)
    have = sizing.device_memory if sizing.kind == "cuda" else sizing.free_memory
    return (
        [f"a device with {readable(total)} of free memory (here {readable(have)}) holds it all"] if total > have else []
    )


def _smaller_model(sizing: Sizing) -> list[str]:
    """How large a model fits, when this one does not even without a KV cache."""
    parts = sizing.parts(0)
    room = sizing.available - sum(parts.values()) + parts["weights"]
    if not 0 < room < parts["weights"]:
        return []
    bytes_per_parameter = parts["weights"] / count_parameters(sizing.spec).total
    precision = sizing.dtype if sizing.held.layers == "none" else sizing.held.layers
    return [f"a model of less than {room / bytes_per_parameter / 1e9:.1f} billion parameters fits in {precision}"]


def _max_blocks_with(sizing: Sizing, **changes: Any) -> int:
    """The most blocks that fit with some settings changed."""
    return replace(sizing, settings=replace(sizing.settings, **changes)).max_blocks()


def _sufficient_utilization(sizing: Sizing, needed: int) -> float | None:
    """The lowest share of a GPU's memory, in hundredths up to 0.98, with which `needed` blocks fit."""
    if sizing.kind != "cuda" or sizing.settings.kv_cache_memory is not None:
        return None
    first = int(sizing.settings.gpu_memory_utilization * 100) + 1
    for share in range(first, 99):
        if _max_blocks_with(sizing, gpu_memory_utilization=share / 100) >= needed:
            return share / 100
    return None


def _smaller(sizing: Sizing) -> list[tuple[str, Sizing]]:
    """Changes that take less memory, with the option that makes each."""
    settings = sizing.settings
    changes: list[tuple[str, Sizing]] = []
    if sizing.dtype == "float32":
        changes.append(("--dtype bfloat16", replace(sizing, dtype="bfloat16")))
    if sizing.kind == "cpu" and settings.dtype in ("auto", "bfloat16") and sizing.held.layers == "none":
        for precision in ("int8", "int4"):
            quantized = replace(sizing, settings=replace(settings, quantization=precision), dtype="bfloat16")
            changes.append((f"--quantization {precision}", quantized))
    if settings.adapter_slots > max(len(settings.lora), 1):
        fewer = replace(settings, max_loras=max(len(settings.lora), 1))
        changes.append((f"--max-loras {fewer.max_loras}", replace(sizing, settings=fewer)))
    if settings.max_num_batched_tokens > _SMALL_BUDGET:
        fewer = replace(settings, max_num_batched_tokens=_SMALL_BUDGET)
        changes.append((f"--max-num-batched-tokens {_SMALL_BUDGET}", replace(sizing, settings=fewer)))
    if settings.max_num_seqs > _FEW_REQUESTS:
        fewer = replace(settings, max_num_seqs=_FEW_REQUESTS)
        changes.append((f"--max-num-seqs {_FEW_REQUESTS}", replace(sizing, settings=fewer)))
    return changes
