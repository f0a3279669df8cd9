// int4 panels (int4_dot.h) as bf16 panels (gemm_bf16.h), in a scratch that stays in the second-level cache: with many
// rows the expansion costs little, and tiles multiply bf16 several times as fast as vectors multiply nibbles.
#pragma once

#include "gemm_bf16.h"
#include "int4_dot.h"

#ifdef POWERBAND_AMX
namespace powerband::int4 {

// Lanes of v, shifted right by `bits`: the nibble there as a float, less zero, times scale.
inline __m512 expanded(__m512i v, int bits, __m512 scale, __m512 offset) {
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 nibble = _mm512_permutexvar_ps(_mm512_srli_epi32(v, bits), numbers);  // it looks at four bits only
    return _mm512_fmsub_ps(nibble, scale, offset);
}

// Eight steps of K of 16 columns → four rows [16][2] of bf16.
inline void expand_block(const uint8_t* block, __m512 scale, __m512 offset, __m512i interleave, bf16* out) {
    const __m512i v = _mm512_loadu_si512(block);
    const auto row = [&](int index, int bits) {
        const __m512 even = expanded(v, bits, scale, offset), odd = expanded(v, bits + 8, scale, offset);
        const __m512bh halves = _mm512_cvtne2ps_pbh(odd, even);  // [16 even | 16 odd]
        _mm512_storeu_si512(out + index * 32, _mm512_permutexvar_epi16(interleave, as<__m512i>(halves)));
    };
    row(0, 0);
    row(1, 16);
    row(2, 4);
    row(3, 20);
}

// One panel, over a K that is a multiple of kBlockDepth.
inline void expand_panel(const Int4Panels& w, int64_t panel, bf16* out) {
    alignas(64) static constexpr int16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_load_si512(kInterleave);
    const uint8_t* nibbles = w.nibbles + panel * w.blocks * kBlockBytes;
    for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t at = (panel * w.groups + g) * kLanes;
        const f32x16 scale = load(w.scales + at);
        const f32x16 zero = w.zeros ? convert<f32x16>(load_zeros(w.zeros + at)) : broadcast(kDefaultZero);
        const __m512 scales = as<__m512>(scale), offset = as<__m512>(scale * zero);
        const int64_t end = std::min(w.blocks, (g + 1) * w.blocks_per_group);
        for (int64_t b = g * w.blocks_per_group; b < end; ++b) {
            prefetch(nibbles + b * kBlockBytes + 2048);
            expand_block(nibbles + b * kBlockBytes, scales, offset, interleave, out + b * kBlockDepth * kLanes);
        }
    }
}

}  // namespace powerband::int4
#endif
