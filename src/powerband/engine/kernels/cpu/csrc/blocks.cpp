// The two halves of a decoder layer, each in one operator: what its products, norm, attention or activation compute one
// after the other, without a way through torch for each of them. In a decode step of few rows that way takes as long as
// a third of the computing.
//
//     attention_block   hidden += output(attend(qkv(norm(hidden))))
//     mlp_block         hidden += down(activation(gate) * up), gate and up of norm(hidden)
//
// Without `norm` the sublayer is given hidden itself; with `post_norm` the norm of what it gives is added.
#include <vector>

#include "attention.h"
#include "between.h"
#include "linear.h"
#include "scratch.h"

namespace powerband {
namespace {

// The tensors of a packed weight, in this order:
//
//     bf16   packed, [bias]       int8   packed, scales, sums, [bias]       int4   packed, scales, [zeros], [bias]
struct Projection {
    const std::vector<Tensor>& tensors;
    int64_t group_size;  // int4

    void multiply(const Activations& x, const Result& result) const {
        check(!tensors.empty(), "a projection must have tensors");
        size_t next = 1;
        switch (type_of(tensors[0])) {
            case ScalarType::BFloat16: return multiply_bf16(x, tensors[0], rest(next), result);
            case ScalarType::Char:
                check(tensors.size() >= 3, "an int8 projection must have scales and sums");
                next = 3;
                return multiply_int8(x, tensors[0], tensors[1], tensors[2], rest(next), result);
            case ScalarType::Byte: {
                check(tensors.size() >= 2, "an int4 projection must have scales");
                next = 2;
                std::optional<Tensor> zeros;
                if (tensors.size() > 2 && type_of(tensors[2]) == ScalarType::Byte) zeros = tensors[next++];
                return multiply_int4(x, tensors[0], tensors[1], zeros, rest(next), group_size, result);
            }
            default: check(false, "a projection must be packed in bf16, int8 or int4");
        }
    }

   private:
    // The bias, if there is one.
    std::optional<Tensor> rest(size_t next) const {
        check(tensors.size() <= next + 1, "a projection has too many tensors");
        return next < tensors.size() ? std::optional(tensors[next]) : std::nullopt;
    }
};

// What surrounds the sublayer: hidden goes in through `norm` and its result comes back through `post_norm`.
struct Residual {
    Tensor& hidden;
    const std::optional<Tensor>&norm, &post_norm;
    float eps;

    Activations all() const {
        check(hidden.dim() == 2, "hidden must be [tokens, hidden size]");
        return {pointer<bf16>(hidden, "hidden"), hidden.size(0), hidden.size(1)};
    }

    Activations input() const {
        const Activations x = all();
        if (!norm) return x;
        thread_local Scratch<bf16> scratch;
        bf16* normed = scratch.get(x.rows * x.features);
        rms_norm_rows(x, *norm, eps, normed, false);
        return {normed, x.rows, x.features};
    }

    void add(const Projection& last, const Activations& x) const {
        const int64_t rows = hidden.size(0), features = hidden.size(1);
        bf16* to = mutable_pointer<bf16>(hidden, "hidden");
        if (!post_norm) return last.multiply(x, {to, features, true});
        thread_local Scratch<bf16> scratch;
        bf16* sublayer = scratch.get(rows * features);
        last.multiply(x, {sublayer, features, false});
        rms_norm_rows({sublayer, rows, features}, *post_norm, eps, to, true);
    }
};

// The two intermediate values of a sublayer, wide and narrow.
bf16* wide_scratch(int64_t size) {
    thread_local Scratch<bf16> scratch;
    return scratch.get(size);
}
bf16* narrow_scratch(int64_t size) {
    thread_local Scratch<bf16> scratch;
    return scratch.get(size);
}

void attention_block(Tensor hidden, std::optional<Tensor> norm, std::optional<Tensor> post_norm, double eps,
                     std::vector<Tensor> qkv, int64_t qkv_group_size, std::vector<Tensor> output,
                     int64_t output_group_size, std::optional<Tensor> cos, std::optional<Tensor> sin,
                     std::optional<Tensor> head_norm, Tensor cache, Tensor slots, Tensor query_starts,
                     Tensor context_lens, Tensor block_tables, int64_t num_decodes, int64_t num_heads,
                     int64_t num_kv_heads, double scale, int64_t window, double softcap, std::optional<Tensor> sinks) {
    const Residual residual{hidden, norm, post_norm, static_cast<float>(eps)};
    const AttentionArguments arguments{cos, sin, head_norm, eps, cache, slots, query_starts, context_lens,
                                       block_tables, num_decodes, num_heads, num_kv_heads, scale, window, softcap,
                                       sinks};
    check(num_heads > 0 && num_kv_heads > 0 && arguments.head_dim() > 0, "attention_block: there must be heads");
    const Activations x = residual.input();
    const int64_t heads_size = num_heads * arguments.head_dim();
    const int64_t qkv_size = heads_size + 2 * num_kv_heads * arguments.head_dim();
    bf16* projected = wide_scratch(x.rows * qkv_size);
    Projection{qkv, qkv_group_size}.multiply(x, {projected, qkv_size, false});
    bf16* attended = narrow_scratch(x.rows * heads_size);
    attend_into(projected, x.rows, arguments, attended);
    residual.add({output, output_group_size}, {attended, x.rows, heads_size});
}

void mlp_block(Tensor hidden, std::optional<Tensor> norm, std::optional<Tensor> post_norm, double eps,
               std::vector<Tensor> gate_up, int64_t gate_up_group_size, std::vector<Tensor> down,
               int64_t down_group_size, int64_t intermediate_size, int64_t activation) {
    const Residual residual{hidden, norm, post_norm, static_cast<float>(eps)};
    check(intermediate_size > 0, "mlp_block: intermediate_size must be positive");
    const Activations x = residual.input();
    bf16* both = wide_scratch(x.rows * 2 * intermediate_size);
    Projection{gate_up, gate_up_group_size}.multiply(x, {both, 2 * intermediate_size, false});
    bf16* inner = narrow_scratch(x.rows * intermediate_size);
    gated_rows({both, x.rows, 2 * intermediate_size}, activation, inner);
    residual.add({down, down_group_size}, {inner, x.rows, intermediate_size});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(powerband, m) {
    m.def(
        "attention_block(Tensor(a!) hidden, Tensor? norm, Tensor? post_norm, float eps, Tensor[] qkv, "
        "int qkv_group_size, Tensor[] output, int output_group_size, Tensor? cos, Tensor? sin, Tensor? head_norm, "
        "Tensor(b!) cache, Tensor slots, Tensor query_starts, Tensor context_lens, Tensor block_tables, "
        "int num_decodes, int num_heads, int num_kv_heads, float scale, int window, float softcap, Tensor? sinks) -> ()");
    m.def(
        "mlp_block(Tensor(a!) hidden, Tensor? norm, Tensor? post_norm, float eps, Tensor[] gate_up, "
        "int gate_up_group_size, Tensor[] down, int down_group_size, int intermediate_size, int activation) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(powerband, CPU, m) {
    m.impl("attention_block", TORCH_BOX(&attention_block));
    m.impl("mlp_block", TORCH_BOX(&mlp_block));
}

}  // namespace powerband
