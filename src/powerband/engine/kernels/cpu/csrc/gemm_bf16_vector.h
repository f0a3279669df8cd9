// A few rows times a pair of bf16 panels in vector registers: bf16 dot products where the processor has them, else
// float32. With weights in memory this runs at the memory's speed, so it fetches ahead by itself.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace powerband {

constexpr int64_t kStep = 32;  // k of the panels is a multiple of this

inline int64_t padded_k(int64_t k) { return (k + kStep - 1) / kStep * kStep; }

// Two neighbouring panels [k / 2][16][2]; where the second is missing, `right` is `left` once more.
struct PanelPair {
    const bf16 *left, *right;
};

#ifdef POWERBAND_AVX512_BF16

constexpr int64_t kMaxVectorRows = 12;  // 12 rows by 2 panels of sums, 2 operands, 1 row's pair of values: 27 registers

// Panel rows (64 bytes each) from now that are fetched into the first-level cache.
constexpr int64_t kFetchAhead = 64;

// sums[R][32] = x [R, k] times both panels. One row alone has too few sums to keep the multiplier busy: it has twice as
// many.
template <int R>
void multiply_rows(const bf16* x, int64_t stride, int64_t k, PanelPair pair, const bf16* next, float* sums) {
    constexpr int kChains = R == 1 ? 2 : 1;
    __m512 left[R][kChains] = {}, right[R][kChains] = {};
    const auto run = [&](int64_t from, int64_t to, const bf16* fetch_left, const bf16* fetch_right) {
        for (int64_t pair_row = from; pair_row < to; pair_row += kChains) {
#pragma GCC unroll 2
            for (int chain = 0; chain < kChains; ++chain) {
                const int64_t at = pair_row + chain;
                prefetch(fetch_left + at * 32);
                prefetch(fetch_right + at * 32);
                const __m512bh l = (__m512bh)_mm512_loadu_si512(pair.left + at * 32);
                const __m512bh r = (__m512bh)_mm512_loadu_si512(pair.right + at * 32);
#pragma GCC unroll 12
                for (int row = 0; row < R; ++row) {
                    int32_t two;
                    std::memcpy(&two, x + row * stride + at * 2, sizeof two);
                    const __m512bh values = (__m512bh)_mm512_set1_epi32(two);
                    left[row][chain] = _mm512_dpbf16_ps(left[row][chain], values, l);
                    right[row][chain] = _mm512_dpbf16_ps(right[row][chain], values, r);
                }
            }
        }
    };
    const int64_t pair_rows = k / 2, ahead = std::min(kFetchAhead, pair_rows), turn = pair_rows - ahead;
    run(0, turn, pair.left + ahead * 32, pair.right + ahead * 32);
    // The last part of these panels fetches the first part of the next two.
    const PanelPair after = next ? PanelPair{next, next + k * 16} : pair;
    run(turn, pair_rows, after.left - turn * 32, after.right - turn * 32);
    for (int row = 0; row < R; ++row) {
        for (int chain = 1; chain < kChains; ++chain) {
            left[row][0] = _mm512_add_ps(left[row][0], left[row][chain]);
            right[row][0] = _mm512_add_ps(right[row][0], right[row][chain]);
        }
        _mm512_storeu_ps(sums + row * 32, left[row][0]);
        _mm512_storeu_ps(sums + row * 32 + 16, right[row][0]);
    }
}

inline void multiply_vectors(
    const bf16* x, int64_t stride, int64_t rows, int64_t k, PanelPair pair, const bf16* next, float* sums) {
    switch (rows) {
        case 1: return multiply_rows<1>(x, stride, k, pair, next, sums);
        case 2: return multiply_rows<2>(x, stride, k, pair, next, sums);
        case 3: return multiply_rows<3>(x, stride, k, pair, next, sums);
        case 4: return multiply_rows<4>(x, stride, k, pair, next, sums);
        case 5: return multiply_rows<5>(x, stride, k, pair, next, sums);
        case 6: return multiply_rows<6>(x, stride, k, pair, next, sums);
        case 7: return multiply_rows<7>(x, stride, k, pair, next, sums);
        case 8: return multiply_rows<8>(x, stride, k, pair, next, sums);
        case 9: return multiply_rows<9>(x, stride, k, pair, next, sums);
        case 10: return multiply_rows<10>(x, stride, k, pair, next, sums);
        case 11: return multiply_rows<11>(x, stride, k, pair, next, sums);
        default: return multiply_rows<12>(x, stride, k, pair, next, sums);
    }
}

#else

constexpr int64_t kMaxVectorRows = 4;

// As wide as the processor's registers: the compiler would pass wider vectors through memory.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float floats __attribute__((vector_size(kWidth * 4)));
typedef uint32_t words __attribute__((vector_size(kWidth * 4)));

// sums[R][16] += x [R, 2 * pairs] (float32, rows `stride` apart) times one panel.
template <int R>
void multiply_floats(const float* x, int64_t stride, int64_t pairs, const bf16* panel, float* sums) {
    constexpr int kVectors = 16 / kWidth;
    floats total[R][kVectors];
    std::memcpy(total, sums, sizeof total);
    for (int64_t pair = 0; pair < pairs; ++pair) {
        prefetch(panel + pair * 32 + 1024);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            words both;
            std::memcpy(&both, panel + pair * 32 + v * kWidth * 2, sizeof both);
            const words low = both << 16, high = both & 0xffff0000u;
            const floats even = as<floats>(low), odd = as<floats>(high);
#pragma GCC unroll 4
            for (int row = 0; row < R; ++row) {
                total[row][v] += even * x[row * stride + pair * 2];
                total[row][v] += odd * x[row * stride + pair * 2 + 1];
            }
        }
    }
    std::memcpy(sums, total, sizeof total);
}

inline void multiply_vectors(
    const bf16* x, int64_t stride, int64_t rows, int64_t k, PanelPair pair, const bf16*, float* sums) {
    constexpr int64_t kPart = 256;  // of k: four rows of it as float32 are 4 KB
    alignas(64) float wide[kMaxVectorRows * kPart], left[kMaxVectorRows * 16] = {}, right[kMaxVectorRows * 16] = {};
    for (int64_t from = 0; from < k; from += kPart) {
        const int64_t size = std::min(kPart, k - from);
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t i = 0; i < size; ++i) wide[row * kPart + i] = to_float(x[row * stride + from + i]);
        const auto both = [&](auto count) {
            multiply_floats<count>(wide, kPart, size / 2, pair.left + from * 16, left);
            if (pair.right != pair.left) multiply_floats<count>(wide, kPart, size / 2, pair.right + from * 16, right);
        };
        switch (rows) {
            case 1: both(std::integral_constant<int, 1>{}); break;
            case 2: both(std::integral_constant<int, 2>{}); break;
            case 3: both(std::integral_constant<int, 3>{}); break;
            default: both(std::integral_constant<int, 4>{}); break;
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        std::memcpy(sums + row * 32, left + row * 16, 16 * sizeof(float));
        std::memcpy(sums + row * 32 + 16, right + row * 16, 16 * sizeof(float));
    }
}

#endif

}  // namespace powerband
