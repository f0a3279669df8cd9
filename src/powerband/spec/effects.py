"""Settings that would do nothing with the others: said at once, instead of being accepted and ignored."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from powerband.errors import UsageError
from powerband.spec.settings import EngineSettings


@dataclass(frozen=True, slots=True)
class Rule:
    """`setting`, when somebody asked for it, has no effect where `idle(settings, device)` holds; `reason` says why."""

    setting: str
    idle: Callable[[EngineSettings, str], bool]
    reason: str


RULES = (
    Rule(
        "gpu_memory_utilization",
        lambda _, device: device == "cpu",
        "it limits memory on a GPU, and this engine runs on the CPU; kv_cache_memory sets the KV cache's memory",
    ),
    Rule(
        "gpu_memory_utilization",
        lambda s, device: device != "cpu" and s.kv_cache_memory is not None,
        "kv_cache_memory already fixes the memory of the KV cache",
    ),
    Rule(
        "enforce_eager",
        lambda s, device: s.enforce_eager and device == "cpu",
        "it turns CUDA graphs off, and this engine runs on the CPU, where there are none",
    ),
    Rule(
        "threads",
        lambda _, device: device != "cpu",
        "it sets the CPU threads that compute, and this engine computes on a GPU",
    ),
    Rule(
        "long_prefill_token_threshold",
        lambda s, _: s.long_prefill_token_threshold >= s.max_num_batched_tokens,
        "a prefill chunk is never larger than the token budget (max_num_batched_tokens)",
    ),
    Rule(
        "revision",
        lambda s, _: s.model == "demo" or Path(s.model).is_dir(),
        "it chooses a version on the Hugging Face hub, and this model is on this machine",
    ),
)


def check_effects(settings: EngineSettings, asked: Collection[str], device: str) -> None:
    """Raise UsageError for the first setting in `asked` that has no effect.

    asked: names that a person set, in any way. device: where the engine will run, "cpu" or "cuda".
    """
    for rule in RULES:
        if rule.setting in asked and rule.idle(settings, device):
            raise UsageError(
                f"{rule.setting} = {getattr(settings, rule.setting)!r} would have no effect: {rule.reason}.",
                hint="Leave it out.",
                param=rule.setting,
            )
