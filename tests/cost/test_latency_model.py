"""LatencyModel: what steps cost, and what may never happen when a device or a step changes."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from model_configs import model_config
from powerband.cost.latency import LatencyModel
from powerband.errors import UsageError
from powerband.spec.deployment import Replica
from powerband.spec.hardware.profile import DeviceLink, DeviceProfile
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.model.reader import read_model_spec

LLAMA_8B = model_config(max_position_embeddings=131072, rope_theta=500000.0)
MIXTRAL = model_config(
    model_type="mixtral",
    num_local_experts=8,
    num_experts_per_tok=2,
    vocab=32000,
    max_position_embeddings=32768,
    rope_theta=1e6,
)
HOPPER = DeviceProfile(
    name="some Hopper",
    kind="cuda",
    architecture="hopper",
    memory_bytes=80 * 10**9,
    bandwidth_bytes_per_s=3.35e12,
    peak_flops_per_s={"16bit": 989e12, "fp8": 1979e12},
    multiprocessors=132,
    link=DeviceLink(name="nvlink", bytes_per_s=450e9),
    host_link=DeviceLink(name="pcie5", bytes_per_s=63e9),
)
STEPS = [
    [(1, 1000)],
    [(1, 1000)] * 64,
    [(2048, 2048)],
    [(512, 4096), (1, 700), (1, 9)],
    [(100, 100)] * 20,
]


def llama() -> ModelSpec:
    return read_model_spec(LLAMA_8B)


def model(profile: DeviceProfile = HOPPER, spec: ModelSpec | None = None, **layout: Any) -> LatencyModel:
    return LatencyModel(spec or llama(), profile, Replica(device="x", max_model_len=8192, **layout), "vllm")


def test_grammars_cost_the_host_some_microseconds_for_each_request_and_our_engine_its_overlap() -> None:
    replica = Replica(device="x", max_model_len=8192)
    cpu = replace(HOPPER, kind="cpu")
    for profile, extra_s in ((HOPPER, 4e-6), (cpu, 12e-6)):
        for engine, overlaps in (("powerband", False), ("sglang", True), ("vllm", False)):
            free, bound = (
                LatencyModel(llama(), profile, replica, engine, constrained=constrained)
                for constrained in (False, True)
            )
            assert bound.host.per_request_s - free.host.per_request_s == pytest.approx(extra_s)
            assert bound.host.overlapped is overlaps
            assert bound.step_s(STEPS[1], 64) == free.step_s(STEPS[1], 64)


def test_a_decode_alone_takes_as_long_as_reading_the_weights() -> None:
    read_s = 7.5e9 * 2 / 3.35e12
    assert 1.05 * read_s < model().step_s([(1, 100)], 1) < 1.6 * read_s


def test_a_long_prefill_takes_as_long_as_its_multiplications() -> None:
    flops = 2 * 7.0e9 * 8192
    assert 1.1 < model().step_s([(8192, 8192)], 1) / (flops / 989e12) < 1.8


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor_parallel": 4},
        {"pipeline_parallel": 2, "tensor_parallel": 2},
        {"offload_share": 0.5},
        {"quantization": "fp8", "kv_precision": "fp8"},
    ],
)
@pytest.mark.parametrize("spec", [LLAMA_8B, MIXTRAL], ids=["dense", "experts"])
def test_operators_and_what_binds_sum_to_the_step(layout: dict[str, Any], spec: dict[str, Any]) -> None:
    costs = model(spec=read_model_spec(spec), **layout)
    for works in STEPS:
        seconds = costs.step_s(works, len(works))
        assert sum(costs.parts(works, len(works)).values()) == pytest.approx(seconds, rel=1e-9)
        assert sum(costs.bounds(works, len(works)).values()) == pytest.approx(seconds, rel=1e-9)
        assert min(costs.parts(works, len(works)).values()) >= 0


@pytest.mark.parametrize("works", STEPS, ids=str)
def test_a_better_device_is_never_slower(works: list[tuple[int, int]]) -> None:
    seconds = model().step_s(works, len(works))
    assert model(replace(HOPPER, bandwidth_bytes_per_s=4.8e12)).step_s(works, len(works)) <= seconds
    faster = {name: 2 * rate for name, rate in HOPPER.peak_flops_per_s.items()}
    assert model(replace(HOPPER, peak_flops_per_s=faster)).step_s(works, len(works)) <= seconds
    assert model(replace(HOPPER, memory_bytes=10**12)).step_s(works, len(works)) == seconds
    one, two = (
        model(replace(HOPPER, link=DeviceLink(name="nvlink", bytes_per_s=rate)), tensor_parallel=2).step_s(works, 1)
        for rate in (300e9, 900e9)
    )
    assert two <= one


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel": 8}, {"quantization": "fp8"}], ids=str)
def test_more_work_is_never_faster(layout: dict[str, Any]) -> None:
    costs = model(**layout)
    sizes = [*range(1, 40), *range(40, 1200, 7), 2048, 4096, 8192]
    for step in (
        [costs.step_s([(1, 900)] * n, n) for n in sizes],
        [costs.step_s([(n, n)], 1) for n in sizes if n > 1],
        [costs.step_s([(n, 30000), (1, 800)], 1) for n in sizes if n > 1],
        [costs.step_s([(64, 64 + n), (1, n)], 2) for n in sizes],
        [costs.step_s([(128, 8000), *[(120, 120)] * n], 1) for n in range(30)],
    ):
        assert all(later >= sooner * (1 - 1e-12) for sooner, later in pairwise(step))


def test_a_window_bounds_what_a_long_context_costs() -> None:
    spec = llama()
    windowed = replace(spec, layers=tuple(replace(layer, window=1024) for layer in spec.layers))
    far, near = ([(1, context)] * 32 for context in (8000, 1024))
    assert model(spec=windowed).step_s(far, 32) == model(spec=windowed).step_s(near, 32)
    assert model().step_s(far, 32) > 1.3 * model().step_s(near, 32)


def test_offloaded_weights_bind_until_a_step_has_enough_tokens() -> None:
    costs, resident = model(offload_share=0.5), model()
    decode, prefill = [(1, 500)], [(8192, 8192)]
    assert costs.bounds(decode, 1)["link"] > 0.5 * costs.step_s(decode, 1)
    assert costs.step_s(decode, 1) > 7e9 / 63e9
    assert costs.step_s(prefill, 1) == resident.step_s(prefill, 1)


def test_few_tokens_touch_few_experts() -> None:
    spec = read_model_spec(MIXTRAL)
    one, many = (model(spec=spec).parts([(1, 100)] * n, n)["experts"] for n in (1, 64))
    assert 2.5 < many / one < 4.5


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"quantization": "nvfp4"}, "some Hopper does not compute in fp4. It has 16bit, fp8."),
        ({"tensor_parallel": 3}, "32 heads cannot be divided among 3 ranks"),
    ],
)
def test_what_cannot_be_computed_is_said(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model(**layout)


def test_a_model_that_travels_to_another_process_says_the_same() -> None:
    costs = model(tensor_parallel=2)
    assert copy.deepcopy(costs).step_s(STEPS[3], 3) == costs.step_s(STEPS[3], 3)


def test_a_cpu_needs_no_links() -> None:
    cpu = DeviceProfile(
        name="some CPU",
        kind="cpu",
        architecture="cpu",
        memory_bytes=16 * 10**9,
        bandwidth_bytes_per_s=40e9,
        peak_flops_per_s={"float32": 200e9},
        multiprocessors=2,
    )
    costs = LatencyModel(llama(), cpu, Replica(device="cpu", max_model_len=2048), "powerband")
    assert costs.step_s([(1, 100)], 1) > 15e9 / 40e9
    assert 0.1 < costs.band < 0.5
    with pytest.raises(UsageError, match="nowhere to offload"):
        LatencyModel(llama(), cpu, Replica(device="cpu", max_model_len=2048, offload_share=0.1), "powerband")
