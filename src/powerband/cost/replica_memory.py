"""Memory of a replica's fullest rank, for every engine: what fits, and how many tokens the KV cache then holds.

Our own engine on one device: the very plan that it prints and obeys (cost.memory). Other engines, and ranks of a model
that is divided: the same parts, with what those engines are known to take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from powerband.cost.engine_priors import ENGINE_PRIORS, EnginePriors
from powerband.cost.footprint import activation_bytes
from powerband.cost.memory import plan_memory
from powerband.cost.projections import EXPERTS, parts_of, quantized_parts, rank_matrix, undivided_blocks
from powerband.cost.shapes import FORMATS, kv_row_bytes
from powerband.errors import PowerbandError
from powerband.spec.deployment import EngineName, Quantization, Replica
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.kv_layout import KVLayout, kv_layout
from powerband.spec.model.counts import count_parameters
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.settings import EngineSettings

# What engines take beyond weights, activations and KV cache. vLLM 0.15: 0.4 GiB beside a model with a small vocabulary,
# 1.3 GiB with large ones, on an H100 (num_gpu_blocks reported by inference-sim's runs).
_RUNTIME_BYTES = 300 << 20  # context, libraries, fragments
_COLLECTIVES_BYTES = 400 << 20  # NCCL's and custom all-reduce's buffers (AIConfigurator reserves 342 to 392 MB)


@dataclass(frozen=True, slots=True)
class ReplicaMemory:
    """Of the fullest rank, in bytes. problem: '' when it fits; then num_blocks and parts hold."""

    parts: Mapping[str, int]  # weights, kv_cache, activations, sampling, runtime …
    available_bytes: int
    num_blocks: int
    block_size: int
    problem: str = ""
    layout: KVLayout | None = None  # of a cache that keeps windows only; None: all layers keep every position
    max_model_len: int = 1

    @property
    def kv_tokens(self) -> int:
        """Positions that the replica's KV cache holds, of requests as long as they may be."""
        return self.tokens_at(self.max_model_len)

    def tokens_at(self, context: float) -> int:
        """Positions that it holds of requests of so many positions: with windows, longer ones take less for each."""
        if self.layout is None:
            return self.num_blocks * self.block_size
        return self.layout.tokens(self.num_blocks, context)


