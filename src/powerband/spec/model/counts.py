"""What follows from a ModelSpec by counting: parameters, bytes, and the FLOPs of a step.

Tested for every family: parameters equal transformers' own count, FLOPs that of torch's FlopCounterMode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from powerband.errors import UsageError
from powerband.spec.checkpoint.quantization import Held, WeightPrecisions
from powerband.spec.config_reader import shown
from powerband.spec.model.model_spec import ModelSpec

DTYPE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Parameters of a whole model by what they do."""

    embedding: int  # token embeddings; with tied embeddings they are the output head, too
    head: int  # 0 when tied
    attention: int  # projections, their biases, norms of queries and keys, sinks
    mlp: int  # of dense layers
    router: int
    experts: int
    expert_biases: int
    norms: int

    @property
    def total(self) -> int:
        blocks = self.attention + self.mlp + self.router + self.experts + self.expert_biases + self.norms
        return self.embedding + self.head + blocks


def count_parameters(spec: ModelSpec) -> ParameterCounts:
    """Every weight that the checkpoint holds, tied ones once."""
    hidden, num_layers = spec.hidden_size, spec.num_layers
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = _attention_matrix_size(spec)
    attention += (queries + 2 * keys if spec.qkv_bias else 0) + (hidden if spec.output_bias else 0)
    attention += {"none": 0, "head": 2 * spec.head_dim, "full": queries + keys}[spec.qk_norm]
    attention += spec.num_heads if spec.attention_sinks else 0
    inner = _mlp_inputs(spec)
    mlp = hidden * (inner + spec.intermediate_size) + (inner + hidden if spec.mlp_bias else 0)
    experts = sum(layer.num_experts for layer in spec.layers)
    width = spec.expert_intermediate_size
    embedding = spec.vocab_size * hidden
    per_norm = hidden
    num_norms = num_layers * (4 if spec.norm_placement == "both" else 2) + 1
    if spec.encoder is not None:
        embedding += (spec.encoder.num_positions + spec.encoder.num_types) * hidden
        per_norm = 2 * hidden  # weight and bias
    return ParameterCounts(
        embedding=embedding,
        head=0 if spec.tie_embeddings else embedding,
        attention=num_layers * attention,
        mlp=_num_dense_layers(spec) * mlp,
        router=experts * (hidden + (1 if spec.router_bias else 0)),
        experts=experts * 3 * hidden * width,
        expert_biases=experts * (2 * width + hidden) if spec.expert_bias else 0,
        norms=num_norms * per_norm,
    )


def parameter_bytes(spec: ModelSpec, dtype: str, held: WeightPrecisions) -> int:
    """Bytes of all weights in an engine that holds projections and head as `held` says, and the rest in `dtype`.

    8 bits: one float32 scale per output. 4 bits: one per group of inputs of an output, and perhaps a zero point.
    """
    counts = count_parameters(spec)
    matrices = _projections(spec)
    head = (spec.vocab_size, spec.hidden_size)
    plain = counts.total - sum(number * rows * columns for number, rows, columns in matrices)
    if not spec.tie_embeddings or held.head != "none":  # a tied head has a form of its own only when it is quantized
        matrices.append((1, *head))
        plain -= counts.head
    size = plain * dtype_bytes(dtype)
    if spec.pooling is not None:
        size += spec.pooling.num_parameters * dtype_bytes("float32")
    for number, rows, columns in matrices:
        precision = held.head if (rows, columns) == head else held.layers
        size += number * _matrix_bytes(rows, columns, precision, dtype, held)
    return size


def _matrix_bytes(rows: int, columns: int, precision: Held, dtype: str, held: WeightPrecisions) -> int:
    if precision == "int8":
        return rows * columns + rows * 4
    if precision == "int4":
        return rows * columns // 2 + rows * -(-columns // held.group_size) * (5 if held.zeros else 4)
    return rows * columns * dtype_bytes(dtype)


def _projections(spec: ModelSpec) -> list[tuple[int, int, int]]:
    """(how many, outputs, inputs) of the matrices of attention, MLPs and experts."""
    hidden, queries, keys = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    experts, width = sum(layer.num_experts for layer in spec.layers), spec.expert_intermediate_size
    return [
        (spec.num_layers, queries + 2 * keys, hidden),
        (spec.num_layers, hidden, queries),
        (_num_dense_layers(spec), _mlp_inputs(spec), hidden),
        (_num_dense_layers(spec), hidden, spec.intermediate_size),
        (experts, 2 * width, hidden),
        (experts, hidden, width),
    ]


