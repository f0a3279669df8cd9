// How a layer's KV cache lies in memory. A block holds 32 positions of a request; a KV head's part of it lies together:
//
//     cache   [blocks][KV heads][part]           part of D = head_dim, bf16 (64 * D * 2 bytes):
//             K  [D/2][32 positions][2 dims]     a row: two dimensions of all positions, an operand of QK^T
//             V  [16][D dims][2 positions]       a row: two positions of all dimensions, an operand of PV
//
// Both are what bf16 dot products take, and what AMX tiles take as B.
#pragma once

#include "simd.h"

namespace powerband {

constexpr int64_t kBlockTokens = 32;
constexpr int64_t kMaxHeadDim = 256;

struct KVCache {
    uint8_t* base;
    int64_t num_blocks, num_kv_heads, head_dim;

    int64_t part_bytes() const { return 2 * kBlockTokens * head_dim * 2; }
    uint8_t* part(int64_t block, int64_t kv_head) const {
        return base + (block * num_kv_heads + kv_head) * part_bytes();
    }
    bf16* keys(int64_t block, int64_t kv_head) const { return reinterpret_cast<bf16*>(part(block, kv_head)); }
    bf16* values(int64_t block, int64_t kv_head) const { return keys(block, kv_head) + kBlockTokens * head_dim; }
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
