// From the projection to attention: norm of each head of q and k, rotation of positions, k and v into their blocks.
#pragma once

#include "kv_layout.h"

namespace powerband {

// [tokens] rows of query heads, then key heads, then value heads. q and k are turned where they are.
struct ProjectedTokens {
    bf16* qkv;
    int64_t num_heads;
    KVCache cache;
    const int64_t* slots;         // [tokens] block * 32 + offset; -1: not stored
    const void* norm_weights;     // [query heads + key heads][head_dim], or nullptr: no norm
    bool wide_weights;            // float32 rather than bf16
    float eps;
    const void *cos, *sin;        // [tokens][rotary_dim]; sin with the sign of the rotation
    bool wide_rotation;           // float32 rather than bf16
    int64_t rotary_dim;           // 0: no rotation

    int64_t row_size() const { return (num_heads + 2 * cache.num_kv_heads) * cache.head_dim; }
};

// Tokens [first, end). Different tokens can be given to different threads.
void rotate_store(const ProjectedTokens& tokens, int64_t first, int64_t end);

}  // namespace powerband
