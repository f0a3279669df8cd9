"""Measured tables as points of the laws. The tables lie beside the checkout (shared/data), or in $ACCURACY_DATA."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from powerband.cost import operator_models as laws
from powerband.cost.operator_models import AttentionCall, DeviceSpeed, PrefillChunks
from powerband.cost.shapes import FORMATS
from powerband.spec.hardware.catalog import load_catalog
from powerband.spec.hardware.profile import AttentionModel, DeviceProfile, ElementwiseModel, GemmModel, LinkModel

# The tables' names of devices → the catalog's.
DEVICES = {
    "a100_sxm": "A100-80G",
    "l40s": "L40S",
    "h100_sxm": "H100",
    "h200_sxm": "H200",
    "b200_sxm": "B200",
    "rtx_pro_6000_server": "RTX-PRO-6000",
    "RTX4090": "RTX-4090",
    "RTXPRO6000": "RTX-PRO-6000",
    "A100": "A100-80G",
}
# The tables' dtypes → our quantizations. fp8 has the kernel that quantizes its input in it.
QUANTIZATIONS = {
    "bfloat16": "none",
    "fp8": "fp8",
    "nvfp4": "nvfp4",
    "int8_wo": "int8",
    "int4_wo": "int4",
    "sq": "w8a8",
}
KV = {"bfloat16": "16bit", "fp8": "fp8"}
_KV_BYTES = {"16bit": 2, "fp8": 1}
_SMALLEST = 768  # n and k below it occur in no model of the size that is served
# Where the L2 cache is this large, tables show decodes out of L2, which a serving engine never sees.
_LARGE_L2 = 90e6


def folder() -> Path | None:
    """Where the tables are; None: nowhere."""
    named = os.environ.get("ACCURACY_DATA")
    places = [Path(named)] if named else [parent / "shared" / "data" for parent in Path(__file__).resolve().parents]
    return next((place for place in places if (place / "op_gemm.csv").exists()), None)


def read(name: str) -> Iterator[dict[str, str]]:
    place = folder()
    if place is None:
        raise SystemExit("The measured tables are not here. Name their folder in ACCURACY_DATA.")
    with (place / name).open(newline="") as file:
        yield from csv.DictReader(file)


def device(name: str) -> DeviceProfile:
    return load_catalog().find(DEVICES[name])


def speed(profile: DeviceProfile, dtype: str = "16bit") -> DeviceSpeed:
    return DeviceSpeed(profile.peak_flops_per_s[dtype], profile.bandwidth_bytes_per_s, profile.multiprocessors)


class Gemm(NamedTuple):
    m: int
    n: int
    k: int
    seconds: float


@cache
def gemm_tables() -> dict[tuple[str, str, str], list[Gemm]]:
    """(gpu, engine, quantization) → points."""
    found: dict[tuple[str, str, str], list[Gemm]] = defaultdict(list)
    for row in read("op_gemm.csv"):
        m, n, k = (int(row[name]) for name in "mnk")
        if row["dtype"] in QUANTIZATIONS and min(n, k) >= _SMALLEST:
            key = (row["gpu"], row["engine"], QUANTIZATIONS[row["dtype"]])
            found[key].append(Gemm(m, n, k, float(row["latency_ms"]) / 1e3))
    return dict(found)


def gemm_s(profile: DeviceProfile, quantization: str) -> Callable[[GemmModel, Gemm], float]:
    kind = FORMATS[quantization]  # type: ignore[index]
    at = speed(profile, kind.dtype)

    def predict(law: GemmModel, point: Gemm) -> float:
        return laws.gemm(
            law,
            at,
            point.m,
            point.n,
            point.k,
            weight_bytes=kind.weight_bytes,
            input_bytes=kind.input_bytes,
            dynamic=kind.dynamic,
        ).total

    return predict


class Attention(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    length: int
    seconds: float


@cache
def attention_tables(phase: str) -> dict[tuple[str, str], list[Attention]]:
    """(gpu, KV precision) → points. Of decodes, those out of a large L2 are left out."""
    found: dict[tuple[str, str], list[Attention]] = defaultdict(list)
    for row in read(f"op_attention_{phase}.csv"):
        sizes = [int(row[name]) for name in ("num_heads", "num_kv_heads", "head_dim", "batch_size")]
        point = Attention(
            *sizes, int(row["kv_len" if phase == "decode" else "seq_len"]), float(row["latency_ms"]) / 1e3
        )
        precision, l2 = KV[row["kv_cache_dtype"]], device(row["gpu"]).l2_bytes
        moved = 2 * point.batch * point.length * point.kv_heads * point.head_dim * _KV_BYTES[precision]
        warm = phase == "decode" and l2 > _LARGE_L2 and row["gpu"] != "b200_sxm" and moved <= 1.5 * l2
        if not warm:
            found[row["gpu"], precision].append(point)
    return dict(found)


def _heads(point: Attention, precision: str) -> AttentionCall:
    return AttentionCall(point.heads, point.head_dim, 2.0 * point.kv_heads * point.head_dim * _KV_BYTES[precision])


def decode_s(profile: DeviceProfile, precision: str) -> Callable[[AttentionModel, Attention], float]:
    at = speed(profile)

    def predict(law: AttentionModel, point: Attention) -> float:
        return laws.decode(law, at, point.batch * point.length, point.batch, _heads(point, precision))

    return predict


def prefill_s(profile: DeviceProfile, precision: str) -> Callable[[AttentionModel, Attention], float]:
    at = speed(profile)

    def predict(law: AttentionModel, point: Attention) -> float:
        chunks = PrefillChunks()
        for _ in range(point.batch):
            chunks.add(law, at.multiprocessors, point.length, point.length, _heads(point, precision))
        return chunks.seconds(law, at).total

    return predict


class Mixed(NamedTuple):
    """A chunk behind a cached prefix, and decodes, in one call; Llama-3.1-8B's heads."""

    chunk: int
    prefix: int
    decodes: int
    context: int
    seconds: float


