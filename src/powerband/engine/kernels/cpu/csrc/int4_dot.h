// The int4 product for rows in registers: int8 activations (int4_rows.h) times nibbles, exact in int32 within a group of
// K, summed over groups in float32.
//
// A panel holds 16 columns over all of K. Eight steps of K are one block of 64 bytes:
//
//     byte 4c + j of a block:   high nibble = w[k + 4 + j][c] | low nibble = w[k + j][c]      c < 16, j < 4
//
// so that a 32-bit lane is a column, and masks give the two operands of four-way dot products.
#pragma once

#include "int4_rows.h"

namespace powerband {

constexpr int64_t kBlockDepth = 8;   // steps of K in a block
constexpr int64_t kBlockBytes = 64;
constexpr int kDefaultZero = 8;

struct Int4Panels {
    const uint8_t* nibbles;  // [panels][blocks][64]
    const float* scales;     // [panels][groups][16]
    const uint8_t* zeros;    // as scales, or null: 8 everywhere
    int64_t blocks, groups, blocks_per_group;
};

namespace int4 {

using Ints = i32x16;

inline int32_t four_bytes(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Ints load_zeros(const uint8_t* p) {
#ifdef __AVX512F__
    return as<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    Ints zeros;
    for (int i = 0; i < kLanes; ++i) zeros[i] = p[i];
    return zeros;
#endif
}

// c[r][p] += nibbles of panel p times row r, over `blocks` blocks. `ahead`: bytes from now that are fetched.
#if defined(POWERBAND_AVX512_VNNI)

template <int ROWS, int PANELS>
inline void add_blocks(const uint8_t* w, int64_t panel_bytes, const int8_t* x, int64_t stride, int64_t blocks,
                       Ints (&c)[ROWS][PANELS], int64_t ahead) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512i sum[ROWS][PANELS];
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p) sum[r][p] = as<__m512i>(c[r][p]);
#pragma GCC unroll 2
    for (int64_t b = 0; b < blocks; ++b) {
        __m512i lo[PANELS], hi[PANELS];
        for (int p = 0; p < PANELS; ++p) {
            const uint8_t* block = w + p * panel_bytes + b * kBlockBytes;
            prefetch(block + ahead);
            const __m512i v = _mm512_loadu_si512(block);
            lo[p] = _mm512_and_si512(v, low);
            hi[p] = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
        }
        for (int r = 0; r < ROWS; ++r) {
            const int8_t* at = x + r * stride + b * kBlockDepth;
            const __m512i x0 = _mm512_set1_epi32(four_bytes(at)), x1 = _mm512_set1_epi32(four_bytes(at + 4));
            for (int p = 0; p < PANELS; ++p) {
                sum[r][p] = _mm512_dpbusd_epi32(sum[r][p], lo[p], x0);
                sum[r][p] = _mm512_dpbusd_epi32(sum[r][p], hi[p], x1);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p) c[r][p] = as<Ints>(sum[r][p]);
}

// One row is bound by instructions: high nibbles stay where they are, sixteen times too large, in sums of their own.
template <>
inline void add_blocks<1, 1>(const uint8_t* w, int64_t, const int8_t* x, int64_t, int64_t blocks, Ints (&c)[1][1],
                             int64_t ahead) {
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(static_cast<char>(0xf0));
    __m512i lo[2] = {as<__m512i>(c[0][0]), _mm512_setzero_si512()};
    __m512i hi[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    const auto step = [&](int64_t b, int which) {
        prefetch(w + b * kBlockBytes + ahead);
        const __m512i v = _mm512_loadu_si512(w + b * kBlockBytes);
        const __m512i x0 = _mm512_set1_epi32(four_bytes(x + b * kBlockDepth));
        const __m512i x1 = _mm512_set1_epi32(four_bytes(x + b * kBlockDepth + 4));
        lo[which] = _mm512_dpbusd_epi32(lo[which], _mm512_and_si512(v, low), x0);
        hi[which] = _mm512_dpbusd_epi32(hi[which], _mm512_and_si512(v, high), x1);
    };
    int64_t b = 0;
#pragma GCC unroll 4
    for (; b + 2 <= blocks; b += 2) {
        step(b, 0);
        step(b + 1, 1);
    }
    if (b < blocks) step(b, 0);
    const __m512i total = _mm512_add_epi32(_mm512_add_epi32(lo[0], lo[1]),
                                           _mm512_srai_epi32(_mm512_add_epi32(hi[0], hi[1]), 4));
    c[0][0] = as<Ints>(total);
}

#elif defined(__AVX2__)

// acc + the four-way dot products of u (at most 15) and s: two of them fit 16 bits.
inline __m256i dot_pairs(__m256i acc, __m256i lo, __m256i hi, __m256i x0, __m256i x1) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(acc, lo, x0), hi, x1);
#else
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(lo, x0), _mm256_maddubs_epi16(hi, x1));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

template <int ROWS, int PANELS>
inline void add_blocks(const uint8_t* w, int64_t panel_bytes, const int8_t* x, int64_t stride, int64_t blocks,
                       Ints (&c)[ROWS][PANELS], int64_t ahead) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256i sum[ROWS][PANELS][2];
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p) {
            sum[r][p][0] = as<__m256i>(c[r][p].low);
            sum[r][p][1] = as<__m256i>(c[r][p].high);
        }
    for (int64_t b = 0; b < blocks; ++b) {
        for (int p = 0; p < PANELS; ++p) {
            const uint8_t* block = w + p * panel_bytes + b * kBlockBytes;
            prefetch(block + ahead);
            for (int half = 0; half < 2; ++half) {
                const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block) + half);
                const __m256i lo = _mm256_and_si256(v, low), hi = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
                for (int r = 0; r < ROWS; ++r) {
                    const int8_t* at = x + r * stride + b * kBlockDepth;
                    const __m256i x0 = _mm256_set1_epi32(four_bytes(at)), x1 = _mm256_set1_epi32(four_bytes(at + 4));
                    sum[r][p][half] = dot_pairs(sum[r][p][half], lo, hi, x0, x1);
                }
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p)
            c[r][p] = Ints(as<Ints::Half>(sum[r][p][0]), as<Ints::Half>(sum[r][p][1]));
}

