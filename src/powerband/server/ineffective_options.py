"""Settings that have no effect with the others are refused, not accepted and ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from powerband.errors import UsageError
from powerband.server.settings import ServerSettings
from powerband.spec.settings_layers import Resolved

Device = Callable[[], str]


@dataclass(frozen=True, slots=True)
class Rule:
    """`setting`, if given, has no effect where `idle(settings, device)` is true; `reason` is the explanation."""

    setting: str
    idle: Callable[[Resolved, Device], bool]
    reason: str


def _server(settings: Resolved) -> ServerSettings:
    server: ServerSettings = settings.values[ServerSettings]
    return server


RULES = (
    Rule(
        "revision",
        lambda s, _: s.engine.model == "demo" or Path(s.engine.model).is_dir(),
        "it chooses a version on the Hugging Face hub, and this model is on this machine",
    ),
    Rule(
        "threads",
        lambda _, device: device() != "cpu",
        "it sets the CPU threads that compute, and this engine computes on a GPU",
    ),
    Rule(
        "kernels",
        lambda _, device: device() != "cpu",
        "it concerns computing on a CPU, and this engine computes on a GPU",
    ),
    Rule(
        "enforce_eager",
        lambda s, device: s.engine.enforce_eager and device() == "cpu",
        "it turns CUDA graphs off, and this engine runs on the CPU, where there are none",
    ),
    Rule(
        "gpu_memory_utilization",
        lambda s, _: s.engine.kv_cache_memory is not None,
        "kv_cache_memory already fixes the memory of the KV cache",
    ),
    Rule(
        "gpu_memory_utilization",
        lambda _, device: device() == "cpu",
        "it limits memory on a GPU, and this engine runs on the CPU; kv_cache_memory limits the KV cache there",
    ),
    Rule(
        "long_prefill_token_threshold",
        lambda s, _: s.engine.long_prefill_token_threshold >= s.engine.max_num_batched_tokens,
        "a prefill chunk is never larger than the token budget (max_num_batched_tokens)",
    ),
    Rule(
        "max_lora_rank",
        lambda s, _: s.engine.adapter_slots == 0,
        "it limits LoRA adapters, and there are none: --lora names some, --max-loras leaves room for some",
    ),
    Rule(
        "api_key_file",
        lambda s, _: _server(s).api_key is not None,
        "api_key already gives the key",
    ),
    Rule(
        "insecure",
        lambda s, _: _server(s).insecure and (_server(s).api_key is not None or _server(s).api_key_file is not None),
        "it allows going without a key, and there is one",
    ),
)


def check_effects(settings: Resolved, device: Device) -> None:
    """Raise UsageError for the first given setting that has no effect.

    device: returns where the engine will run, "cpu" or "cuda". It is called only when a given setting
    depends on it, because finding out may take a second.
    """
    for rule in RULES:
        if rule.setting in settings.asked and rule.idle(settings, device):
            raise UsageError(
                f"{rule.setting} would have no effect: {rule.reason}.",
                hint=f"Leave it out. It came from the {settings.origins[rule.setting]}.",
                param=rule.setting,
            )
