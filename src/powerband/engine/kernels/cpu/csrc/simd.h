// Sixteen floats at a time, on any processor: the compiler lowers these vectors to whatever the target has. Where it
// would lower them badly (rounding to bf16, dot products, sums across), intrinsics are used behind #ifdef.
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// bf16 dot products and AVX-512 converts come as a pair on every processor that has them.
#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define POWERBAND_AVX512_BF16 1
#endif
#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define POWERBAND_AVX512_VNNI 1
#endif
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(POWERBAND_AVX512_BF16)
#define POWERBAND_AMX 1
#endif

// Vectors of 64 bytes go through memory in a call.
#define POWERBAND_INLINE inline __attribute__((always_inline))

#include "vector_pair.h"

namespace powerband {

struct bf16 {
    uint16_t bits;
};

#if defined(__AVX2__) && !defined(__AVX512F__)
#define POWERBAND_PAIRS 1
typedef Pair<float> f32x16;
typedef Pair<int32_t> i32x16;
typedef Pair<uint32_t> u32x16;
typedef Pair<uint16_t> u16x32;
#else
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));
#endif
typedef uint16_t u16x16 __attribute__((vector_size(32)));

constexpr int kLanes = 16;

// The same bits as another vector type.
template <class To, class From>
POWERBAND_INLINE To as(From v) {
    return __builtin_bit_cast(To, v);
}

#ifdef POWERBAND_PAIRS
template <class To, class T>
    requires requires { typename To::Half; }
POWERBAND_INLINE To as(Pair<T> v) {
    return {__builtin_bit_cast(typename To::Half, v.low), __builtin_bit_cast(typename To::Half, v.high)};
}
#endif

#ifdef __AVX512F__
// The mask of the first `count` lanes.
POWERBAND_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
#endif

typedef int8_t i8x16 __attribute__((vector_size(16)));

// The numbers of v as those of another type, as __builtin_convertvector does.
#ifdef POWERBAND_PAIRS
template <class To, class T>
    requires requires { typename To::Half; }
POWERBAND_INLINE To convert(Pair<T> v) {
    typedef typename To::Half Half;
    return {__builtin_convertvector(v.low, Half), __builtin_convertvector(v.high, Half)};
}

template <class To>
    requires std::same_as<To, u32x16> || std::same_as<To, i32x16>
POWERBAND_INLINE To convert(u16x16 v) {
    const __m256i x = as<__m256i>(v);
    const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1));
    return as<To>(u32x16{as<u32x16::Half>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x))), as<u32x16::Half>(high)});
}

template <class To>
    requires std::same_as<To, i8x16>
POWERBAND_INLINE To convert(i32x16 v) {
    const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                           0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i low = _mm256_shuffle_epi8(as<__m256i>(v.low), bytes);  // four bytes at the start of each 128-bit lane
    const __m256i high = _mm256_shuffle_epi8(as<__m256i>(v.high), bytes);
    const __m128i first = _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    const __m128i second = _mm_unpacklo_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    return as<To>(_mm_unpacklo_epi64(first, second));
}
#else
template <class To, class From>
POWERBAND_INLINE To convert(From v) {
    return __builtin_convertvector(v, To);
}
#endif

// ---- one number

POWERBAND_INLINE float to_float(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

POWERBAND_INLINE float to_float(float x) { return x; }

// To the nearest, ties to even, as torch rounds.
POWERBAND_INLINE bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40)};
    return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// ---- loads and stores: unaligned, whole, or the first `count` lanes (the others are zero, or not written)

POWERBAND_INLINE f32x16 broadcast(float x) { return f32x16{} + x; }

POWERBAND_INLINE f32x16 load(const float* p) {
#ifdef POWERBAND_PAIRS
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
#else
    f32x16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
#endif
}

POWERBAND_INLINE f32x16 widen(u16x16 v) {
    u32x16 bits = convert<u32x16>(v) << 16;
    return as<f32x16>(bits);
}

POWERBAND_INLINE f32x16 load(const bf16* p) {
    u16x16 v;
    std::memcpy(&v, p, sizeof v);
    return widen(v);
}

POWERBAND_INLINE f32x16 load(const float* p, int64_t count) {
#ifdef __AVX512F__
    return as<f32x16>(_mm512_maskz_loadu_ps(first_lanes(count), p));
#else
    f32x16 v{};
    for (int64_t i = 0; i < count; ++i) v[i] = p[i];
    return v;
#endif
}

POWERBAND_INLINE f32x16 load(const bf16* p, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return widen(as<u16x16>(_mm256_maskz_loadu_epi16(first_lanes(count), p)));
#else
    u16x16 v{};
    for (int64_t i = 0; i < count; ++i) v[i] = p[i].bits;
    return widen(v);
#endif
}

POWERBAND_INLINE u16x16 narrow(f32x16 v) {
#if defined(POWERBAND_AVX512_BF16)
    __m256bh rounded = _mm512_cvtneps_pbh(as<__m512>(v));
    return as<u16x16>(rounded);
#elif defined(__AVX512F__)
    __m512i bits = as<__m512i>(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 is_nan = _mm512_cmp_ps_mask(as<__m512>(v), as<__m512>(v), _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    return as<u16x16>(_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#elif defined(__AVX2__)
    const auto rounded = [](__m256 half) {
        __m256i bits = _mm256_castps_si256(half);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(half, half, _CMP_UNORD_Q));
        return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, is_nan), 16);
    };
    // Packing works within 128-bit lanes: [lo0 hi0 | lo1 hi1], so the middle quarters change places.
    __m256i packed = _mm256_packus_epi32(rounded(v.low), rounded(v.high));
    return as<u16x16>(_mm256_permute4x64_epi64(packed, 0xd8));
#else
    u16x16 result;
    for (int i = 0; i < kLanes; ++i) result[i] = to_bf16(v[i]).bits;
    return result;
#endif
}

