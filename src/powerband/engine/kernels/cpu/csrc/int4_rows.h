// Activations for the int4 product: int8 with one scale per row and group of K, beside the sum of each group, which
// takes the weights' zero points out of the product afterwards.
#pragma once

#include <algorithm>

#include "common.h"

namespace powerband {

struct GroupedRows {
    const int8_t* values;  // [rows][stride], zero from K on
    const float* scales;   // [rows][groups]
    const int32_t* sums;   // [rows][groups]
    int64_t stride, groups;
};

// The largest |x|; infinity or NaN if there is one. Without its sign a bf16 sorts like an integer.
inline float largest_of_group(const bf16* x, int64_t count) {
    typedef int16_t i16x16 __attribute__((vector_size(32)));
    i16x16 most{};
    const int64_t whole = count - count % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        i16x16 bits;
        std::memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fff;
        most = bits > most ? bits : most;
    }
    int16_t largest = 0;
    for (int i = 0; i < kLanes; ++i) largest = std::max<int16_t>(largest, most[i]);
    for (int64_t i = whole; i < count; ++i) largest = std::max<int16_t>(largest, x[i].bits & 0x7fff);
    return to_float(bf16{static_cast<uint16_t>(largest)});
}

POWERBAND_INLINE int32_t sum_of_lanes(i32x16 v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_epi32(as<__m512i>(v));
#else
    int32_t total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
#endif
}

// One group of one row: x ~ scale * values, values in -127 … 127. NaN or infinity: zeros with the scale NaN.
inline void quantize_group(const bf16* x, int64_t count, int8_t* values, float* scale, int32_t* sum) {
    constexpr float kSmallest = 1e-30f;  // below it 127 / magnitude could overflow: taken for zero
    const float round = 12582912.0f;     // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
    const float magnitude = largest_of_group(x, count);
    const bool finite = magnitude <= std::numeric_limits<float>::max();
    *sum = 0;
    if (!finite || magnitude < kSmallest) {
        std::memset(values, 0, count);
        *scale = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        return;
    }
    const float inverse = 127.0f / magnitude;
    *scale = magnitude * (1.0f / 127.0f);
    i32x16 total{};
    const auto quantize = [&](f32x16 v) {
        const i32x16 numbers = as<i32x16>(v * inverse + round) - 0x4b400000;
        total += numbers;
        return convert<i8x16>(numbers);
    };
    const int64_t whole = count - count % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        const i8x16 q = quantize(load(x + i));
        std::memcpy(values + i, &q, sizeof q);
    }
    if (whole < count) {
        const i8x16 q = quantize(load(x + whole, count - whole));
        std::memcpy(values + whole, &q, count - whole);
    }
    *sum = sum_of_lanes(total);
}

}  // namespace powerband
