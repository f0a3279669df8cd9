"""Writes the laws of the catalog's devices: `python -m benchmarks.accuracy.fit_catalog`.

Measured devices get coefficients fitted to the tables, with the error of the fit. Devices that nobody measured get
those of their nearest relative, as what they are: a prior, with a wider error. Facts and prices stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from benchmarks.accuracy import fits, tables

from powerband.calibration.curve_fit import FitErrors
from powerband.spec.hardware.profile import AttentionModel, DeviceProfile, ElementwiseModel, Evidence, LinkModel
from powerband.spec.yaml_codec import as_record

CATALOG = Path(__file__).resolve().parents[2] / "src" / "powerband" / "spec" / "devices"
MARK = "# Laws: written by benchmarks/accuracy/fit_catalog.py; what they mean: cost/operator_models.py.\n"
_AIC = "AIConfigurator tables"
# Between two kernels of a CUDA graph, 1 to 1.5 us; tables of whole layers have kernels only.
_GAP_S = 1.2e-6
# Elementwise kernels of small tensors live in the L2 cache; of the sizes that matter, share of the memory's bandwidth.
_ELEMENTWISE_SHARE = 0.85
# vLLM's kernel for experts runs there without tuned settings: in fp8 slower than in 16 bits. Other engines' does not.
_UNTUNED = {("h100_sxm", "fp8"), ("h200_sxm", "fp8"), ("a100_sxm", "none")}
# AIConfigurator's L40S could not reach each other beyond pairs: 2 GB/s on eight, as on a cloud's virtual machines.
# Where they can, over PCIe 4, half of what the RTX PRO 6000 do over PCIe 5; NVIDIA's own servers, on which TensorRT-LLM
# is measured, are of that kind.
_PCIE_4 = 0.5


class Relative(NamedTuple):
    """Whose laws a device gets; factors on shares of compute and bandwidth, and why."""

    of: str
    compute: float
    memory: float
    why: str
    links_of: str | None = None
    link_share: float = 1.0


RELATIVES = {
    "A100-40G": Relative("A100-80G", 1.0, 1.0, "the same chip"),
    "A100-40G-PCIe": Relative("A100-80G", 0.9, 1.0, "the same chip at 250 W", "RTX-PRO-6000", _PCIE_4),
    "A100-80G-PCIe": Relative("A100-80G", 0.92, 1.0, "the same chip at 300 W", "RTX-PRO-6000", _PCIE_4),
    "H100-PCIe": Relative("H100", 0.85, 0.95, "the same architecture at 350 W", "RTX-PRO-6000"),
    "L4": Relative("L40S", 0.8, 1.0, "the same architecture at 72 W", "L40S"),
    # Ampere's GA102: 110 of 149.7 TFLOPS and 0.80 of the bandwidth on an A40 (Vidur's profiles).
    "A10": Relative("A100-80G", 0.72, 1.05, "GA102 as on an A40, at 150 W", "L40S"),
    "A10G": Relative("A100-80G", 1.05, 1.05, "GA102 as on an A40", "L40S"),
    "RTX-3090": Relative("RTX-4090", 0.92, 0.9, "GA102, 65 of 71 TFLOPS in LLMServingSim's profiles", "L40S"),
}


def main() -> None:
    measured = {name: _measured(gpu, name) for gpu, name in _gpus().items()}
    measured["RTX-4090"] = _rtx_4090(measured)
    peers = _scaled(measured["RTX-PRO-6000"]["all_reduce"]["trtllm"], _PCIE_4)
    measured["L40S"]["all_reduce"]["trtllm"] = _relabelled(peers, "half of RTX PRO 6000's: PCIe 4 with peers", 1, 1)
    weights_only = {name: measured["H200"]["gemm"]["*"][name] for name in ("int8", "int4")}
    measured["H100"]["gemm"]["*"] |= _relabelled(weights_only, "as H200: the same chip; not measured", 1, 1)
    for name, sections in measured.items():
        _write(name, sections)
    for name, relative in RELATIVES.items():
        _write(name, _derived(relative, measured))


def _gpus() -> dict[str, str]:
    return {gpu: tables.DEVICES[gpu] for gpu, _, _ in tables.gemm_tables()}


def _measured(gpu: str, name: str) -> dict[str, Any]:
    profile = tables.device(gpu)
    sections: dict[str, Any] = {"gemm": {}, "experts": {}, "attention": {}, "elementwise": {}, "all_reduce": {}}
    for (where, engine, quantization), points in tables.gemm_tables().items():
        if where != gpu:
            continue
        fitted = fits.gemm(profile, quantization, points)
        law = replace(fitted.model, evidence=_evidence(f"{_AIC}, {engine}", fitted.errors))
        known = sections["gemm"].setdefault("sglang" if engine.startswith("sglang") else "*", {})
        known[quantization] = law
        if quantization == "fp8":
            known["fp8_static"] = replace(law, quantize_s=0.0)
    for (where, quantization), routed in tables.expert_tables().items():
        if where == gpu:
            found = fits.experts(profile, quantization, routed)
            engine = "vllm" if (gpu, quantization) in _UNTUNED else "*"
            law = replace(found.model, evidence=_evidence(f"{_AIC}, vllm", found.errors))
            section = sections["experts"].setdefault(engine, {})
            section[quantization] = law
            if quantization == "fp8":
                section["fp8_static"] = law
    sections["attention"] = _attention(gpu, profile)
    for (where, engine, ranks), sums in tables.all_reduce_tables().items():
        if where == gpu:
            summed = fits.all_reduce(ranks, sums)
            source = f"{_AIC}, {'vllm' if engine == '*' else engine}, in CUDA graphs"
            law = replace(summed.model, evidence=_evidence(source, summed.errors))
            sections["all_reduce"].setdefault(engine, {})[ranks] = law
    if gpu in tables.transfer_tables():
        moved = fits.transfer(tables.transfer_tables()[gpu])
        sections["transfer"] = replace(moved.model, evidence=_evidence("Vidur's profiles, send_recv", moved.errors))
    sections["elementwise"] = {"*": _elementwise("RTXPRO6000", own=name == "RTX-PRO-6000")}
    return sections


def _attention(gpu: str, profile: DeviceProfile) -> dict[str, Any]:
    found: dict[str, Any] = {"*": {}}
    for (where, precision), points in tables.attention_tables("prefill").items():
        if where != gpu:
            continue
        decode = fits.decode(profile, precision, tables.attention_tables("decode")[gpu, precision])
        prefill = fits.prefill(profile, precision, points, decode.model)
        found["*"][precision] = replace(
            prefill.model,
            prefill_evidence=_evidence(f"{_AIC}, vllm", prefill.errors),
            decode_evidence=_evidence(f"{_AIC}, vllm", decode.errors),
        )
    if profile.architecture in ("ada", "ampere") or gpu == "rtx_pro_6000_server":
        # FlashAttention 2 does not split contexts in a call that has a chunk in it.
        near = tables.device("RTXPRO6000")
        law = found["*"]["16bit"] if gpu == "rtx_pro_6000_server" else _mixed_law()
        factor = fits.mixed_factor(near, law, tables.mixed_tables()["RTXPRO6000"]).model.mixed_factor
        found["vllm"] = {"16bit": replace(found["*"]["16bit"], mixed_factor=factor)}
    return found


def _mixed_law() -> AttentionModel:
    law: AttentionModel = _attention("rtx_pro_6000_server", tables.device("rtx_pro_6000_server"))["*"]["16bit"]
    return law


def _elementwise(gpu: str, *, own: bool) -> ElementwiseModel:
    fitted = fits.elementwise(tables.device(gpu), tables.elementwise_tables()[gpu])
    errors = Evidence(
        source=f"LLMServingSim v1's profiles of {tables.DEVICES[gpu]}, and 1.2 us between kernels",
        error=round(max(fitted.errors.p90, 0.3 if own else 0.4), 3),
    )
    return replace(
        fitted.model, kernel_s=fitted.model.kernel_s + _GAP_S, memory_share=_ELEMENTWISE_SHARE, evidence=errors
    )


def _rtx_4090(measured: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """No tables of AIConfigurator, but vLLM's layers and attention."""
    profile = tables.device("RTX4090")
    product = fits.gemm(profile, "none", tables.layer_gemms()["RTX4090"])
    source = "LLMServingSim v1's profiles"
    gemm = replace(product.model, evidence=_evidence(source, product.errors))
    fitted = fits.mixed(profile, tables.mixed_tables()["RTX4090"])
    evidence = _evidence(source, fitted.errors)
    law = replace(fitted.model, prefill_evidence=evidence, decode_evidence=evidence)
    return {
        "gemm": {"*": {"none": gemm}},
        "attention": {"*": {"16bit": replace(law, mixed_factor=1.0)}, "vllm": {"16bit": law}},
        "elementwise": {"*": _elementwise("RTX4090", own=True)},
        "all_reduce": _relabelled(measured["L40S"]["all_reduce"], "as on an L40S (PCIe 4, no peer access)", 1, 1),
    }


