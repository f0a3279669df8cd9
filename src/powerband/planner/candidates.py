"""Every kind of replica that could serve a model on the devices on offer, and why the others cannot.

    engine × device × (TP × PP, experts divided or not) × precision × precision of the KV cache
                                            └► what does not fit: weights in the host's memory, where an engine can

How many replicas, and the limits of their schedulers, are the search's to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from powerband.cost.replica_memory import ReplicaMemory, plan_replica
from powerband.engines.capabilities import DEFAULT_QUANTIZATIONS
from powerband.engines.registry import ADAPTERS
from powerband.errors import UsageError
from powerband.planner.report.formatting import layout_text
from powerband.planner.results import Pruned
from powerband.spec.deployment import EngineName, KVPrecision, Quantization, Replica
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.model.checkpoint_precision import CheckpointPrecision
from powerband.spec.model.model_spec import ModelSpec

_OFFLOAD_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class ReplicaOption:
    """One kind of replica, and the memory of its fullest rank."""

    engine: EngineName
    replica: Replica
    memory: ReplicaMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """What may be chosen from."""

    profiles: Sequence[DeviceProfile]
    engines: Sequence[EngineName]
    max_devices: int
    max_model_len: int
    quantizations: Sequence[Quantization] = ()  # empty: the default ones
    draft_tokens: int = 0
    draft_acceptance: float = 0.0
    pinned: Mapping[str, Any] | None = None  # fields that every Replica must have


def replica_options(
    spec: ModelSpec, stored: CheckpointPrecision, space: SearchSpace
) -> tuple[list[ReplicaOption], list[Pruned]]:
    """All that fit, and what was left out, by reason.

    Raises UsageError when no engine can run the model on any of the devices in any of the precisions.
    """
    found: list[ReplicaOption] = []
    left_out: Counter[tuple[str, str]] = Counter()
    for engine in space.engines:
        for profile in space.profiles:
            for quantization in _quantizations(stored, space):
                reason = _unsupported_reason(engine, profile, quantization, stored, space)
                if reason:
                    left_out[f"{engine} on {profile.name} in {_precision(quantization)}", reason] += 1
                    continue
                for replica in _replicas(spec, engine, profile, quantization, stored, space):
                    kind = _with_offload(spec, engine, profile, replica)
                    if kind.memory.problem:
                        left_out[option_name(engine, replica), kind.memory.problem] += 1
                    else:
                        found.append(kind)
    pruned = [Pruned(what, reason, count) for (what, reason), count in left_out.items()]
    return found, pruned


def _quantizations(stored: CheckpointPrecision, space: SearchSpace) -> tuple[Quantization, ...]:
    if stored.quantization != "none":
        if space.quantizations and tuple(space.quantizations) != (stored.quantization,):
            raise UsageError(
                f"The checkpoint is stored in {stored.quantization}; quantization is {', '.join(space.quantizations)}.",
                hint="Leave --quantization out, or plan with the model's 16-bit version.",
                param="quantization",
            )
        return (stored.quantization,)
    return tuple(space.quantizations) or DEFAULT_QUANTIZATIONS


def _unsupported_reason(
    engine: EngineName,
    profile: DeviceProfile,
    quantization: Quantization,
    stored: CheckpointPrecision,
    space: SearchSpace,
) -> str:
    capabilities = ADAPTERS[engine].capabilities
    if profile.kind not in capabilities.kinds:
        return f"{engine} on a device of kind {profile.kind} is not modelled"
    reason = capabilities.missing_kernels(profile, quantization) or _unmeasured(engine, profile, quantization)
    if not reason and space.draft_tokens and not capabilities.supports_speculation:
        return f"{engine} does not speculate yet"
    is_asked = quantization in (*space.quantizations, stored.quantization)
    if not reason and not is_asked and quantization not in capabilities.online_quantizations:
        return "it needs a checkpoint that was quantized so (ask for it with --quantization)"
    return reason


def _unmeasured(engine: EngineName, profile: DeviceProfile, quantization: Quantization) -> str:
    """A calibration leaves out what it measured too far off; of this machine, priors would be a guess."""
    measured = profile.gemm.get(engine, {})
    models = {refinement.quantization for refinement in profile.refinements}
    if profile.kind != "cpu" or not measured or quantization in measured or quantization in models:
        return ""
    return f"{_precision(quantization)} could not be measured well enough on this machine: 'powerband calibrate' again"


def _replicas(
    spec: ModelSpec,
    engine: EngineName,
    profile: DeviceProfile,
    quantization: Quantization,
    stored: CheckpointPrecision,
    space: SearchSpace,
) -> Iterator[Replica]:
    capabilities = ADAPTERS[engine].capabilities
    max_devices = min(space.max_devices, profile.devices_per_node) if capabilities.supports_multi_device else 1
    kv: KVPrecision
    for tensor, stages in _layouts(max_devices):
        for experts in {1, tensor if _has_experts(spec) else 1}:
            for kv in capabilities.kv_precisions(profile, quantization, stored.kv_precision):
                replica = Replica(
                    device=profile.name,
                    tensor_parallel=tensor,
                    pipeline_parallel=stages,
                    expert_parallel=experts,
                    quantization=quantization,
                    kv_precision=kv,
                    max_model_len=space.max_model_len,
                    draft_tokens=space.draft_tokens,
                    draft_acceptance=space.draft_acceptance,
                )
                pinned = dict(space.pinned or {})
                if all(getattr(replica, name) == pinned[name] for name in _ENUMERATED if name in pinned):
                    yield replace(replica, **pinned)


_ENUMERATED = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "quantization", "kv_precision")


def _layouts(max_devices: int) -> Iterator[tuple[int, int]]:
    """(TP, PP) in powers of two, up to `max_devices` devices."""
    tensor = 1
    while tensor <= max_devices:
        stages = 1
        while tensor * stages <= max_devices:
            yield tensor, stages
            stages *= 2
        tensor *= 2


def _has_experts(spec: ModelSpec) -> bool:
    return any(layer.num_experts for layer in spec.layers)


def _with_offload(spec: ModelSpec, engine: EngineName, profile: DeviceProfile, replica: Replica) -> ReplicaOption:
    """With as much of the weights in the host's memory as it takes to fit; none, where it fits without or never."""
    whole = ReplicaOption(engine, replica, plan_replica(spec, profile, replica, engine))
    may_offload = (
        ADAPTERS[engine].capabilities.supports_cpu_offload and profile.kind != "cpu" and replica.num_devices == 1
    )
    if not whole.memory.problem or replica.offload_share or not may_offload:
        return whole
    for share in _OFFLOAD_RATIOS:
        offloaded = replace(replica, offload_share=share)
        memory = plan_replica(spec, profile, offloaded, engine)
        if not memory.problem:
            return ReplicaOption(engine, offloaded, memory)
    return whole


def option_name(engine: EngineName, replica: Replica) -> str:
    layout = layout_text(replica)
    name = f"{engine} on {replica.num_devices} {replica.device}, {_precision(replica.quantization)}"
    return f"{name}, {layout}" if layout else name


def _precision(quantization: Quantization) -> str:
    return "16 bits" if quantization == "none" else quantization
