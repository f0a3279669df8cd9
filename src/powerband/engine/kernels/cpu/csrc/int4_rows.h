// Activations for the int4 product: int8 with one scale per row and group of K, beside the sum of each group, which
// takes the weights' zero points out of the product afterwards.
#pragma once

#include "common.h"

namespace powerband {

struct GroupedRows {
    const int8_t* values;  // [rows][stride], zero from K on
    const float* scales;   // [rows][groups]
    const int32_t* sums;   // [rows][groups]
    int64_t stride, groups;
};

// One group of one row: x ~ scale * values, values in -127 … 127. A NaN or an infinity makes the scale one, too.
inline void quantize_group(const bf16* x, int64_t count, int8_t* values, float* scale, int32_t* sum) {
    typedef int8_t i8x16 __attribute__((vector_size(16)));
    constexpr float kSmallest = 1e-30f;  // below it 127 / amplitude could overflow: taken for zero
    const float round = 12582912.0f;     // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
    const int64_t whole = count - count % kLanes;
    // As integers, the bits of magnitudes have the order of the magnitudes, with NaN above all.
    i32x16 peak{};
    const auto look = [&](f32x16 v) {
        i32x16 magnitude = as<i32x16>(v) & 0x7fffffff;
        peak = magnitude > peak ? magnitude : peak;
    };
    for (int64_t i = 0; i < whole; i += kLanes) look(load(x + i));
    if (whole < count) look(load(x + whole, count - whole));
    int32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits = peak[i] > bits ? peak[i] : bits;
    float amplitude;
    std::memcpy(&amplitude, &bits, sizeof amplitude);
    const float inverse = amplitude < kSmallest ? 0.0f : 127.0f / amplitude;
    i32x16 total{};
    const auto quantize = [&](f32x16 v) {
        i32x16 whole_numbers = as<i32x16>(v * inverse + round) - 0x4b400000;
        total += whole_numbers;
        return __builtin_convertvector(whole_numbers, i8x16);
    };
    for (int64_t i = 0; i < whole; i += kLanes) {
        const i8x16 q = quantize(load(x + i));
        std::memcpy(values + i, &q, sizeof q);
    }
    if (whole < count) {
        const i8x16 q = quantize(load(x + whole, count - whole));
        std::memcpy(values + whole, &q, count - whole);
    }
    *scale = amplitude / 127.0f;
    *sum = 0;
    for (int i = 0; i < kLanes; ++i) *sum += total[i];
}

}  // namespace powerband
