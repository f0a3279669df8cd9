"""LatencyModel on every device of the catalog: plausible, sure of itself as far as it may be, and never upside down."""

from __future__ import annotations

import pytest

from model_configs import LLAMA_8B
from powerband.cost.latency import LatencyModel
from powerband.cost.shapes import FORMATS
from powerband.spec.deployment import ENGINES, EngineName, Replica
from powerband.spec.hardware.catalog import load_catalog
from powerband.spec.model.counts import count_parameters
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.model.reader import read_model_spec

CATALOG = load_catalog()
DEVICES = sorted(CATALOG.profiles)
MEASURED = {"A100-80G", "L40S", "H100", "H200", "B200", "RTX-PRO-6000", "RTX-4090"}


def spec() -> ModelSpec:
    return read_model_spec(LLAMA_8B)


def model(device: str, engine: EngineName = "vllm", tensor_parallel: int = 1) -> LatencyModel:
    replica = Replica(device=device, tensor_parallel=tensor_parallel, max_model_len=8192)
    return LatencyModel(spec(), CATALOG.find(device), replica, engine)


@pytest.mark.parametrize("device", DEVICES)
def test_a_decode_reads_the_weights_and_a_prefill_multiplies_with_them(device: str) -> None:
    profile, costs = CATALOG.find(device), model(device)
    counts = count_parameters(spec())
    read_s = 2 * (counts.total - counts.embedding) / profile.bandwidth_bytes_per_s
    assert read_s < costs.step_s([(1, 100)], 1) < 2.0 * read_s
    flops = 2 * (counts.attention + counts.mlp) * 4096
    assert flops / profile.peak_flops_per_s["16bit"] * 0.95 < costs.step_s([(4096, 4096)], 1)
    assert costs.step_s([(4096, 4096)], 1) < 4 * flops / profile.peak_flops_per_s["16bit"]


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_not_measured_is_less_sure(device: str) -> None:
    bands = {name: model(name).band for name in MEASURED}
    assert 0.15 < model(device).band < 0.5
    if device not in MEASURED:
        assert model(device).band > min(bands.values())
        laws = CATALOG.find(device).gemm.get("*", {}).values()
        assert all(law.evidence.source.startswith("prior: as ") for law in laws)


def test_many_small_devices_gain_less_from_tensor_parallelism_than_those_with_fast_links() -> None:
    def gain(device: str) -> float:
        alone, four = (model(device, tensor_parallel=ranks).step_s([(2048, 2048)], 1) for ranks in (1, 4))
        return alone / four

    assert gain("L4") < 1.5 < 2 < gain("A100-80G")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_of_both_kinds_costs_at_most_its_halves(engine: EngineName) -> None:
    costs = model("H100", engine)
    prefill, decodes = [(1000, 1000)], [(1, 1000)] * 32
    both, apart = costs.step_s(prefill + decodes, 33), costs.step_s(prefill, 1) + costs.step_s(decodes, 32)
    assert max(costs.step_s(prefill, 1), costs.step_s(decodes, 32)) < both <= apart * 1.001


def test_every_quantization_has_a_format_that_some_device_computes_in() -> None:
    peaks = {dtype for profile in CATALOG.profiles.values() for dtype in profile.peak_flops_per_s}
    assert {kind.dtype for kind in FORMATS.values()} <= peaks
