// Attention of a request's chunk of new tokens over its blocks, which hold the chunk's own keys and values already.
#pragma once

#include "kv_layout.h"

namespace powerband {

struct PrefillChunk {
    const bf16* q;           // rotated, not scaled: query i of head h at q + i * q_stride + h * head_dim
    int64_t q_stride;
    int64_t num_queries;
    int64_t first_position;  // of query 0 in its request: query i sees positions up to first_position + i
    const int32_t* blocks;   // block table of the request, checked
    bf16* out;               // of query i of head h at out + i * out_stride + h * head_dim; not the memory of q
    int64_t out_stride;
};

// Tasks that together compute the chunk, independent of one another. Task 0 is the longest, the last the shortest.
int64_t prefill_tasks(const PrefillChunk& chunk, const AttentionParams& params);
void prefill_task(const PrefillChunk& chunk, const AttentionParams& params, int64_t task);

}  // namespace powerband