#else

template <int ROWS, int PANELS>
inline void add_blocks(const uint8_t* w, int64_t panel_bytes, const int8_t* x, int64_t stride, int64_t blocks,
                       Ints (&c)[ROWS][PANELS], int64_t) {
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p)
            for (int64_t b = 0; b < blocks; ++b) {
                const uint8_t* block = w + p * panel_bytes + b * kBlockBytes;
                const int8_t* at = x + r * stride + b * kBlockDepth;
                for (int i = 0; i < kBlockBytes; ++i)
                    c[r][p][i / 4] += (block[i] & 15) * at[i % 4] + (block[i] >> 4) * at[4 + i % 4];
            }
}

#endif

// acc[r][p] = the products of rows x[first_row + r] with the columns of panels first_panel + p, over all of K.
template <int ROWS, int PANELS>
inline void dot(const Int4Panels& w, int64_t first_panel, const GroupedRows& x, int64_t first_row,
                f32x16 (&acc)[ROWS][PANELS]) {
    constexpr int64_t kAhead = ROWS * PANELS == 1 ? 4096 : PANELS == 1 ? 2048 : 1024;  // bytes to fetch ahead
    const int64_t panel_bytes = w.blocks * kBlockBytes;
    const uint8_t* nibbles = w.nibbles + first_panel * panel_bytes;
    const int8_t* values = x.values + first_row * x.stride;
    const float* row_scales = x.scales + first_row * x.groups;
    const int32_t* sums = x.sums + first_row * x.groups;
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p) acc[r][p] = f32x16{};
    for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t begin = g * w.blocks_per_group, blocks = std::min(w.blocks_per_group, w.blocks - begin);
        Ints c[ROWS][PANELS];
        for (int p = 0; p < PANELS; ++p) {
            if (w.zeros == nullptr) {
                for (int r = 0; r < ROWS; ++r) c[r][p] = Ints{} - kDefaultZero * sums[r * x.groups + g];
                continue;
            }
            const Ints zeros = load_zeros(w.zeros + ((first_panel + p) * w.groups + g) * kLanes);
            for (int r = 0; r < ROWS; ++r) c[r][p] = zeros * -sums[r * x.groups + g];
        }
        // At the end of these panels begin those that come in their places next.
        const bool turns = begin * kBlockBytes + kAhead >= panel_bytes;
        const int64_t ahead = turns ? kAhead + (PANELS - 1) * panel_bytes : kAhead;
        add_blocks<ROWS, PANELS>(nibbles + begin * kBlockBytes, panel_bytes, values + begin * kBlockDepth, x.stride,
                                 blocks, c, ahead);
        for (int p = 0; p < PANELS; ++p) {
            const f32x16 scale = load(w.scales + ((first_panel + p) * w.groups + g) * kLanes);
            for (int r = 0; r < ROWS; ++r)
                acc[r][p] += convert<f32x16>(c[r][p]) * (scale * row_scales[r * x.groups + g]);
        }
    }
}

}  // namespace int4
}  // namespace powerband
