// Sixteen floats at a time, on any processor: the compiler lowers these vectors to whatever the target has.
// Where it would lower them badly (rounding to bf16, dot products), intrinsics are used behind #ifdef.
#pragma once

#include <cmath>
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

namespace powerband {

struct bf16 {
    uint16_t bits;
};

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));

constexpr int kLanes = 16;

// The same bits as another vector type.
template <class To, class From>
inline To as(From v) {
    return __builtin_bit_cast(To, v);
}

// ---- one number

inline float to_float(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(float x) { return x; }

// To the nearest, ties to even, as torch rounds.
inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40)};
    return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// ---- loads and stores: unaligned, whole, or the first `count` lanes (the others are zero, or not written)

inline f32x16 broadcast(float x) { return f32x16{} + x; }

inline f32x16 load(const float* p) {
    f32x16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline f32x16 widen(u16x16 v) {
    u32x16 bits = __builtin_convertvector(v, u32x16) << 16;
    return as<f32x16>(bits);
}

inline f32x16 load(const bf16* p) {
    u16x16 v;
    std::memcpy(&v, p, sizeof v);
    return widen(v);
}

inline f32x16 load(const float* p, int64_t count) {
    f32x16 v{};
    std::memcpy(&v, p, count * sizeof *p);
    return v;
}

inline f32x16 load(const bf16* p, int64_t count) {
    u16x16 v{};
    std::memcpy(&v, p, count * sizeof *p);
    return widen(v);
}

inline u16x16 narrow(f32x16 v) {
#ifdef POWERBAND_AVX512_BF16
    __m256bh rounded = _mm512_cvtneps_pbh(as<__m512>(v));
    return as<u16x16>(rounded);
#else
    u32x16 bits = as<u32x16>(v);
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    u32x16 is_nan = as<u32x16>(v != v);
    rounded = (rounded & ~is_nan) | (((bits >> 16) | 0x40) & is_nan);
    return __builtin_convertvector(rounded, u16x16);
#endif
}

inline void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16* p, f32x16 v) {
    u16x16 rounded = narrow(v);
    std::memcpy(p, &rounded, sizeof rounded);
}

inline void store(float* p, f32x16 v, int64_t count) { std::memcpy(p, &v, count * sizeof *p); }

inline void store(bf16* p, f32x16 v, int64_t count) {
    u16x16 rounded = narrow(v);
    std::memcpy(p, &rounded, count * sizeof *p);
}

// ---- across and between lanes

inline f32x16 max(f32x16 a, f32x16 b) {
#ifdef __AVX512F__
    __m512 m = _mm512_max_ps(as<__m512>(a), as<__m512>(b));
    return as<f32x16>(m);
#else
    for (int i = 0; i < kLanes; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
#endif
}

inline float sum(f32x16 v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps(as<__m512>(v));
#else
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
#endif
}

inline float largest(f32x16 v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps(as<__m512>(v));
#else
    float best = v[0];
    for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
    return best;
#endif
}

// e^x to about 2 units in the last place: 2^n * p(f) with n = round(x * log2 e), f in [-1/2, 1/2] and p a polynomial of
// degree 6 (Taylor of 2^f; its remainder there is below 1.2e-8 relative). Below -87.3 the result is 0; NaN stays NaN.
inline f32x16 exp(f32x16 x) {
    const float log2e = 1.44269504088896341f;
    const float bias = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
    i32x16 too_small = x < -87.3f;
    f32x16 clamped = max(x, broadcast(-87.3f));
    f32x16 t = clamped * log2e;
    f32x16 shifted = t + bias;
    f32x16 f = t - (shifted - bias);
    f32x16 p = broadcast(1.5403530393381609954e-4f);
    p = p * f + 1.3333558146428443423e-3f;
    p = p * f + 9.6181291076284771619e-3f;
    p = p * f + 5.5504108664821579953e-2f;
    p = p * f + 2.4022650695910071233e-1f;
    p = p * f + 6.9314718055994530942e-1f;
    p = p * f + 1.0f;
    i32x16 n = as<i32x16>(shifted) << 23;
    i32x16 bits = (as<i32x16>(p) + n) & ~too_small;
    f32x16 result = as<f32x16>(bits);
    return result + (x - x) * 0.0f;  // NaN stays NaN
}

// acc[i] + a[2i] * b[2i] + a[2i+1] * b[2i+1] for 32 bf16 each.
inline f32x16 dot(f32x16 acc, u16x32 a, u16x32 b) {
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

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace powerband
