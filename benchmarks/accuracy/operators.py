"""Operators against their tables: coefficients from 25 points of each table, and those that the catalog ships."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.accuracy import fits, tables

from powerband.spec.hardware.profile import DeviceProfile, LinkModel


@dataclass(frozen=True, slots=True)
class Compared:
    """One table: predictions and measurements, and within how much nine in ten should lie."""

    name: str
    predicted: list[float]
    measured: list[float]
    band: float


def gemms(*, few: bool, precisions: Sequence[str] = ("none",)) -> Iterator[Compared]:
    for (gpu, engine, quantization), points in tables.gemm_tables().items():
        if quantization not in precisions:
            continue
        profile = tables.device(gpu)
        shipped = profile.gemm.get("sglang" if engine.startswith("sglang") else "*", {})[quantization]
        law = fits.gemm(profile, quantization, fits.few_gemms(points)).model if few else shipped
        predict = tables.gemm_s(profile, quantization)
        name = f"{gpu} {engine} {quantization}"
        yield _compared(name, [predict(law, point) for point in points], points, shipped.evidence.error)


def decodes(*, few: bool, precisions: Sequence[str] = ("16bit",)) -> Iterator[Compared]:
    for (gpu, precision), points in tables.attention_tables("decode").items():
        if precision in precisions:
            profile = tables.device(gpu)
            shipped = profile.attention["*"][precision]
            law = fits.decode(profile, precision, fits.few_attentions(points)).model if few else shipped
            predict = tables.decode_s(profile, precision)
            seconds = [predict(law, point) for point in points]
            yield _compared(f"{gpu} {precision}", seconds, points, shipped.decode_evidence.error)


def prefills(*, few: bool, precisions: Sequence[str] = ("16bit",)) -> Iterator[Compared]:
    for (gpu, precision), points in tables.attention_tables("prefill").items():
        if precision in precisions:
            profile = tables.device(gpu)
            shipped = profile.attention["*"][precision]
            law = fits.prefill(profile, precision, fits.few_attentions(points), shipped).model if few else shipped
            predict = tables.prefill_s(profile, precision)
            seconds = [predict(law, point) for point in points]
            yield _compared(f"{gpu} {precision}", seconds, points, shipped.prefill_evidence.error)


def experts() -> Iterator[Compared]:
    for (gpu, quantization), points in tables.expert_tables().items():
        profile = tables.device(gpu)
        law = (profile.experts.get("vllm", {}) | profile.experts.get("*", {}))[quantization]
        predict = tables.experts_s(profile, quantization)
        seconds = [predict(law, point) for point in points]
        yield _compared(f"{gpu} {quantization}", seconds, points, law.evidence.error)


def sums() -> Iterator[Compared]:
    for (gpu, engine, ranks), points in tables.all_reduce_tables().items():
        law = _link(tables.device(gpu), engine, ranks)
        predict = tables.all_reduce_s(ranks)
        name = f"{gpu} {'vllm' if engine == '*' else engine} {ranks} ranks"
        yield _compared(name, [predict(law, point) for point in points], points, law.evidence.error)


def _link(profile: DeviceProfile, engine: str, ranks: int) -> LinkModel:
    law: LinkModel = profile.all_reduce[engine][ranks]
    return law


def _compared(name: str, predicted: list[float], points: Sequence[object], band: float) -> Compared:
    return Compared(name, predicted, [point.seconds for point in points], band)  # type: ignore[attr-defined]


OPERATORS: list[tuple[str, Callable[[], Iterator[Compared]], float | None, str]] = [
    ("op_gemm, 16 bits, 25 points", lambda: gemms(few=True), 0.08, "6.0-8.4 %"),
    ("op_attention_decode, 16 bits, 25 points", lambda: decodes(few=True), 0.08, "5.8-7.5 %"),
    ("op_attention_prefill, 16 bits, 25 points", lambda: prefills(few=True), 0.12, "10-12 %"),
    ("op_gemm, all precisions, catalog", lambda: gemms(few=False, precisions=_ALL), None, "5.1-18 %"),
    ("op_attention_decode, all precisions, catalog", lambda: decodes(few=False, precisions=_KV), None, ""),
    ("op_attention_prefill, all precisions, catalog", lambda: prefills(few=False, precisions=_KV), None, ""),
    ("op_moe, catalog", experts, None, ""),
    ("op_collectives, all-reduce, catalog", sums, None, "4-20 % (mean)"),
]
_ALL = tuple(tables.QUANTIZATIONS.values())
_KV = ("16bit", "fp8")
