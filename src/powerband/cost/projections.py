"""The projections of a model's layers as ranks divide them: which a checkpoint quantizes, and whether scales allow it.

A block of scales (FP8 in blocks of 128 × 128, groups of AWQ and GPTQ) cannot be divided: vLLM and SGLang refuse to load
a checkpoint where a rank's share of a matrix is not made of whole blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from powerband.spec.deployment import Replica
from powerband.spec.model.model_spec import LayerSpec, ModelSpec

Part = Literal["q", "k", "v", "o", "gate", "up", "down", "experts_gate", "experts_up", "experts_down"]
ATTENTION: tuple[Part, ...] = ("q", "k", "v", "o")
DENSE: tuple[Part, ...] = ("gate", "up", "down")
EXPERTS: tuple[Part, ...] = ("experts_gate", "experts_up", "experts_down")

# Under the layer's own name. Several: of families that fuse projections, and of those with other words for experts.
_NAMES: dict[Part, tuple[str, ...]] = {
    "q": ("self_attn.q_proj", "self_attn.qkv_proj"),
    "k": ("self_attn.k_proj", "self_attn.qkv_proj"),
    "v": ("self_attn.v_proj", "self_attn.qkv_proj"),
    "o": ("self_attn.o_proj",),
    "gate": ("mlp.gate_proj", "mlp.gate_up_proj"),
    "up": ("mlp.up_proj", "mlp.gate_up_proj"),
    "down": ("mlp.down_proj",),
    "experts_gate": ("mlp.experts.0.gate_proj", "block_sparse_moe.experts.0.w1"),
    "experts_up": ("mlp.experts.0.up_proj", "block_sparse_moe.experts.0.w3"),
    "experts_down": ("mlp.experts.0.down_proj", "block_sparse_moe.experts.0.w2"),
}
_BY_INPUTS: tuple[Part, ...] = ("o", "down", "experts_down")  # divided by their inputs, the others by their outputs


@dataclass(frozen=True, slots=True)
class RankMatrix:
    """What a rank holds of a projection of one layer: so many matrices of outputs × inputs."""

    outputs: int
    inputs: int
    count: int = 1  # of experts, those of all ranks that share the layer's experts: a rank holds its part of the bytes

    @property
    def size(self) -> int:
        return self.count * self.outputs * self.inputs


def parts_of(layer: LayerSpec) -> tuple[Part, ...]:
    return ATTENTION + (EXPERTS if layer.num_experts else DENSE)


def rank_matrix(spec: ModelSpec, layer: LayerSpec, part: Part, replica: Replica) -> RankMatrix:
    """Whole experts divided over ranks (expert parallelism) take as many bytes as a part of each."""
    ranks, hidden = replica.tensor_parallel, spec.hidden_size
    if part in ATTENTION:
        heads = spec.num_heads // ranks if part in ("q", "o") else max(spec.num_kv_heads // ranks, 1)
        width, count = heads * spec.head_dim, 1
    elif part in DENSE:
        width, count = -(-spec.intermediate_size // ranks), 1
    else:
        width, count = -(-spec.expert_intermediate_size // ranks), layer.num_experts
    return RankMatrix(hidden, width, count) if part in _BY_INPUTS else RankMatrix(width, hidden, count)


@lru_cache(maxsize=64)
def quantized_parts(spec: ModelSpec) -> tuple[frozenset[Part], ...]:
    """Of each layer: the projections that the checkpoint quantizes; all, where it does not say or is in 16 bits."""
    modules = spec.quantized_modules
    if modules is None:
        return tuple(frozenset(parts_of(layer)) for layer in spec.layers)
    return tuple(
        frozenset(
            part
            for part in parts_of(layer)
            if modules.stores(*(f"model.layers.{index}.{name}" for name in _NAMES[part]))
        )
        for index, layer in enumerate(spec.layers)
    )


UNDIVIDED_BLOCKS = "blocks of scales cannot be divided"


def undivided_blocks(spec: ModelSpec, replica: Replica) -> str:
    """Why the checkpoint's blocks of scales cannot be divided over the ranks; '' when they can."""
    modules, ranks = spec.quantized_modules, replica.tensor_parallel
    if modules is None or ranks == 1 or replica.quantization == "none":
        return ""
    block = modules.block_outputs, modules.block_inputs
    if block == (1, 1):
        return ""
    kinds = {(parts, layer) for parts, layer in zip(quantized_parts(spec), spec.layers, strict=True)}
    for parts, layer in kinds:
        for part in parts_of(layer):
            if part not in parts or (part in EXPERTS and replica.expert_parallel > 1):
                continue
            matrix = rank_matrix(spec, layer, part, replica)
            by_inputs = part in _BY_INPUTS
            share, size = (matrix.inputs, block[1]) if by_inputs else (matrix.outputs, block[0])
            if share % size:
                sides = "inputs" if by_inputs else "outputs"
                name = _NAMES[part][0].rpartition(".")[2]
                padded = -(-share * ranks // (size * ranks)) * size * ranks
                return (
                    f"{UNDIVIDED_BLOCKS}: each of {ranks} ranks would have {share} {sides} of {name}, and {size} share "
                    f"a scale; those of a checkpoint with {padded} of them, as padding makes it, can"
                )
    return ""
