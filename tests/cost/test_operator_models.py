"""Laws against values worked out by hand."""

from __future__ import annotations

from math import exp, inf

import pytest

from powerband.cost import operator_models as laws
from powerband.cost.operator_models import AttentionCall, DeviceSpeed, PrefillChunks
from powerband.spec.hardware.profile import AttentionModel, ElementwiseModel, Evidence, GemmModel, LinkModel
from powerband.spec.model.counts import visible_pairs

NONE = Evidence(source="", error=0.1)
SPEED = DeviceSpeed(1e12, 1e9, 10)
FAST_MEMORY = DeviceSpeed(1e12, 1e15, 10)


def gemm_model(**changes: float) -> GemmModel:
    values = {"compute_share": 0.5, "memory_share": 0.8, "overhead_s": 1e-6, "sharpness": inf, **changes}
    return GemmModel(evidence=NONE, **values)


def test_a_product_is_bound_by_its_weights_or_by_its_multiplications() -> None:
    one = laws.gemm(gemm_model(), SPEED, 1, 100, 200, weight_bytes=2, input_bytes=2)
    assert not one.computing
    assert one.total == pytest.approx(1e-6 + (2 * 100 * 200 + 2 * 200 + 2 * 100) / 0.8e9)
    many = laws.gemm(gemm_model(), FAST_MEMORY, 6400, 1000, 2000, weight_bytes=2, input_bytes=2)
    assert many.computing
    assert many.total == pytest.approx(1e-6 + 2 * 6400 * 1000 * 2000 / 0.5e12)


def test_rows_are_padded_as_tensor_cores_take_them() -> None:
    def seconds(m: int) -> float:
        return laws.gemm(
            gemm_model(memory_share=1.0), DeviceSpeed(1e9, 1e15, 10), m, 64, 64, weight_bytes=2, input_bytes=2
        )[0]

    assert seconds(1) == seconds(16) < seconds(17) == seconds(32) < seconds(64) < seconds(65) == seconds(128)


def test_few_tiles_leave_a_device_idle() -> None:
    full = laws.gemm(gemm_model(overhead_s=0), SPEED, 128, 128, 10_000, weight_bytes=0, input_bytes=0).total
    part = laws.gemm(gemm_model(overhead_s=0, fill=0.5), SPEED, 128, 128, 10_000, weight_bytes=0, input_bytes=0).total
    assert part == pytest.approx(full / (1 - exp(-1 / (0.5 * 10))))


def test_scales_found_at_run_time_cost_a_pass_over_the_input() -> None:
    law = gemm_model(quantize_s=2e-6)
    static, dynamic = (
        laws.gemm(law, SPEED, 64, 100, 200, weight_bytes=1, input_bytes=1, dynamic=dynamic).total
        for dynamic in (False, True)
    )
    assert dynamic - static == pytest.approx(2e-6 + 64 * 200 * 3 / 0.8e9)


def attention_model(**changes: float) -> AttentionModel:
    values = {"compute_share": 0.5, "memory_share": 0.8, "prefill_overhead_s": 1e-6, "decode_overhead_s": 2e-6}
    return AttentionModel(prefill_evidence=NONE, decode_evidence=NONE, **{**values, **changes})


def test_a_prefill_costs_its_visible_pairs_and_half_a_tile_for_each_token() -> None:
    chunks = PrefillChunks()
    chunks.add(attention_model(), 10, 100, 300, AttentionCall(4, 64, 512.0))
    pairs = sum(range(201, 301)) + 64 * 100
    assert chunks.seconds(attention_model(), FAST_MEMORY).total == pytest.approx(1e-6 + 4 * 4 * 64 * pairs / 0.5e12)


def test_decodes_cost_the_keys_and_values_they_read() -> None:
    heads = AttentionCall(4, 64, 512.0)
    moved = 1000 * 512 + 8 * 4 * 4 * 64
    assert laws.decode(attention_model(), SPEED, 1000, 8, heads) == pytest.approx(2e-6 + moved / 0.8e9)


@pytest.mark.parametrize("window", [None, 1, 16, 100, 1000])
def test_every_position_sees_itself_and_what_lies_before(window: int | None) -> None:
    for new, context in ((1, 1), (10, 10), (10, 200), (150, 200), (200, 200)):
        seen = [min(position + 1, window or context) for position in range(context - new, context)]
        assert visible_pairs(new, context, window) == sum(seen)


def test_experts_are_touched_as_by_chance() -> None:
    assert laws.touched_experts(1, 2, 8) == 2
    assert laws.touched_experts(2, 2, 8) == pytest.approx(8 * (1 - 0.75**2))
    assert laws.touched_experts(10_000, 2, 8) == pytest.approx(8)


def test_links_and_elementwise() -> None:
    law = LinkModel(latency_s=5e-6, bytes_per_s=1e9, evidence=NONE)
    assert laws.all_reduce(law, 4, 1000) == pytest.approx(5e-6 + 1.5 * 1000 / 1e9)
    norms = ElementwiseModel(kernel_s=2e-6, memory_share=0.5, evidence=NONE)
    assert laws.elementwise(norms, SPEED, 4, 1000) == pytest.approx(8e-6 + 1000 / 0.5e9)