@cache
def mixed_tables() -> dict[str, list[Mixed]]:
    found: dict[str, list[Mixed]] = defaultdict(list)
    for row in read("op_attention_mixed.csv"):
        sizes = [int(row[name]) for name in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")]
        found[row["gpu"]].append(Mixed(*sizes, float(row["time_us"]) / 1e6))
    return dict(found)


def mixed_s(profile: DeviceProfile) -> Callable[[AttentionModel, Mixed], float]:
    at, heads = speed(profile), AttentionCall(32, 128, 2.0 * 8 * 128 * 2)

    def predict(law: AttentionModel, point: Mixed) -> float:
        seconds = laws.decode(law, at, point.decodes * (point.context + 1), point.decodes, heads)
        if point.chunk:
            chunks = PrefillChunks()
            chunks.add(law, at.multiprocessors, point.chunk, point.prefix + point.chunk, heads)
            seconds = seconds * law.mixed_factor + chunks.seconds(law, at).total
        return seconds

    return predict


class Routed(NamedTuple):
    tokens: int
    hidden: int
    width: int  # of an expert on one rank
    chosen: int
    num_experts: int
    ranks: int
    balanced: bool
    seconds: float


@cache
def expert_tables() -> dict[tuple[str, str], list[Routed]]:
    """(gpu, quantization) → points."""
    found: dict[tuple[str, str], list[Routed]] = defaultdict(list)
    for row in read("op_moe.csv"):
        if row["moe_dtype"] not in QUANTIZATIONS:
            continue
        tensor, expert = int(row["moe_tp_size"]), int(row["moe_ep_size"])
        found[row["gpu"], QUANTIZATIONS[row["moe_dtype"]]].append(
            Routed(
                int(row["num_tokens"]),
                int(row["hidden_size"]),
                -(-int(row["inter_size"]) // tensor),
                int(row["topk"]),
                int(row["num_experts"]),
                expert,
                row["distribution"] == "balanced",
                float(row["latency_ms"]) / 1e3,
            )
        )
    return dict(found)


def experts_s(profile: DeviceProfile, quantization: str) -> Callable[[GemmModel, Routed], float]:
    kind = FORMATS[quantization]  # type: ignore[index]
    at = speed(profile, kind.dtype)

    def predict(law: GemmModel, point: Routed) -> float:
        return laws.experts(
            law,
            at,
            point.tokens,
            hidden=point.hidden,
            width=point.width,
            chosen=point.chosen,
            num_experts=point.num_experts,
            ranks=point.ranks,
            weight_bytes=kind.weight_bytes,
            imbalance=1.0 if point.balanced else laws.IMBALANCE,
        ).total

    return predict


class Sum(NamedTuple):
    moved_bytes: int
    seconds: float


_SUMS = {"TRTLLM": "trtllm", "vLLM_custom_graph": "*", "SGLang_CustomAllReduce_graph": "sglang"}
_LARGEST_SUM = 1 << 28


@cache
def all_reduce_tables() -> dict[tuple[str, str, int], list[Sum]]:
    """(gpu, engine or *, ranks) → points of all-reduces in CUDA graphs."""
    found: dict[tuple[str, str, int], list[Sum]] = defaultdict(list)
    for row in read("op_collectives.csv"):
        size = int(float(row["message_bytes"]))
        if row["op_name"] == "all_reduce" and row["kernel"] in _SUMS and row["gpu"] in DEVICES and size <= _LARGEST_SUM:
            key = (row["gpu"], _SUMS[row["kernel"]], int(row["num_gpus"]))
            found[key].append(Sum(size, float(row["latency_ms"]) / 1e3))
    return dict(found)


def all_reduce_s(ranks: int) -> Callable[[LinkModel, Sum], float]:
    return lambda law, point: laws.all_reduce(law, ranks, point.moved_bytes)


@cache
def transfer_tables() -> dict[str, list[Sum]]:
    """gpu → messages from one device of a node to another."""
    found: dict[str, list[Sum]] = defaultdict(list)
    names = {"a100_dgx": "a100_sxm", "h100_dgx": "h100_sxm"}
    for row in read("op_collectives.csv"):
        if row["op_name"] == "send_recv" and row["gpu"] in names and row["mode"] == "devices_per_node=2":
            found[names[row["gpu"]]].append(Sum(int(float(row["message_bytes"])), float(row["latency_ms"]) / 1e3))
    return dict(found)


@dataclass(frozen=True, slots=True)
class Kernel:
    moved_bytes: float
    seconds: float


_ELEMENTWISE = ("layernorm", "rotary_emb", "act_fn")


@cache
def elementwise_tables() -> dict[str, list[Kernel]]:
    """gpu → norms, rotary and activations of Llama-3.1-8B, as vLLM's kernels take them."""
    moved = {"layernorm": 2 * 4 * 4096, "rotary_emb": 2 * 2 * (32 + 8) * 128, "act_fn": 2 * 3 * 14336}
    found: dict[str, list[Kernel]] = defaultdict(list)
    for row in read("op_layers.csv"):
        if (row["source"], row["model"], row["tp"]) == ("LLMServingSim v1", "Llama-3.1-8B", "1") and row["op"] in moved:
            kernel = Kernel(moved[row["op"]] * int(row["tokens"]), float(row["latency_ms"]) / 1e3)
            found[row["gpu"]].append(kernel)
    return dict(found)


def elementwise_s(profile: DeviceProfile) -> Callable[[ElementwiseModel, Kernel], float]:
    at = speed(profile)
    return lambda law, kernel: laws.elementwise(law, at, 1, kernel.moved_bytes)


@cache
def layer_gemms() -> dict[str, list[Gemm]]:
    """gpu → 16-bit products of whole layers, where a table of products does not exist."""
    found: dict[str, list[Gemm]] = defaultdict(list)
    for row in read("op_layers.csv"):
        if row["source"] == "LLMServingSim v1" and row["n"]:
            n, k = int(float(row["n"])), int(float(row["k"]))
            found[row["gpu"]].append(Gemm(int(row["tokens"]), n, k, float(row["latency_ms"]) / 1e3))
    return dict(found)
