// Keys and values in int8: products with int16, exact in int32, and a block taken back to bf16.
#pragma once

#include <algorithm>

#include "kv_layout.h"
#include "quantize_rows.h"

namespace powerband {

#ifdef POWERBAND_PAIRS
typedef Pair<int16_t> i16x32;
#else
typedef int16_t i16x32 __attribute__((vector_size(64)));
#endif

// 127 * 32767 * 256 dimensions stay below 2^31.
constexpr float kInt16Max = 32767.0f;

POWERBAND_INLINE i16x32 load_pairs(const int8_t* p) {
#if defined(__AVX512BW__)
    return as<i16x32>(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
    const auto half = [](const int8_t* at) {
        return as<i16x32::Half>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
    };
    return {half(p), half(p + 16)};
#else
    i16x32 v;
    for (int i = 0; i < 2 * kLanes; ++i) v[i] = p[i];
    return v;
#endif
}

// acc[i] + a[2i] * b[2i] + a[2i+1] * b[2i+1] for 32 numbers each.
POWERBAND_INLINE i32x16 dot(i32x16 acc, i16x32 a, i16x32 b) {
#if defined(POWERBAND_AVX512_VNNI)
    return as<i32x16>(_mm512_dpwssd_epi32(as<__m512i>(acc), as<__m512i>(a), as<__m512i>(b)));
#elif defined(__AVX512BW__)
    return acc + as<i32x16>(_mm512_madd_epi16(as<__m512i>(a), as<__m512i>(b)));
#elif defined(__AVX2__)
    return acc + i32x16{as<i32x16::Half>(_mm256_madd_epi16(as<__m256i>(a.low), as<__m256i>(b.low))),
                        as<i32x16::Half>(_mm256_madd_epi16(as<__m256i>(a.high), as<__m256i>(b.high)))};
#else
    for (int i = 0; i < kLanes; ++i) acc[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return acc;
#endif
}

// Numbers that fit.
POWERBAND_INLINE void store(int16_t* p, i32x16 v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(as<__m512i>(v)));
#elif defined(__AVX2__)
    const __m256i mixed = _mm256_packs_epi32(as<__m256i>(v.low), as<__m256i>(v.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int16_t>(v[i]);
#endif
}

// numbers * (what is returned) = x [size], but for rounding. NaN where x is not finite; the numbers are then 0.
inline float quantize_query(const bf16* x, int64_t size, int16_t* numbers) {
    const float magnitude = largest_magnitude(x, size);
    const bool finite = magnitude <= std::numeric_limits<float>::max();
    const float inverse = finite && magnitude >= kSmallestMagnitude ? kInt16Max / magnitude : 0.0f;
    for (int64_t i = 0; i < size; i += kLanes)
        store(numbers + i, finite ? round_to_int(load(x + i) * inverse) : i32x16{});
    return finite ? magnitude * (1.0f / kInt16Max) : std::numeric_limits<float>::quiet_NaN();
}

// Weights of a block's 32 positions as int16, exact to 2^-16 of the largest. The same as above is returned.
POWERBAND_INLINE float quantize_weights(f32x16 low, f32x16 high, int16_t* numbers) {
    const bool finite = sum(low + high) <= std::numeric_limits<float>::max();
    const float top = largest(max(low, high));
    const float inverse = finite && top >= kSmallestMagnitude ? kInt16Max / top : 0.0f;
    store(numbers, finite ? round_to_int(low * inverse) : i32x16{});
    store(numbers + kLanes, finite ? round_to_int(high * inverse) : i32x16{});
    return finite ? top * (1.0f / kInt16Max) : std::numeric_limits<float>::quiet_NaN();
}

// 16 pairs of bf16 from as many pairs of int8, each pair times its scale.
POWERBAND_INLINE void scale_pairs(const int8_t* from, f32x16 even, f32x16 odd, bf16* to) {
    const i32x16 pairs = as<i32x16>(load_pairs(from));
    const f32x16 first = convert<f32x16>((pairs << 16) >> 16) * even, second = convert<f32x16>(pairs >> 16) * odd;
    const u32x16 both = convert<u32x16>(narrow(first)) | convert<u32x16>(narrow(second)) << 16;
    std::memcpy(to, &both, sizeof both);
}

// A block's part in int8, to `copy` [64 * head_dim] as it would lie in a bf16 cache. Values of positions that are
// not in [from, to) become zero: their scales may not be numbers.
inline void widen_part(const KVCache& cache, int64_t block, int64_t kv_head, int64_t from, int64_t to, bf16* copy) {
    const int8_t *keys = cache.keys<int8_t>(block, kv_head), *values = cache.values<int8_t>(block, kv_head);
    const float *key_scales = cache.scales(block, kv_head), *value_scales = key_scales + kBlockTokens;
    const int64_t half = kBlockTokens * cache.head_dim;
    const f32x16 low = load(key_scales), high = load(key_scales + kLanes);
    for (int64_t i = 0; i < half; i += 2 * kBlockTokens) {
        scale_pairs(keys + i, low, low, copy + i);
        scale_pairs(keys + i + kBlockTokens, high, high, copy + i + kBlockTokens);
    }
    for (int64_t position = 0; position < kBlockTokens; position += 2) {
        const f32x16 even = broadcast(position >= from && position < to ? value_scales[position] : 0.0f);
        const f32x16 odd = broadcast(position + 1 >= from && position + 1 < to ? value_scales[position + 1] : 0.0f);
        const int64_t at = position * cache.head_dim;
        for (int64_t d = 0; d < 2 * cache.head_dim; d += 2 * kLanes)
            scale_pairs(values + at + d, even, odd, copy + half + at + d);
    }
}

}  // namespace powerband
