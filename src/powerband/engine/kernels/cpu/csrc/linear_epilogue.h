// What becomes of the float32 sums of a product: 32 columns of one row at a time.
#pragma once

#include "simd.h"

namespace powerband {

// `count` (1 … 32) values of two vectors, at p.
inline void store_pair(bf16* p, f32x16 left, f32x16 right, int64_t count) {
    if (count >= 32) {
#ifdef POWERBAND_AVX512_BF16
        const __m512bh both = _mm512_cvtne2ps_pbh(as<__m512>(right), as<__m512>(left));
        std::memcpy(p, &both, sizeof both);
#else
        store(p, left);
        store(p + 16, right);
#endif
    } else if (count > 16) {
        store(p, left);
        store(p + 16, right, count - 16);
    } else if (count == 16) {
        store(p, left);
    } else {
        store(p, left, count);
    }
}

inline void load_pair(const bf16* p, int64_t count, f32x16& left, f32x16& right) {
    left = count >= 16 ? load(p) : load(p, count);
    right = count >= 32 ? load(p + 16) : count > 16 ? load(p + 16, count - 16) : f32x16{};
}

// out [rows, columns] = sums + bias
struct StoreRows {
    const bf16* bias;  // [columns] or nullptr
    bf16* out;
    int64_t columns;

    void prepare(int64_t row, int64_t column) const { __builtin_prefetch(out + row * columns + column, 1, 3); }

    void operator()(int64_t row, int64_t column, f32x16 left, f32x16 right) const {
        const int64_t count = columns - column;
        if (bias != nullptr) {
            f32x16 bias_left, bias_right;
            load_pair(bias + column, count, bias_left, bias_right);
            left += bias_left;
            right += bias_right;
        }
        store_pair(out + row * columns + column, left, right, count);
    }
};

// residual [rows, columns] += sums + bias, rounded once
struct AddRows {
    StoreRows to;

    void prepare(int64_t row, int64_t column) const { to.prepare(row, column); }

    void operator()(int64_t row, int64_t column, f32x16 left, f32x16 right) const {
        f32x16 old_left, old_right;
        load_pair(to.out + row * to.columns + column, to.columns - column, old_left, old_right);
        to(row, column, left + old_left, right + old_right);
    }
};

}  // namespace powerband
