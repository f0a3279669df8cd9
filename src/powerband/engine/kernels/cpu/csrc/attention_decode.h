// Attention of one new token per request over the request's blocks.
#pragma once

#include "kv_layout.h"

namespace powerband {

// A part: up to 512 positions of a context, the unit that a task computes. Parts begin at multiples of 512, so that the
// result for a request does not depend on who else is in the step, nor on the number of threads.
constexpr int64_t kPartBlocks = 16;
constexpr int64_t kPartTokens = kPartBlocks * kBlockTokens;

struct DecodeRow {
    const bf16* q;          // [num_heads][head_dim], rotated
    int64_t context;        // positions that it sees (but for the window), its own the last; at least 1
    const int32_t* blocks;  // block table of the request, checked
    bf16* out;              // [num_heads][head_dim]

    int64_t first_part(const AttentionParams& params) const { return params.first_visible(context - 1) / kPartTokens; }
    int64_t num_parts(const AttentionParams& params) const {
        return (context - 1) / kPartTokens + 1 - first_part(params);
    }
};

// Floats that `decode_part` writes: for each of the group's heads the sum of weighted values, weights' sum, largest score.
inline int64_t partial_size(const AttentionParams& params) { return params.group() * (params.cache.head_dim + 16); }

// Part number `part` (0: the first that is visible) for the query heads of one KV head.
void decode_part(const DecodeRow& row, const AttentionParams& params, int64_t kv_head, int64_t part, float* partial);

// All parts of a row and KV head, one after the other in `partials`, to the row's output.
void merge_parts(const DecodeRow& row, const AttentionParams& params, int64_t kv_head, const float* partials);

}  // namespace powerband
