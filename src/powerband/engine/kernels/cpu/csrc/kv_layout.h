// How a layer's KV cache lies in memory. A block holds 32 positions of a request; a KV head's part of it lies together:
//
//     cache   [blocks][KV heads][part]           part of D = head_dim, in bf16 (32 * 4D bytes):
//             K  [D/2][32 positions][2 dims]     a row: two dimensions of all positions, an operand of QK^T
//             V  [16][D dims][2 positions]       a row: two positions of all dimensions, an operand of PV
//
// Both are what bf16 dot products take, and what AMX tiles take as B. In int8 the elements lie in the same order, in
// half as many bytes, and what they are multiples of lies behind them (in all 32 * (2D + 8) bytes):
//
//             scales of K  [32 positions] float32    a key is its scale * numbers from -127 to 127
//             scales of V  [32 positions] float32    NaN where it was not finite; the numbers are then 0
#pragma once

#include "simd.h"

namespace powerband {

constexpr int64_t kBlockTokens = 32;
constexpr int64_t kMaxHeadDim = 256;

constexpr int64_t kScaleBytes = 4;

struct KVCache {
    uint8_t* base;
    int64_t num_blocks, num_kv_heads, head_dim;
    bool is_int8;  // rather than bf16

    int64_t part_bytes() const { return 2 * kBlockTokens * (is_int8 ? head_dim + kScaleBytes : 2 * head_dim); }
    uint8_t* part(int64_t block, int64_t kv_head) const {
        return base + (block * num_kv_heads + kv_head) * part_bytes();
    }
    // Element: bf16 or int8_t, as `is_int8` says.
    template <class Element>
    Element* keys(int64_t block, int64_t kv_head) const {
        return reinterpret_cast<Element*>(part(block, kv_head));
    }
    template <class Element>
    Element* values(int64_t block, int64_t kv_head) const {
        return keys<Element>(block, kv_head) + kBlockTokens * head_dim;
    }
    // Of an int8 cache: those of the keys, then those of the values.
    float* scales(int64_t block, int64_t kv_head) const {
        return reinterpret_cast<float*>(part(block, kv_head) + 2 * kBlockTokens * head_dim);
    }
};

// What stays the same for all tokens of a step in one layer.
struct AttentionParams {
    KVCache cache;
    int64_t num_heads;   // query heads; num_heads / num_kv_heads consecutive ones share a KV head
    float scale;         // of scores
    int64_t window;      // position p sees (p - window, p]; 0: all up to p
    float softcap;       // scores s become softcap * tanh(s / softcap); 0: as they are
    const float* sinks;  // [num_heads] logits that take a share of the softmax and give nothing; or nullptr

    int64_t group() const { return num_heads / cache.num_kv_heads; }
    // The first position that the query at `position` sees.
    int64_t first_visible(int64_t position) const {
        return window > 0 && position >= window ? position - window + 1 : 0;
    }
};

}  // namespace powerband