def _derived(relative: Relative, measured: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    sections = dict(measured[relative.of])
    links = measured[relative.links_of]["all_reduce"] if relative.links_of else sections.pop("all_reduce")
    if relative.links_of:
        sections.pop("all_reduce", None)
        sections.pop("transfer", None)
    why = f"as {relative.of}: {relative.why}; not measured"
    found: dict[str, Any] = _relabelled(sections, why, relative.compute, relative.memory)
    link = f"as {relative.links_of or relative.of}; not measured"
    found["all_reduce"] = _relabelled(_scaled(links, relative.link_share), link, 1, 1)
    return found


def _scaled(links: Any, share: float) -> Any:
    """Links with a share of their bandwidth."""
    if isinstance(links, Mapping):
        return {key: _scaled(item, share) for key, item in links.items()}
    return replace(links, bytes_per_s=links.bytes_per_s * share, direct_bytes_per_s=links.direct_bytes_per_s * share)


def _relabelled(value: Any, why: str, compute: float, memory: float) -> Any:
    """The same laws as a prior: another source, errors a tenth wider and a fifth at least, shares times a factor."""
    if isinstance(value, Mapping):
        return {key: _relabelled(item, why, compute, memory) for key, item in value.items()}
    changes: dict[str, Any] = {}
    for name in ("evidence", "prefill_evidence", "decode_evidence"):
        if hasattr(value, name):
            error = round(max(getattr(value, name).error + 0.1, 0.2), 3)
            changes[name] = Evidence(source=f"prior: {why}", error=error)
    if not isinstance(value, LinkModel):
        if hasattr(value, "compute_share"):
            changes["compute_share"] = min(value.compute_share * compute, 1.0)
        if not isinstance(value, ElementwiseModel):
            changes["memory_share"] = min(value.memory_share * memory, 1.0)
        if hasattr(value, "prefill_memory_share"):
            changes["prefill_memory_share"] = min(value.prefill_memory_share * memory, 1.0)
    return replace(value, **changes)


def _evidence(source: str, errors: FitErrors) -> Evidence:
    return Evidence(source=f"{source}, {errors.n} points, median {errors.median:.1%}", error=round(errors.p90, 3))


def _write(name: str, sections: Mapping[str, Any]) -> None:
    path = next(p for p in CATALOG.glob("*.yaml") if yaml.safe_load(p.read_text())["name"] == name)
    facts = path.read_text().split(MARK)[0]
    body = yaml.safe_dump(_rounded(as_record(dict(sections))), sort_keys=False, default_flow_style=False, width=120)
    path.write_text(facts + MARK + body)
    DeviceProfile.from_dict(yaml.safe_load(path.read_text()), path.name)
    print(f"{path.name}: {', '.join(sections)}")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
