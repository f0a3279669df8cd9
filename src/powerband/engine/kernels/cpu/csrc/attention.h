// A layer's attention as other operators call it: attention.cpp.
#pragma once

#include "common.h"
#include "kv_layout.h"

namespace powerband {

// Of a cache as in kv_layout.h. Whether it is one, `attend_into` checks.
inline int64_t head_dim_of(const Tensor& cache) {
    if (cache.dim() != 3) return 0;
    const int64_t per_position = cache.size(2) / (2 * kBlockTokens);
    return type_of(cache) == ScalarType::Char ? per_position - kScaleBytes : per_position;
}

// What the operator `attend` is given beside qkv.
struct AttentionArguments {
    const std::optional<Tensor>&cos, &sin, &norm_weights;
    double eps;
    Tensor& cache;
    const Tensor &slots, &query_starts, &context_lens, &block_tables;
    int64_t num_decodes, num_heads, num_kv_heads;
    double scale;
    int64_t window;
    double softcap;
    const std::optional<Tensor>& sinks;

    int64_t head_dim() const { return head_dim_of(cache); }
};

// qkv [tokens][(num_heads + 2 * num_kv_heads) * head_dim], which is used up → out [tokens][num_heads * head_dim].
void attend_into(bf16* qkv, int64_t tokens, const AttentionArguments& arguments, bf16* out);

}  // namespace powerband
