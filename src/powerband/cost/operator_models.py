"""What operators cost on a device: laws with a few coefficients each (spec.profile), as functions of shapes. Seconds.

    product     t = overhead + quantize + (Tc^p + Tm^p)^(1/p)         Tc: multiplying, Tm: moving the matrices
    prefill     t = overhead + max(F / (peak · share) + the longest chunk's wait, bytes / bandwidth)
    decode      t = overhead + bytes of keys and values / (bandwidth · share)
    link        t = latency + factor · bytes / bytes_per_s

More tokens, longer contexts, slower devices never make one shorter. Source: the roofline model (Williams et al. 2009)
with a smooth knee; how well it holds on measured tables is printed by `make accuracy`.
"""

from __future__ import annotations

from math import ceil, exp, inf
from typing import NamedTuple

from powerband.spec.hardware.profile import AttentionModel, ElementwiseModel, GemmModel, LinkModel
from powerband.spec.model.counts import visible_pairs

TILE = 128  # rows and columns of a result that one multiprocessor computes at a time
# Tokens of the fullest of several ranks that divide the experts, beside the mean, where experts are not equally liked:
# power_law_1.2 beside balanced rows of AIConfigurator's tables, 1.27 on two ranks, 1.44 on four, 1.59 on eight.
IMBALANCE = 1.4


class OperatorSeconds(NamedTuple):
    total: float
    computing: bool  # whether compute binds, not bandwidth


class DeviceSpeed(NamedTuple):
    """Of a device, at one precision."""

    flops_per_s: float
    bytes_per_s: float
    multiprocessors: int
    row_tiles: bool = True  # rows are computed in tiles, as tensor cores do; on a CPU what is padded costs nothing


def gemm(
    model: GemmModel,
    speed: DeviceSpeed,
    m: int,
    n: int,
    k: int,
    *,
    weight_bytes: float,
    input_bytes: float,
    dynamic: bool = False,
) -> OperatorSeconds:
    """y[m, n] = x[m, k] · W[k, n]; bytes of an element. dynamic: x comes in 16 bits and is quantized first."""
    if m <= 0:
        return OperatorSeconds(0.0, False)
    rows = _rows(m) if speed.row_tiles else m
    compute = 2.0 * rows * n * k / (speed.flops_per_s * model.compute_share)
    compute /= _filled(model.fill, max(1.0, rows / TILE) * ceil(n / TILE), speed.multiprocessors)
    rate = speed.bytes_per_s * model.memory_share
    memory = (weight_bytes * n * k + input_bytes * m * k + 2.0 * m * n + model.extra_bytes) / rate
    extra = model.overhead_s
    if dynamic:
        extra += model.quantize_s + m * k * (2.0 + input_bytes) / rate
    return OperatorSeconds(extra + _smooth_max(compute, memory, model.sharpness), compute > memory)


def experts(
    model: GemmModel,
    speed: DeviceSpeed,
    tokens: int,
    *,
    hidden: int,
    width: int,
    chosen: int,
    num_experts: int,
    ranks: int = 1,
    weight_bytes: float,
    imbalance: float = 1.0,
) -> OperatorSeconds:
    """The routed experts of one layer on the fullest of `ranks`, each with whole experts of `width` columns.

    A token goes to `chosen` of num_experts. Weights of experts that no token chose are not read.
    """
    if tokens <= 0:
        return OperatorSeconds(0.0, False)
    touched = touched_experts(tokens, chosen, num_experts) / ranks
    routed = min(tokens * chosen / ranks * imbalance, float(tokens * min(chosen, max(1.0, num_experts / ranks))))
    rows = max(routed, 16.0 * touched)  # tensor cores take 16 rows at least, of each expert
    compute = 6.0 * rows * hidden * width / (speed.flops_per_s * model.compute_share)
    tiles = max(touched, rows / TILE) * (ceil(2 * width / TILE) + ceil(hidden / TILE)) / 2
    compute /= _filled(model.fill, tiles, speed.multiprocessors)
    moved = 3.0 * hidden * width * touched * weight_bytes + routed * (2.0 * hidden + 3.0 * width) * 2.0
    memory = (moved + model.extra_bytes) / (speed.bytes_per_s * model.memory_share)
    return OperatorSeconds(
        model.overhead_s + model.quantize_s + _smooth_max(compute, memory, model.sharpness), compute > memory
    )


