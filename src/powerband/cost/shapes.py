"""What one rank of a replica computes: matrices, heads and experts of its layers. Sizes in elements and bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from powerband.cost.operator_models import AttentionCall
from powerband.cost.projections import Part, quantized_parts
from powerband.errors import UsageError
from powerband.spec.deployment import KVPrecision, Quantization, Replica
from powerband.spec.model.model_spec import ModelSpec


class GemmFormat(NamedTuple):
    """How a precision holds a matrix and what it multiplies in."""

    weight_bytes: float  # of an element, its share of scales in it
    input_bytes: float
    dtype: str  # key of DeviceProfile.peak_flops_per_s
    dynamic: bool = False  # scales of activations are found at run time


FORMATS: Mapping[Quantization, GemmFormat] = {
    "none": GemmFormat(2.0, 2.0, "16bit"),
    "fp8": GemmFormat(1.0, 1.0, "fp8", dynamic=True),
    "fp8_static": GemmFormat(1.0, 1.0, "fp8"),
    "int8": GemmFormat(1.0, 2.0, "16bit"),
    "w8a8": GemmFormat(1.0, 1.0, "int8", dynamic=True),
    "int4": GemmFormat(0.5 + 2.5 / 128, 2.0, "16bit"),  # groups of 128 with a 16-bit scale and a zero point
    "nvfp4": GemmFormat(0.5 + 1 / 16, 0.5 + 1 / 16, "fp4", dynamic=True),
    "mxfp4": GemmFormat(0.5 + 1 / 32, 2.0, "16bit"),
}
PLAIN = FORMATS["none"]


class GemmShape(NamedTuple):
    """In so many layers; y[m, n] = x[m, k] · W[k, n]."""

    layers: int
    n: int
    k: int


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Of a layer: how many there are, into how many ranks they are divided, and what a rank holds of each."""

    layers: int
    num_experts: int
    ranks: int
    width: int


@dataclass(frozen=True, slots=True)
class RankShapes:
    """All pipeline stages of one tensor-parallel rank together."""

    layers: int
    projections: tuple[GemmShape, ...]  # in the replica's precision
    plain_projections: tuple[GemmShape, ...]  # that a quantized checkpoint leaves in 16 bits
    router: tuple[GemmShape, ...]
    experts: tuple[ExpertShape, ...]
    head: GemmShape
    attention: tuple[tuple[int, AttentionCall], ...]  # layers, heads
    elementwise_bytes: float  # of one token, in all layers: norms, rotary, activations, writes of keys and values
    layer_weight_bytes: float

    @classmethod
    def of(cls, spec: ModelSpec, replica: Replica) -> RankShapes:
        """Raises UsageError when the heads cannot be divided so."""
        ranks, hidden, dim = replica.tensor_parallel, spec.hidden_size, spec.head_dim
        if spec.num_heads % ranks:
            raise UsageError(
                f"{spec.num_heads} heads cannot be divided among {ranks} ranks.",
                hint="tensor_parallel must divide the number of heads.",
                param="tensor_parallel",
            )
        heads = spec.num_heads // ranks
        kv_heads = max(1, -(-spec.num_kv_heads // ranks))  # fewer than ranks: each is held by several
        dense = sum(layer.num_experts == 0 for layer in spec.layers)
        inner = -(-spec.intermediate_size // ranks)
        shapes: dict[frozenset[Part], GemmShape] = {
            frozenset(("q", "k", "v")): GemmShape(spec.num_layers, (heads + 2 * kv_heads) * dim, hidden),
            frozenset(("o",)): GemmShape(spec.num_layers, hidden, heads * dim),
        }
        if dense:
            shapes[frozenset(("gate", "up"))] = GemmShape(dense, 2 * inner, hidden)
            shapes[frozenset(("down",))] = GemmShape(dense, hidden, inner)
        projections, plain_projections = _by_precision(spec, replica, shapes)
        kinds = Counter(layer.num_experts for layer in spec.layers if layer.num_experts)
        divided = replica.expert_parallel
        width = spec.expert_intermediate_size if divided > 1 else -(-spec.expert_intermediate_size // ranks)
        experts = tuple(ExpertShape(count, number, divided, width) for number, count in kinds.items())
        kv_bytes = 2.0 * kv_heads * kv_row_bytes(dim, replica.kv_precision)
        windows = Counter(layer.window for layer in spec.layers)
        weight_bytes = FORMATS[replica.quantization].weight_bytes
        held = sum(matrix.layers * matrix.n * matrix.k for matrix in projections) * weight_bytes
        held += sum(matrix.layers * matrix.n * matrix.k for matrix in plain_projections) * PLAIN.weight_bytes
        held += sum(
            kind.layers * kind.num_experts / kind.ranks * 3 * hidden * kind.width * weight_bytes for kind in experts
        )
        return cls(
            layers=spec.num_layers,
            projections=projections,
            plain_projections=plain_projections,
            router=tuple(GemmShape(count, number, hidden) for number, count in kinds.items()),
            experts=experts,
            head=GemmShape(1, -(-spec.vocab_size // ranks), hidden),
            attention=tuple((count, AttentionCall(heads, dim, kv_bytes, window)) for window, count in windows.items()),
            elementwise_bytes=2.0
            * (spec.num_layers * (6 * hidden + 2 * (heads + 2 * kv_heads) * dim) + dense * 3 * inner),
            layer_weight_bytes=held,
        )


def _by_precision(
    spec: ModelSpec, replica: Replica, shapes: Mapping[frozenset[Part], GemmShape]
) -> tuple[tuple[GemmShape, ...], tuple[GemmShape, ...]]:
    """Each product in as many layers as hold all its parts in the replica's precision, and in the other layers."""
    if replica.quantization == "mxfp4":
        return (), tuple(shapes.values())
    found = []
    for parts, shape in shapes.items():
        quantized = sum(parts <= held for held in quantized_parts(spec))
        found.append((shape._replace(layers=quantized), shape._replace(layers=shape.layers - quantized)))
    return tuple(one for one, _ in found if one.layers), tuple(other for _, other in found if other.layers)


def kv_row_bytes(head_dim: int, precision: KVPrecision) -> float:
    """Bytes of one position's key, or value, of one head. int8: with a float32 scale."""
    return {"float32": 4.0 * head_dim, "16bit": 2.0 * head_dim, "fp8": 1.0 * head_dim, "int8": head_dim + 4.0}[
        precision
    ]
