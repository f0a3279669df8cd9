// Activations to int8, row by row: scale = max |row| / 127, values to the nearest (ties to even).
// A row that holds NaN or infinity becomes zeros with the scale NaN, so that all it leads to is NaN, and nothing else.
#pragma once

#include <algorithm>

#include "common.h"
#include "scratch.h"

namespace powerband {

typedef int16_t i16x16 __attribute__((vector_size(32)));

constexpr float kInt8Max = 127.0f;
constexpr float kSmallestMagnitude = 1e-30f;  // a row below it counts as zero: 127 / magnitude must stay finite
constexpr int64_t kQuantizePadding = 64;      // rows are padded with zeros to a multiple of it: a row of an AMX tile

// To the nearest whole number, ties to even; |v| stays below 2^22.
inline i32x16 round_to_int(f32x16 v) {
#if defined(__AVX512F__)
    __m512i r = _mm512_cvtps_epi32(as<__m512>(v));
    return as<i32x16>(r);
#elif defined(__AVX2__)
    return {as<i32x16::Half>(_mm256_cvtps_epi32(v.low)), as<i32x16::Half>(_mm256_cvtps_epi32(v.high))};
#else
    i32x16 rounded;
    for (int i = 0; i < kLanes; ++i) rounded[i] = static_cast<int32_t>(std::nearbyint(v[i]));
    return rounded;
#endif
}

inline void store(int8_t* p, i32x16 v) {
#ifdef __AVX512F__
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(as<__m512i>(v)));
#else
    i8x16 narrow = convert<i8x16>(v);
    std::memcpy(p, &narrow, sizeof narrow);
#endif
}

// The largest |x| of a row; infinity or NaN if the row holds one. Without its sign a bf16 sorts like an integer.
inline float largest_magnitude(const bf16* x, int64_t size) {
    i16x16 most{};
    const auto gather = [&](int64_t i, int64_t count) {
        i16x16 bits{};
        std::memcpy(&bits, x + i, count * sizeof *x);
        bits &= 0x7fff;
        most = bits > most ? bits : most;
    };
    const int64_t whole = size - size % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) gather(i, kLanes);
    if (whole < size) gather(whole, size - whole);
    int16_t largest = 0;
    for (int i = 0; i < kLanes; ++i) largest = std::max<int16_t>(largest, most[i]);
    return to_float(bf16{static_cast<uint16_t>(largest)});
}

// x [size] → to [padded], every byte xor `flip` (0x80 makes x + 128, unsigned). Returns the scale.
inline float quantize_row(const bf16* x, int64_t size, int8_t* to, int64_t padded, int8_t flip) {
    const float magnitude = largest_magnitude(x, size);
    const bool finite = magnitude <= std::numeric_limits<float>::max();
    if (!finite || magnitude < kSmallestMagnitude) {
        std::memset(to, static_cast<uint8_t>(flip), padded);
        return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    }
    const float inverse = kInt8Max / magnitude;
    const int64_t whole = size - size % kLanes;
    int64_t i = 0;
    for (; i < whole; i += kLanes) store(to + i, round_to_int(load(x + i) * inverse) ^ flip);
    if (i < size) {
        store(to + i, round_to_int(load(x + i, size - i) * inverse) ^ flip);
        i += kLanes;
    }
    if (i < padded) std::memset(to + i, static_cast<uint8_t>(flip), padded - i);
    return magnitude * (1.0f / kInt8Max);
}

// x [rows][size] → to [rows][padded] and scales [rows], shared out among the threads when that pays.
inline void quantize_rows(const bf16* x, int64_t rows, int64_t size, int8_t* to, int64_t padded, float* scales,
                          int8_t flip) {
    constexpr int64_t kElementsPerTask = 1 << 14;  // about a microsecond: as long as waking a thread takes
    const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(size, 1));
    run_tasks(ceil_div(rows, rows_per_task), [=](int64_t task) {
        for (int64_t row = task * rows_per_task; row < std::min(rows, (task + 1) * rows_per_task); ++row)
            scales[row] = quantize_row(x + row * size, size, to + row * padded, padded, flip);
    });
}

}  // namespace powerband