def plan_replica(spec: ModelSpec, profile: DeviceProfile, replica: Replica, engine: EngineName) -> ReplicaMemory:
    """Never raises: what cannot be says so in `problem`."""
    reason = _indivisible(spec, replica)
    if reason:
        return ReplicaMemory({}, 0, 0, 1, reason)
    assumed = ENGINE_PRIORS[engine]
    if assumed.uses_memory_plan and replica.num_devices == 1 and not replica.offload_share:
        return _own(spec, profile, replica)
    rank = shard(spec, replica)
    activations = activation_bytes(rank, tokens=replica.max_num_batched_tokens, dtype="bfloat16")
    # Activations are gone when logits are there: of both, the larger counts.
    sampling = _sampling(spec, replica, assumed) + _experts_workspace(rank, replica)
    parts = {
        "weights": weight_bytes(spec, replica),
        "activations": activations,
        "sampling": max(sampling - activations, 0),
        "runtime": _RUNTIME_BYTES + (_COLLECTIVES_BYTES if replica.num_devices > 1 else 0),
    }
    available = int(profile.memory_bytes * replica.gpu_memory_utilization)
    left = available - sum(parts.values())
    if left < 0:
        needs = f"needs {_gb(sum(parts.values()))} without a KV cache, has {_gb(available)}"
        return ReplicaMemory(parts, available, 0, assumed.block_size, needs)
    size, length = assumed.block_size, replica.max_model_len
    layout, block = _kv_blocks(spec, profile, replica, assumed)
    blocks = left // block
    needed = layout.max_pages(-(-length // size)) if layout is not None else -(-length // size)
    problem = ""
    if blocks < needed:
        problem = f"one request of {length} tokens needs {_gb(needed * block)} of KV cache, {_gb(left)} are left"
    return ReplicaMemory({**parts, "kv_cache": blocks * block}, available, blocks, size, problem, layout, length)


def _kv_blocks(
    spec: ModelSpec, profile: DeviceProfile, replica: Replica, assumed: EnginePriors
) -> tuple[KVLayout | None, int]:
    """The layout of an engine's cache for a model with sliding windows, and the bytes of a block of it."""
    rank, size = shard(spec, replica), assumed.block_size
    layer_bytes = kv_bytes_per_token(spec, replica) / rank.num_layers * size
    step_tokens = min(replica.max_num_batched_tokens, replica.max_model_len)
    layout = kv_layout(rank.layers, size, step_tokens=step_tokens, max_model_len=replica.max_model_len)
    if layout.windowed and profile.kind != "cpu" and assumed.frees_windows:
        return layout, round(layout.group_layers * layer_bytes)
    num_windowed = sum(layer.window is not None for layer in rank.layers)
    num_full = rank.num_layers - num_windowed
    share = assumed.window_share if num_full and spec.family in assumed.window_families else 1.0
    return None, round((num_full + share * num_windowed) * layer_bytes)


def weight_bytes(spec: ModelSpec, replica: Replica) -> int:
    """Weights on the fullest rank's device: its share of the layers that are not offloaded, embedding and head.

    Of a model in stages, the first holds the embedding and the last the head; the larger counts.
    """
    layers = layer_weight_bytes(spec, replica)
    embedding = head = spec.vocab_size * spec.hidden_size * 2 // replica.tensor_parallel
    if spec.quantized_modules is not None and spec.quantized_modules.head:
        head = round(embedding / 2 * _bytes_of_element(spec, replica.quantization))
    ends = embedding if spec.tie_embeddings or replica.pipeline_parallel > 1 else embedding + head
    kept = round(layers * (1 - replica.offload_share))
    # While one layer computes, the next one's weights arrive.
    arriving = 2 * layers // shard(spec, replica).num_layers if replica.offload_share else 0
    return kept + min(arriving, layers - kept) + ends


def layer_weight_bytes(spec: ModelSpec, replica: Replica) -> int:
    """Weights of the layers of the fullest rank, offloaded ones included."""
    sizes = _bytes_by_layer(spec, replica)
    stage = -(-len(sizes) // replica.pipeline_parallel)
    return round(max(sum(sizes[first : first + stage]) for first in range(0, len(sizes), stage)))


def _bytes_by_layer(spec: ModelSpec, replica: Replica) -> list[float]:
    """Of one rank of tensor_parallel: the projections as they are stored, norms, biases and routers in 16 bits."""
    counts = count_parameters(shard(spec, replace(replica, pipeline_parallel=1)))
    in_format = _bytes_of_element(spec, replica.quantization)
    matrices: list[tuple[int, float]] = []  # of each layer: elements, and bytes of them
    for layer, quantized in zip(spec.layers, quantized_parts(spec), strict=True):
        sizes = {part: rank_matrix(spec, layer, part, replica).size for part in parts_of(layer)}
        plain = {*parts_of(layer)} - quantized
        if replica.quantization == "mxfp4":
            plain |= {part for part in sizes if part not in EXPERTS}
        held = sum(size * (2 if part in plain else in_format) for part, size in sizes.items())
        matrices.append((sum(sizes.values()), held))
    others = counts.total - counts.embedding - counts.head - sum(size for size, _ in matrices)
    return [held + others * 2 / len(matrices) for _, held in matrices]


def _bytes_of_element(spec: ModelSpec, quantization: Quantization) -> float:
    """Of a quantized matrix, its share of scales in it: a 16-bit scale and a zero point for each group of int4."""
    modules = spec.quantized_modules
    if quantization == "int4" and modules is not None:
        return 0.5 + (2.5 / modules.block_inputs if modules.block_inputs > 1 else 0.0)
    return FORMATS[quantization].weight_bytes


def kv_bytes_per_token(spec: ModelSpec, replica: Replica) -> int:
    """Of one rank: its layers, its heads. Fewer heads than ranks are copied."""
    rank = shard(spec, replica)
    head = kv_row_bytes(rank.head_dim, replica.kv_precision)
    return round(2 * rank.num_layers * rank.num_kv_heads * head)


def shard(spec: ModelSpec, replica: Replica) -> ModelSpec:
    """What one rank of the largest stage computes, as a model of its own. Embedding and head stay whole."""
    tp = replica.tensor_parallel
    return replace(
        spec,
        num_heads=spec.num_heads // tp,
        num_kv_heads=max(spec.num_kv_heads // tp, 1),
        intermediate_size=-(-spec.intermediate_size // tp),
        expert_intermediate_size=-(-spec.expert_intermediate_size // tp),
        layers=spec.layers[: -(-spec.num_layers // replica.pipeline_parallel)],
    )


def _sampling(spec: ModelSpec, replica: Replica, assumed: EnginePriors) -> int:
    """Logits and what sampling makes of them: of one row for each sequence, not for each token."""
    rows = min(replica.max_num_seqs, replica.max_num_batched_tokens)
    return rows * spec.vocab_size * assumed.sampler_bytes_per_logit


def _experts_workspace(rank: ModelSpec, replica: Replica) -> int:
    """Inputs and results of the chosen experts' products: kept from step to step, while logits are sampled, too."""
    if not any(layer.num_experts for layer in rank.layers):
        return 0
    width, hidden = rank.expert_intermediate_size, rank.hidden_size
    rows = replica.max_num_batched_tokens * rank.num_experts_per_token
    return rows * (max(2 * width, hidden) + width) * 2


def _indivisible(spec: ModelSpec, replica: Replica) -> str:
    tp, pp = replica.tensor_parallel, replica.pipeline_parallel
    if spec.num_heads % tp:
        return f"{spec.num_heads} heads cannot be divided over {tp} devices"
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        return f"{spec.num_kv_heads} heads of keys and values cannot be divided over {tp} devices"
    if any(layer.num_experts == 0 for layer in spec.layers) and spec.intermediate_size % tp:
        return f"an inner size of {spec.intermediate_size} cannot be divided over {tp} devices"
    if spec.expert_intermediate_size % tp and replica.expert_parallel == 1:
        return f"experts of {spec.expert_intermediate_size} cannot be divided over {tp} devices"
    if pp > spec.num_layers:
        return f"{spec.num_layers} layers cannot be divided over {pp} stages"
    return undivided_blocks(spec, replica)


def _own(spec: ModelSpec, profile: DeviceProfile, replica: Replica) -> ReplicaMemory:
    """As our own engine plans it."""
    kind: Literal["cpu", "cuda"] = "cpu" if profile.kind == "cpu" else "cuda"
    settings = engine_settings(spec, replica)
    try:
        plan = plan_memory(spec, settings, profile.memory_bytes, kind=kind)
    except PowerbandError as problem:
        return ReplicaMemory({}, 0, 0, settings.block_size, problem.message.rstrip("."))
    layout = plan.layout if plan.layout.windowed else None
    return ReplicaMemory(
        plan.parts, plan.available_bytes, plan.num_blocks, plan.block_size, "", layout, plan.max_model_len
    )


def engine_settings(spec: ModelSpec, replica: Replica, **more: Any) -> EngineSettings:
    """Our own engine's settings for a replica. more: fields to add, such as the model's name."""
    dtypes = {"float32": "float32", "16bit": "auto", "fp8": "auto", "int8": "auto"}
    asked = replica.quantization if spec.weight_format is None and replica.quantization in ("int8", "int4") else "none"
    quantized = asked != "none" or spec.weight_format is not None
    kv: Any = "int8" if replica.kv_precision == "int8" else ("bfloat16" if quantized else "auto")
    values: dict[str, Any] = {
        "dtype": dtypes[replica.kv_precision],
        "quantization": asked,
        "kv_cache_dtype": kv,
        "max_model_len": min(replica.max_model_len, spec.max_position),
        "max_num_seqs": replica.max_num_seqs,
        "max_num_batched_tokens": max(replica.max_num_batched_tokens, replica.max_num_seqs),
        "long_prefill_token_threshold": replica.long_prefill_token_threshold,
        "gpu_memory_utilization": replica.gpu_memory_utilization,
        "enable_prefix_caching": replica.enable_prefix_caching,
    }
    return EngineSettings(**{**values, **more})


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
