// The halves of decoder layers, made once and run in a row, without a way through Python and torch for each of their
// operators. In a decode step of few rows every product reads more than the second-level cache holds, so that whatever
// happens between two of them finds nothing of its own there: a hundred microseconds for what otherwise takes five.
//
//     attention_block   hidden += output(attend(qkv(norm(hidden))))
//     mlp_block         hidden += down(activation(gate) * up), gate and up of norm(hidden)
//
// Without `norm` the sublayer is given hidden itself; with `post_norm` the norm of what it gives is added.
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "adapters.h"
#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "scratch.h"

namespace powerband {
namespace {

// The tensors of a packed weight, in this order:
//
//     bf16   packed, [bias]       int8   packed, scales, sums, [bias]       int4   packed, scales, [zeros], [bias]
struct Projection {
    std::vector<Tensor> tensors;
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

// [tokens][features], to be changed in place.
struct Hidden {
    bf16* data;
    int64_t rows, features;
};

// What surrounds the sublayer: hidden goes in through `norm` and its result comes back through `post_norm`.
struct Residual {
    std::optional<Tensor> norm, post_norm;
    float eps;

    Activations input(const Hidden& hidden) const {
        const Activations x{hidden.data, hidden.rows, hidden.features};
        if (!norm) return x;
        thread_local Scratch<bf16> scratch;
        bf16* normed = scratch.get(x.rows * x.features);
        rms_norm_rows(x, *norm, eps, normed, false);
        return {normed, x.rows, x.features};
    }