def touched_experts(tokens: float, chosen: int, num_experts: int) -> float:
    """Experts that at least one of `tokens` chooses, when all are equally likely."""
    idle: float = (1.0 - chosen / num_experts) ** tokens
    return num_experts * (1.0 - idle)


class PrefillChunks:
    """The attention of a step's prefill chunks in one layer, added up one by one."""

    __slots__ = ("flops", "moved", "wait")

    def __init__(self) -> None:
        self.flops = 0.0
        self.moved = 0.0  # bytes
        self.wait = 0.0  # FLOPs that the device could have done while the chunk with the fewest tiles held it up

    def add(self, model: AttentionModel, multiprocessors: int, new: int, context: int, shape: AttentionCall) -> None:
        """`new` tokens whose last one sees `context` tokens, fewer where a window ends."""
        seen = context if shape.window is None else min(context, shape.window + new)
        # A multiprocessor takes half a tile of queries at least, and whole tiles along the diagonal.
        pairs = max(visible_pairs(new, context, shape.window), 0.5 * TILE * seen) + 0.5 * TILE * new
        flops = 4.0 * shape.heads * shape.head_dim * pairs
        filled = _filled(model.fill, shape.heads * max(1.0, new / TILE), multiprocessors)
        self.flops += flops
        self.wait = max(self.wait, flops * (1.0 / filled - 1.0))
        self.moved += shape.kv_bytes * context + 4.0 * shape.heads * shape.head_dim * new

    def seconds(self, model: AttentionModel, speed: DeviceSpeed) -> OperatorSeconds:
        """Of the call that computes them all."""
        if not self.flops:
            return OperatorSeconds(0.0, False)
        compute = (self.flops + self.wait) / (speed.flops_per_s * model.compute_share)
        memory = self.moved / (speed.bytes_per_s * (model.prefill_memory_share or model.memory_share))
        return OperatorSeconds(model.prefill_overhead_s + max(compute, memory), compute > memory)


class AttentionCall(NamedTuple):
    """Of one rank in one layer."""

    heads: int
    head_dim: int
    kv_bytes: float  # of one position, keys and values
    window: int | None = None


def decode(model: AttentionModel, speed: DeviceSpeed, positions: float, tokens: float, shape: AttentionCall) -> float:
    """Decodes of `tokens` in all that read `positions` in all, in one layer."""
    if positions <= 0:
        return 0.0
    moved = positions * shape.kv_bytes + tokens * 4.0 * shape.heads * shape.head_dim + model.extra_bytes
    return model.decode_overhead_s + moved / (speed.bytes_per_s * model.memory_share)


def elementwise(model: ElementwiseModel, speed: DeviceSpeed, kernels: float, moved_bytes: float) -> float:
    return kernels * model.kernel_s + moved_bytes / (speed.bytes_per_s * model.memory_share)


def link(model: LinkModel, moved_bytes: float, factor: float = 1.0) -> float:
    return model.latency_s + factor * moved_bytes / model.bytes_per_s


def all_reduce(model: LinkModel, ranks: int, moved_bytes: float) -> float:
    """A sum over `ranks` of vectors of moved_bytes. Each sends 2 (n - 1) / n of it, or all to all others at once."""
    seconds = link(model, moved_bytes, 2.0 * (ranks - 1) / ranks)
    if not model.direct_bytes_per_s:
        return seconds
    return min(seconds, model.direct_latency_s + (ranks - 1) * moved_bytes / model.direct_bytes_per_s)


def _rows(m: int) -> int:
    """Rows as tensor cores take them."""
    if m <= 64:
        return -(-m // 16) * 16
    return -(-m // 64) * 64


def _filled(fill: float, tiles: float, multiprocessors: int) -> float:
    """Share of the device that so many tiles keep busy."""
    return 1.0 - exp(-tiles / (fill * multiprocessors)) if fill else 1.0


def _smooth_max(compute: float, memory: float, sharpness: float) -> float:
    large, small = max(compute, memory), min(compute, memory)
    if sharpness == inf or not large:
        return large
    knee: float = large * (1.0 + (small / large) ** sharpness) ** (1.0 / sharpness)
    return knee
