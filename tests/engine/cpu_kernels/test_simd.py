"""simd.h against numpy and torch: a small library of its own, compiled with the flags of the tier."""

from __future__ import annotations

import ctypes
import subprocess

import numpy as np
import pytest
import torch

from powerband.engine.kernels.cpu import library
from powerband.spec.hardware.device import detect_cpu

SOURCE = r"""
#include "simd.h"
using namespace powerband;
template <class F> void map(const float* x, float* y, int64_t n, F f) {
    for (int64_t i = 0; i < n; i += kLanes) store(y + i, f(load(x + i)));
}
extern "C" {
void exp_of(const float* x, float* y, int64_t n) { map(x, y, n, [](f32x16 v) { return exp(v); }); }
void tanh_of(const float* x, float* y, int64_t n) { map(x, y, n, [](f32x16 v) { return tanh(v); }); }
void abs_of(const float* x, float* y, int64_t n) { map(x, y, n, [](f32x16 v) { return abs(v); }); }
void round_of(const float* x, float* y, int64_t n) { map(x, y, n, [](f32x16 v) { return widen(narrow(v)); }); }
void clamp_of(const float* x, float* y, int64_t n) {
    map(x, y, n, [](f32x16 v) { return min(broadcast(2.0f), max(broadcast(-1.0f), v)); });
}
void positive_of(const float* x, float* y, int64_t n) {
    map(x, y, n, [](f32x16 v) { return select(as<i32x16>(v > broadcast(0.0f)), v, broadcast(0.5f)); });
}
float sum_of(const float* x) { return sum(load(x)); }
float largest_of(const float* x) { return largest(load(x)); }
float dot_of(const uint16_t* a, const uint16_t* b) {
    u16x32 u, v;
    std::memcpy(&u, a, 64);
    std::memcpy(&v, b, 64);
    return sum(dot(f32x16{}, u, v));
}
void copy(const float* x, float* y, int64_t count) { store(y, load(x, count), count); }
void copy_bf16(const uint16_t* x, uint16_t* y, int64_t count) {
    store(reinterpret_cast<bf16*>(y), load(reinterpret_cast<const bf16*>(x), count), count);
}
void numbers(float* y) {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    store(y, convert<f32x16>(lanes - 8));
}
void bytes(int8_t* y) {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const i8x16 narrow = convert<i8x16>(lanes * 16 - 120);
    std::memcpy(y, &narrow, 16);
}
}
"""


