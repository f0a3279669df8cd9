// Words of sixteen rows next to each other: what every packed layout of weights comes down to.
#pragma once

#include <algorithm>

#include "simd.h"

namespace powerband {

constexpr int64_t kWordBytes = 4;

#ifdef __AVX512F__
// Sixteen words of each row become sixteen vectors of one word of each row.
inline void transpose_block(const char* from, int64_t row_bytes, char* to) {
    __m512i a[16], b[16];
    for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512(from + r * row_bytes);
    for (int i = 0; i < 16; i += 2) {  // pairs of rows: words 4j, 4j + 1 in b[i], 4j + 2, 4j + 3 in b[i + 1]
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // four rows: word 4j + n in a[i + n]
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int n = 0; n < 4; ++n) {  // all rows: quarters of 128 bits change places
        const __m512i even_low = _mm512_shuffle_i32x4(a[n], a[n + 4], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(a[n], a[n + 4], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(a[n + 8], a[n + 12], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(a[n + 8], a[n + 12], 0xdd);
        _mm512_storeu_si512(to + 64 * n, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
        _mm512_storeu_si512(to + 64 * (n + 4), _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
        _mm512_storeu_si512(to + 64 * (n + 8), _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
        _mm512_storeu_si512(to + 64 * (n + 12), _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
    }
}
#else
inline void transpose_block(const char* from, int64_t row_bytes, char* to) {
    for (int row = 0; row < kLanes; ++row)
        for (int word = 0; word < kLanes; ++word)
            std::memcpy(to + (word * kLanes + row) * kWordBytes, from + row * row_bytes + word * kWordBytes, kWordBytes);
}
#endif

// from: sixteen rows of `words` words, `row_bytes` apart → to [words][16 rows].
inline void transpose_words(const void* from, int64_t row_bytes, int64_t words, void* to) {
    const char* source = static_cast<const char*>(from);
    char* target = static_cast<char*>(to);
    int64_t word = 0;
    for (; word + kLanes <= words; word += kLanes)
        transpose_block(source + word * kWordBytes, row_bytes, target + word * kLanes * kWordBytes);
    for (; word < words; ++word)
        for (int row = 0; row < kLanes; ++row)
            std::memcpy(target + (word * kLanes + row) * kWordBytes, source + row * row_bytes + word * kWordBytes,
                        kWordBytes);
}

}  // namespace powerband