    void add(const Hidden& hidden, const Projection& last, const Activations& x,
             const std::vector<AdapterRows>& adapters) const {
        if (!post_norm) {
            const Result result{hidden.data, hidden.features, true};
            last.multiply(x, result);
            return add_adapters(adapters, x, result);
        }
        thread_local Scratch<bf16> scratch;
        bf16* sublayer = scratch.get(hidden.rows * hidden.features);
        last.multiply(x, {sublayer, hidden.features, false});
        add_adapters(adapters, x, {sublayer, hidden.features, true});
        rms_norm_rows({sublayer, hidden.rows, hidden.features}, *post_norm, eps, hidden.data, true);
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

// What a step gives to all of its layers. cos and sin: one for each kind of rotation that the model has. slots and
// block_tables: one for each group of layers.
struct Step {
    const std::vector<Tensor>&cos, &sin, &slots;
    const Tensor &query_starts, &context_lens;
    const std::vector<Tensor>& block_tables;
    int64_t num_decodes;
};

// What the step's adapters add to a block's first and second projection.
struct Adapters {
    std::vector<AdapterRows> first, second;
};

class Block {
   public:
    virtual ~Block() = default;
    virtual void run(const Hidden& hidden, const Step& step, const Adapters& adapters) = 0;
};

struct AttentionBlock final : Block {
    Residual residual;
    Projection qkv, output;
    int64_t rotation;  // -1: none
    std::optional<Tensor> head_norm;
    Tensor cache;
    size_t group;  // of layers with block tables of their own
    int64_t num_heads, num_kv_heads;
    double scale;
    int64_t window;
    double softcap;
    std::optional<Tensor> sinks;

    void run(const Hidden& hidden, const Step& step, const Adapters& adapters) override {
        std::optional<Tensor> cos, sin;
        if (rotation >= 0) {
            check(rotation < static_cast<int64_t>(step.cos.size()) && step.cos.size() == step.sin.size(),
                  "run_blocks: cos and sin must be given for every kind of rotation");
            cos = step.cos[rotation], sin = step.sin[rotation];
        }
        check(group < step.slots.size() && group < step.block_tables.size(),
              "run_blocks: slots and block_tables must be given for every group of layers");
        const AttentionArguments arguments{cos, sin, head_norm, residual.eps, cache, step.slots[group],
                                           step.query_starts, step.context_lens, step.block_tables[group],
                                           step.num_decodes, num_heads, num_kv_heads, scale, window, softcap, sinks};
        const Activations x = residual.input(hidden);
        const int64_t heads_size = num_heads * arguments.head_dim();
        const int64_t qkv_size = heads_size + 2 * num_kv_heads * arguments.head_dim();
        bf16* projected = wide_scratch(x.rows * qkv_size);
        qkv.multiply(x, {projected, qkv_size, false});
        add_adapters(adapters.first, x, {projected, qkv_size, true});
        bf16* attended = narrow_scratch(x.rows * heads_size);
        attend_into(projected, x.rows, arguments, attended);
        residual.add(hidden, output, {attended, x.rows, heads_size}, adapters.second);
    }
};

struct MLPBlock final : Block {
    Residual residual;
    Projection gate_up, down;
    int64_t intermediate_size, activation;

    void run(const Hidden& hidden, const Step&, const Adapters& adapters) override {
        const Activations x = residual.input(hidden);
        bf16* both = wide_scratch(x.rows * 2 * intermediate_size);
        gate_up.multiply(x, {both, 2 * intermediate_size, false});
        add_adapters(adapters.first, x, {both, 2 * intermediate_size, true});
        bf16* inner = narrow_scratch(x.rows * intermediate_size);
        gated_rows({both, x.rows, 2 * intermediate_size}, activation, inner);
        residual.add(hidden, down, {inner, x.rows, intermediate_size}, adapters.second);
    }
};

// Blocks by number, until they are freed.
class Blocks {
   public:
    static Blocks& instance() {
        static Blocks* blocks = new Blocks;
        return *blocks;
    }

    int64_t add(std::shared_ptr<Block> block) {
        const std::lock_guard guard(mutex_);
        blocks_.emplace(++last_, std::move(block));
        return last_;
    }

    std::shared_ptr<Block> get(int64_t number) {
        const std::lock_guard guard(mutex_);
        const auto found = blocks_.find(number);
        check(found != blocks_.end(), "there is no such block");
        return found->second;
    }

    void free(int64_t number) {
        const std::lock_guard guard(mutex_);
        blocks_.erase(number);
    }

   private:
    std::mutex mutex_;
    std::map<int64_t, std::shared_ptr<Block>> blocks_;
    int64_t last_ = 0;
};

// ---- operators

int64_t attention_block(std::optional<Tensor> norm, std::optional<Tensor> post_norm, double eps,
                        std::vector<Tensor> qkv, int64_t qkv_group_size, std::vector<Tensor> output,
                        int64_t output_group_size, int64_t rotation, std::optional<Tensor> head_norm, Tensor cache,
                        int64_t group, int64_t num_heads, int64_t num_kv_heads, double scale, int64_t window,
                        double softcap, std::optional<Tensor> sinks) {
    check(num_heads > 0 && num_kv_heads > 0 && head_dim_of(cache) > 0, "attention_block: there must be heads");
    auto block = std::make_shared<AttentionBlock>();
    block->residual = {norm, post_norm, static_cast<float>(eps)};
    block->qkv = {std::move(qkv), qkv_group_size};
    block->output = {std::move(output), output_group_size};
    block->rotation = rotation;
    block->head_norm = head_norm;
    check(group >= 0, "attention_block: group must not be negative");
    block->cache = cache;
    block->group = static_cast<size_t>(group);
    block->num_heads = num_heads, block->num_kv_heads = num_kv_heads;
    block->scale = scale, block->window = window, block->softcap = softcap;
    block->sinks = sinks;
    return Blocks::instance().add(std::move(block));
}

int64_t mlp_block(std::optional<Tensor> norm, std::optional<Tensor> post_norm, double eps, std::vector<Tensor> gate_up,
                  int64_t gate_up_group_size, std::vector<Tensor> down, int64_t down_group_size,
                  int64_t intermediate_size, int64_t activation) {
    check(intermediate_size > 0, "mlp_block: intermediate_size must be positive");
    auto block = std::make_shared<MLPBlock>();
    block->residual = {norm, post_norm, static_cast<float>(eps)};
    block->gate_up = {std::move(gate_up), gate_up_group_size};
    block->down = {std::move(down), down_group_size};
    block->intermediate_size = intermediate_size, block->activation = activation;
    return Blocks::instance().add(std::move(block));
}

void run_blocks(std::vector<int64_t> blocks, Tensor hidden, std::vector<Tensor> cos, std::vector<Tensor> sin,
                std::vector<Tensor> slots, Tensor query_starts, Tensor context_lens, std::vector<Tensor> block_tables,
                int64_t num_decodes, std::vector<int64_t> deltas, std::vector<int64_t> delta_starts,
                std::vector<int64_t> delta_ends) {
    check(hidden.dim() == 2, "hidden must be [tokens, hidden size]");
    const Hidden rows{mutable_pointer<bf16>(hidden, "hidden"), hidden.size(0), hidden.size(1)};
    const Step step{cos, sin, slots, query_starts, context_lens, block_tables, num_decodes};
    const size_t groups = delta_starts.size();
    check(delta_ends.size() == groups && deltas.size() == blocks.size() * 2 * groups,
          "deltas must be [blocks, 2, groups of rows]");
    const int64_t* next = deltas.data();
    for (const int64_t number : blocks) {
        Adapters adapters;
        if (groups > 0) {
            adapters = {adapter_rows(next, delta_starts, delta_ends),
                        adapter_rows(next + groups, delta_starts, delta_ends)};
            next += 2 * groups;
        }
        Blocks::instance().get(number)->run(rows, step, adapters);
    }
}

void free_blocks(std::vector<int64_t> blocks) {
    for (const int64_t number : blocks) Blocks::instance().free(number);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(powerband, m) {
    m.def(
        "attention_block(Tensor? norm, Tensor? post_norm, float eps, Tensor[] qkv, int qkv_group_size, "
        "Tensor[] output, int output_group_size, int rotation, Tensor? head_norm, Tensor cache, int group, "
        "int num_heads, int num_kv_heads, float scale, int window, float softcap, Tensor? sinks) -> int");
    m.def(
        "mlp_block(Tensor? norm, Tensor? post_norm, float eps, Tensor[] gate_up, int gate_up_group_size, "
        "Tensor[] down, int down_group_size, int intermediate_size, int activation) -> int");
    m.def(
        "run_blocks(int[] blocks, Tensor(a!) hidden, Tensor[] cos, Tensor[] sin, Tensor[] slots, Tensor query_starts, "
        "Tensor context_lens, Tensor[] block_tables, int num_decodes, int[] deltas=[], int[] delta_starts=[], "
        "int[] delta_ends=[]) -> ()");
    m.def("free_blocks(int[] blocks) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(powerband, CPU, m) {
    m.impl("attention_block", TORCH_BOX(&attention_block));
    m.impl("mlp_block", TORCH_BOX(&mlp_block));
    m.impl("run_blocks", TORCH_BOX(&run_blocks));
}
STABLE_TORCH_LIBRARY_IMPL(powerband, CompositeExplicitAutograd, m) { m.impl("free_blocks", TORCH_BOX(&free_blocks)); }

}  // namespace powerband