def kv_bytes_per_token_per_layer(spec: ModelSpec, kv_dtype: str) -> int:
    """Bytes that one position's key and value take in one layer's cache. int8: with a float32 scale for each head.

    An encoder computes a text at once and keeps nothing.
    """
    if spec.encoder is not None:
        return 0
    if kv_dtype == "int8":
        return 2 * spec.num_kv_heads * (spec.head_dim + 4)
    return 2 * spec.num_kv_heads * spec.head_dim * dtype_bytes(kv_dtype)


def kv_bytes_per_token(spec: ModelSpec, kv_dtype: str) -> int:
    """Bytes that one position takes in the cache of all layers that see it."""
    return spec.num_layers * kv_bytes_per_token_per_layer(spec, kv_dtype)


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element. Raises UsageError for an unknown type."""
    if dtype not in DTYPE_BYTES:
        raise UsageError(f"Unknown dtype {shown(dtype)}.", hint=f"Known: {', '.join(DTYPE_BYTES)}.", param="dtype")
    return DTYPE_BYTES[dtype]


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Floating-point operations of one step (a multiply and an add are two)."""

    linear: int  # projections, MLPs, routers and experts
    attention: int  # scores and weighted sums
    head: int  # logits

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.head


def step_flops(spec: ModelSpec, works: Iterable[tuple[int, int]], sampled_rows: int) -> StepFlops:
    """FLOPs of one step over `works`: (new tokens, context after the step) of each request, prefill or decode alike.

    A matrix [m, n] costs 2·m·n per token; attention 4·num_heads·head_dim per pair of query and visible key
    (2 for the score, 2 for the weighted sum); the head 2·hidden·vocabulary per sampled row (Kaplan et al. 2020,
    arXiv 2001.08361, table 1, with the causal mask and windows counted exactly). Left out, all linear in tokens and
    without a matrix: norms, rotary, softmax, activations, biases, embedding look-up, sampling.
    """
    work = list(works)
    tokens = sum(new for new, _ in work)
    pairs = 0
    for window, layers in Counter(layer.window for layer in spec.layers).items():
        pairs += layers * sum(visible_pairs(new, context, window) for new, context in work)
    return StepFlops(
        linear=2 * tokens * _matrix_elements_per_token(spec),
        attention=4 * spec.num_heads * spec.head_dim * pairs,
        head=2 * spec.hidden_size * spec.vocab_size * sampled_rows,
    )


def _attention_matrix_size(spec: ModelSpec) -> int:
    return 2 * spec.hidden_size * spec.head_dim * (spec.num_heads + spec.num_kv_heads)


def _mlp_inputs(spec: ModelSpec) -> int:
    """Rows of the matrix that a dense MLP begins with: with a gate, it is two."""
    return (1 if spec.encoder is not None else 2) * spec.intermediate_size


def _num_dense_layers(spec: ModelSpec) -> int:
    return sum(layer.num_experts == 0 for layer in spec.layers)


def _matrix_elements_per_token(spec: ModelSpec) -> int:
    """Elements of the matrices that one token is multiplied with, in all layers, without the head."""
    hidden = spec.hidden_size
    dense = _num_dense_layers(spec)
    expert = 3 * hidden * spec.expert_intermediate_size * spec.num_experts_per_token
    return (
        spec.num_layers * _attention_matrix_size(spec)
        + dense * hidden * (_mlp_inputs(spec) + spec.intermediate_size)
        + (spec.num_layers - dense) * expert
        + sum(layer.num_experts for layer in spec.layers) * hidden
    )


def visible_pairs(new: int, context: int, window: int | None) -> int:
    """Sum over the last `new` of `context` positions of the keys that each sees: itself and what lies before."""
    start = context - new
    if window is None or context <= window:
        return _triangle(context) - _triangle(start)
    ramp = max(window - start, 0)  # positions that still see everything
    return _triangle(start + ramp) - _triangle(start) + (new - ramp) * window


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