@pytest.fixture(scope="module")
def simd(kernels: library.Status, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("simd")
    (folder / "simd.cpp").write_text(SOURCE)
    flags = library._flags(kernels.tier or "plain", detect_cpu().features)
    command = [library.find_compiler() or "c++", *flags, "-fvisibility=default", "-shared", "-I", str(library.SOURCES)]
    subprocess.run([*command, str(folder / "simd.cpp"), "-o", str(folder / "simd.so")], check=True)
    loaded = ctypes.CDLL(str(folder / "simd.so"))
    for name in ("sum_of", "largest_of", "dot_of"):
        getattr(loaded, name).restype = ctypes.c_float
    return loaded


def address(values: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.ctypes.data)


def apply(simd: ctypes.CDLL, name: str, values: np.ndarray) -> np.ndarray:
    x = np.zeros(-(-len(values) // 16) * 16, dtype=np.float32)
    x[: len(values)] = values
    y = np.empty_like(x)
    getattr(simd, name)(address(x), address(y), ctypes.c_int64(len(x)))
    return y[: len(values)]


def test_exp_is_good_to_two_units_in_the_last_place(simd: ctypes.CDLL) -> None:
    x = np.concatenate([np.linspace(-87.3, 88.72, 1_000_003), np.linspace(-1e-3, 1e-3, 999)]).astype(np.float32)
    x = x[x >= np.float32(-87.3)]
    exact = np.exp(x.astype(np.float64))
    units = np.abs(apply(simd, "exp_of", x) - exact) / np.spacing(exact.astype(np.float32))
    assert units.max() < 2
    assert apply(simd, "exp_of", np.zeros(1, np.float32))[0] == 1


def test_exp_at_the_ends(simd: ctypes.CDLL) -> None:
    x = np.array([-np.inf, -1e30, -1000, -87.31, 88.72284, 1000, 1e30, np.inf, np.nan], dtype=np.float32)
    expected = [0, 0, 0, 0, np.inf, np.inf, np.inf, np.inf, np.nan]
    np.testing.assert_array_equal(apply(simd, "exp_of", x), np.array(expected, np.float32))


def test_tanh(simd: ctypes.CDLL) -> None:
    x = np.concatenate([np.linspace(-20, 20, 400_001), [0, -np.inf, np.inf]]).astype(np.float32)
    assert np.abs(apply(simd, "tanh_of", x) - np.tanh(x.astype(np.float64))).max() < 4e-7
    assert np.isnan(apply(simd, "tanh_of", np.array([np.nan]))[0])


def test_rounding_is_torchs(simd: ctypes.CDLL) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    halfway = (np.arange(2**16, dtype=np.uint32) << 16) + 0x8000
    x = np.concatenate([bits, halfway, halfway + 1, halfway - 1]).view(np.float32)
    x = x[(np.abs(x) >= 2**-126) | (x == 0) | np.isnan(x)]  # the processor's own instruction flushes smaller ones
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    np.testing.assert_array_equal(apply(simd, "round_of", x), expected)


def test_lane_by_lane(simd: ctypes.CDLL) -> None:
    x = np.random.default_rng(1).normal(size=1000).astype(np.float32) * 3
    np.testing.assert_array_equal(apply(simd, "abs_of", x), np.abs(x))
    np.testing.assert_array_equal(apply(simd, "clamp_of", x), x.clip(-1, 2))
    np.testing.assert_array_equal(apply(simd, "positive_of", x), np.where(x > 0, x, np.float32(0.5)))
    assert np.isnan(apply(simd, "clamp_of", np.array([np.nan]))[0])


def test_across_lanes(simd: ctypes.CDLL) -> None:
    generator = np.random.default_rng(2)
    for _ in range(50):
        x = generator.normal(size=16).astype(np.float32)
        assert simd.sum_of(address(x)) == pytest.approx(x.sum(dtype=np.float64), abs=2e-6)
        assert simd.largest_of(address(x)) == x.max()
    y = np.empty(16, np.float32)
    simd.numbers(address(y))
    np.testing.assert_array_equal(y, np.arange(16) - 8)
    z = np.empty(16, np.int8)
    simd.bytes(address(z))
    np.testing.assert_array_equal(z, np.arange(16) * 16 - 120)


def test_dot(simd: ctypes.CDLL) -> None:
    a, b = torch.randn(32).bfloat16(), torch.randn(32).bfloat16()
    found = simd.dot_of(*(ctypes.c_void_p(t.data_ptr()) for t in (a, b)))
    assert found == pytest.approx(float(a.double() @ b.double()), abs=1e-5)


@pytest.mark.parametrize("count", range(17))
def test_parts_of_vectors_touch_nothing_else(simd: ctypes.CDLL, count: int) -> None:
    x, y = np.arange(1, 17, dtype=np.float32), np.full(16, -7, np.float32)
    simd.copy(address(x), address(y), ctypes.c_int64(count))
    np.testing.assert_array_equal(y, np.where(np.arange(16) < count, x, -7))
    x16, y16 = torch.from_numpy(x).bfloat16(), torch.full((16,), -7.0).bfloat16()
    simd.copy_bf16(ctypes.c_void_p(x16.data_ptr()), ctypes.c_void_p(y16.data_ptr()), ctypes.c_int64(count))
    assert torch.equal(y16.float(), torch.from_numpy(y))