POWERBAND_INLINE void store(float* p, f32x16 v) {
#ifdef POWERBAND_PAIRS
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
#else
    std::memcpy(p, &v, sizeof v);
#endif
}

POWERBAND_INLINE void store(bf16* p, f32x16 v) {
    u16x16 rounded = narrow(v);
    std::memcpy(p, &rounded, sizeof rounded);
}

POWERBAND_INLINE void store(float* p, f32x16 v, int64_t count) {
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(p, first_lanes(count), as<__m512>(v));
#else
    for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}

POWERBAND_INLINE void store(bf16* p, f32x16 v, int64_t count) {
    u16x16 rounded = narrow(v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm256_mask_storeu_epi16(p, first_lanes(count), as<__m256i>(rounded));
#else
    for (int64_t i = 0; i < count; ++i) p[i].bits = rounded[i];
#endif
}

// ---- across and between lanes

// The larger of each pair; where one of them is NaN, that of b.
POWERBAND_INLINE f32x16 max(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return as<f32x16>(_mm512_max_ps(as<__m512>(a), as<__m512>(b)));
#elif defined(__AVX2__)
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
#else
    for (int i = 0; i < kLanes; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
#endif
}

// The smaller of each pair; where one of them is NaN, that of b.
POWERBAND_INLINE f32x16 min(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return as<f32x16>(_mm512_min_ps(as<__m512>(a), as<__m512>(b)));
#elif defined(__AVX2__)
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
#else
    for (int i = 0; i < kLanes; ++i) a[i] = a[i] < b[i] ? a[i] : b[i];
    return a;
#endif
}

POWERBAND_INLINE f32x16 abs(f32x16 v) {
    u32x16 bits = as<u32x16>(v) & 0x7fffffffu;
    return as<f32x16>(bits);
}

// a where the mask (of a comparison) is set, else b.
POWERBAND_INLINE f32x16 select(i32x16 mask, f32x16 a, f32x16 b) {
    i32x16 bits = (as<i32x16>(a) & mask) | (as<i32x16>(b) & ~mask);
    return as<f32x16>(bits);
}

POWERBAND_INLINE float sum(f32x16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(as<__m512>(v));
#elif defined(__AVX2__)
    const __m256 eight = _mm256_add_ps(v.low, v.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
#endif
}

// The largest lane; of no meaning where a lane is NaN.
POWERBAND_INLINE float largest(f32x16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(as<__m512>(v));
#elif defined(__AVX2__)
    const __m256 eight = _mm256_max_ps(v.low, v.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
    float best = v[0];
    for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
    return best;
#endif
}

// e^x to about one unit in the last place: 2^n * e^r with n = round(x / ln 2), |r| <= ln 2 / 2, and e^r = 1 + r + r^2 p(r),
// p fitted to a relative error below 4e-9. Below -87.3 the result is 0, above 88.72283 infinity; NaN stays NaN.
POWERBAND_INLINE f32x16 exp(f32x16 x) {
    const float log2e = 1.44269504088896341f;
    const float ln2_high = 0.693359375f, ln2_low = -2.1219444005471377e-4f;  // high has few bits: n * high is exact
    const float bias = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
    const f32x16 lowest = broadcast(-87.3f), highest = broadcast(88.72283f);
    f32x16 clamped = min(highest, max(lowest, x));
    f32x16 shifted = clamped * log2e + bias;
    f32x16 n = shifted - bias;
    f32x16 r = clamped - n * ln2_high - n * ln2_low;
    f32x16 p = broadcast(1.3814611203e-3f);
    p = p * r + 8.3687102561e-3f;
    p = p * r + 4.1668387421e-2f;
    p = p * r + 1.6666520686e-1f;
    p = p * r + 4.9999993451e-1f;
    p = p * r * r + r + 1.0f;
    // Within these bounds p has room for n in its exponent: it is above 1 where n is -126, and below 1 where n is 128.
    i32x16 bits = as<i32x16>(p) + (as<i32x16>(shifted) << 23);
    bits = bits & ~as<i32x16>(x < lowest);
    return select(as<i32x16>(x > highest), broadcast(std::numeric_limits<float>::infinity()), as<f32x16>(bits));
}

// To about 2e-7, absolute.
POWERBAND_INLINE f32x16 tanh(f32x16 x) { return 1.0f - 2.0f / (exp(x + x) + 1.0f); }

// 16 pairs.
POWERBAND_INLINE u16x32 load_pairs(const bf16* p) {
    u16x32 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// acc[i] + a[2i] * b[2i] + a[2i+1] * b[2i+1] for 32 bf16 each.
POWERBAND_INLINE f32x16 dot(f32x16 acc, u16x32 a, u16x32 b) {
#ifdef POWERBAND_AVX512_BF16
    __m512 r = _mm512_dpbf16_ps(as<__m512>(acc), as<__m512bh>(a),
                                as<__m512bh>(b));
    return as<f32x16>(r);
#else
    u32x16 pa = as<u32x16>(a), pb = as<u32x16>(b);
    u32x16 a0 = pa << 16, a1 = pa & 0xffff0000u, b0 = pb << 16, b1 = pb & 0xffff0000u;
    acc += as<f32x16>(a0) * as<f32x16>(b0);
    return acc + as<f32x16>(a1) * as<f32x16>(b1);
#endif
}

POWERBAND_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace powerband
