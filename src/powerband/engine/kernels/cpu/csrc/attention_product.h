// The two products of prefill attention, in one form. A is row-major; B comes in panels as the KV cache holds them:
//
//     C[rows][32] f32 (+)= sum over panels p of A[rows][p * depth … (p + 1) * depth] * B_p[depth / 2][32 columns][2]
//
//     scores    A = queries   B = one panel: the K part of a block, depth = head size, columns = its 32 tokens
//     output    A = weights   B = a panel per block: 32 dimensions of its V part, depth = its 32 tokens
//
// One struct per tier, each with the type that it wants A in. Rows come in multiples of 16; those that are not needed may
// hold anything, for no row touches another.
#pragma once

#include "amx.h"
#include "kv_layout.h"

namespace powerband {

// Strides are in elements; the one of B is from a pair of rows to the next.
template <class Operand>
struct Product {
    float* c;
    int64_t c_stride;
    const Operand* a;
    int64_t a_stride;
    const bf16* const* panels;
    int64_t num_panels;
    int64_t panel_offset;  // of the 32 columns, within each panel
    int64_t b_stride;
    int64_t depth;  // a multiple of 32
    bool add;       // to what C holds, rather than writing it
};

#ifdef POWERBAND_AMX
struct TileProduct {
    using Operand = bf16;

    static void run(const Product<bf16>& product, int64_t rows) {
        tiles_see_memory();
        int64_t row = 0;
        for (; row + 32 <= rows; row += 32) rows_of<2>(product, row);
        if (row < rows) rows_of<1>(product, row);
    }

   private:
    // Tiles 0 1 / 2 3 hold C, 4 and 5 hold A, 6 and 7 hold B.
    template <int kTileRows>
    static void rows_of(const Product<bf16>& x, int64_t row) {
        float* c = x.c + row * x.c_stride;
        float* c2 = c + 16 * x.c_stride;
        const int64_t c_bytes = x.c_stride * 4, a_bytes = x.a_stride * 2, b_bytes = x.b_stride * 2;
        if (x.add) {
            _tile_loadd(0, c, c_bytes);
            _tile_loadd(1, c + 16, c_bytes);
            if constexpr (kTileRows == 2) {
                _tile_loadd(2, c2, c_bytes);
                _tile_loadd(3, c2 + 16, c_bytes);
            }
        } else {
            _tile_zero(0);
            _tile_zero(1);
            if constexpr (kTileRows == 2) {
                _tile_zero(2);
                _tile_zero(3);
            }
        }
        const bf16* a = x.a + row * x.a_stride;
        for (int64_t panel = 0; panel < x.num_panels; ++panel) {
            const bf16* b = x.panels[panel] + x.panel_offset;
            for (int64_t k = 0; k < x.depth; k += 32, a += 32, b += 16 * x.b_stride) {
                _tile_loadd(6, b, b_bytes);
                _tile_loadd(4, a, a_bytes);
                _tile_loadd(7, b + 32, b_bytes);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if constexpr (kTileRows == 2) {
                    _tile_loadd(5, a + 16 * x.a_stride, a_bytes);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
        _tile_stored(0, c, c_bytes);
        _tile_stored(1, c + 16, c_bytes);
        if constexpr (kTileRows == 2) {
            _tile_stored(2, c2, c_bytes);
            _tile_stored(3, c2 + 16, c_bytes);
        }
    }
};
#endif

#ifdef POWERBAND_AVX512_BF16
struct DotProduct {
    using Operand = bf16;
    static constexpr int kRows = 8;

    static void run(const Product<bf16>& x, int64_t rows) {
        for (int64_t row = 0; row < rows; row += kRows) rows_of(x, row);
    }

   private:
    static void rows_of(const Product<bf16>& x, int64_t row) {
        __m512 sums[kRows][2];
        for (int r = 0; r < kRows; ++r)
            for (int half = 0; half < 2; ++half)
                sums[r][half] = x.add ? _mm512_loadu_ps(x.c + (row + r) * x.c_stride + 16 * half) : _mm512_setzero_ps();
        const bf16* a = x.a + row * x.a_stride;
        for (int64_t panel = 0; panel < x.num_panels; ++panel) {
            const bf16* b = x.panels[panel] + x.panel_offset;
            for (int64_t k = 0; k < x.depth; k += 2, a += 2, b += x.b_stride) {
                const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 32);
                for (int r = 0; r < kRows; ++r) {
                    int32_t pair;
                    std::memcpy(&pair, a + r * x.a_stride, sizeof pair);
                    const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                    sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, b0);
                    sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, b1);
                }
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int half = 0; half < 2; ++half)
                _mm512_storeu_ps(x.c + (row + r) * x.c_stride + 16 * half, sums[r][half]);
    }
};
#else
// For any processor. A is kept in float: to take a pair of bf16 apart for each row would cost more than the product.
struct WideProduct {
    using Operand = float;
    static constexpr int kRows = 4, kColumns = 8;
    typedef float f32x8 __attribute__((vector_size(32)));
    typedef uint32_t u32x8 __attribute__((vector_size(32)));

    static void run(const Product<float>& x, int64_t rows) {
        for (int64_t row = 0; row < rows; row += kRows)
            for (int64_t column = 0; column < kBlockTokens; column += 2 * kColumns) rows_of(x, row, column);
    }

   private:
    static f32x8 loaded(const float* p) {
        f32x8 v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }

    static void rows_of(const Product<float>& x, int64_t row, int64_t column) {
        f32x8 sums[kRows][2]{};
        float* c = x.c + row * x.c_stride + column;
        if (x.add)
            for (int r = 0; r < kRows; ++r)
                for (int half = 0; half < 2; ++half) sums[r][half] = loaded(c + r * x.c_stride + half * kColumns);
        const float* a = x.a + row * x.a_stride;
        for (int64_t panel = 0; panel < x.num_panels; ++panel) {
            const bf16* b = x.panels[panel] + x.panel_offset + 2 * column;
            for (int64_t k = 0; k < x.depth; k += 2, a += 2, b += x.b_stride)
                for (int half = 0; half < 2; ++half) {
                    u32x8 pairs;
                    std::memcpy(&pairs, b + half * 2 * kColumns, sizeof pairs);
                    const f32x8 even = __builtin_bit_cast(f32x8, pairs << 16);
                    const f32x8 odd = __builtin_bit_cast(f32x8, pairs & 0xffff0000u);
                    for (int r = 0; r < kRows; ++r)
                        sums[r][half] += a[r * x.a_stride] * even + a[r * x.a_stride + 1] * odd;
                }
        }
        for (int r = 0; r < kRows; ++r)
            for (int half = 0; half < 2; ++half)
                std::memcpy(c + r * x.c_stride + half * kColumns, &sums[r][half], sizeof sums[r][half]);
    }
};
#endif

}  // namespace powerband
