// A layer's attention in one operator: checks, then norm, rotation and KV write of all tokens, then attention of all
// rows. A row is a request's part of the step; the first `num_decodes` have one token each.
#include <algorithm>
#include <vector>

#include "attention.h"
#include "attention_decode.h"
#include "attention_prefill.h"
#include "common.h"
#include "output.h"
#include "rotate_store.h"

namespace powerband {
namespace {

constexpr int64_t kTokensPerTask = 8;  // decodes that are rotated and stored by one task

// The step's rows, checked: everything that leads to an address.
struct Rows {
    const int64_t* slots;
    const int32_t *starts, *contexts, *tables;
    int64_t tokens, count, num_decodes, width;

    int64_t length(int64_t row) const { return starts[row + 1] - starts[row]; }
    int64_t first_position(int64_t row) const { return contexts[row] - length(row); }
    const int32_t* blocks(int64_t row) const { return tables + row * width; }
};

Rows checked_rows(const Tensor& slots, const Tensor& query_starts, const Tensor& context_lens,
                  const Tensor& block_tables, int64_t num_decodes, int64_t tokens, int64_t num_blocks) {
    check(slots.dim() == 1 && query_starts.dim() == 1 && context_lens.dim() == 1 && block_tables.dim() == 2,
          "attend: slots, query_starts and context_lens must have one dimension, block_tables two");
    const int64_t count = context_lens.size(0);
    Rows rows{pointer<int64_t>(slots, "slots"), pointer<int32_t>(query_starts, "query_starts"),
              pointer<int32_t>(context_lens, "context_lens"), pointer<int32_t>(block_tables, "block_tables"),
              tokens, count, num_decodes, block_tables.size(1)};
    check(slots.size(0) == tokens, "attend: one slot per token");
    check(query_starts.size(0) == count + 1 && block_tables.size(0) == count,
          "attend: query_starts, context_lens and block_tables must have the same rows");
    check(0 <= num_decodes && num_decodes <= count, "attend: num_decodes must be a number of rows");
    check(rows.starts[0] == 0 && rows.starts[count] == tokens, "attend: query_starts must cover the tokens");
    for (int64_t row = 0; row < count; ++row) {
        const int64_t length = rows.length(row), context = rows.contexts[row];
        check(length >= 1 && (length == 1 || row >= num_decodes),
              "attend: rows must have tokens, and the first num_decodes one each");
        check(context >= length && context <= rows.width * kBlockTokens,
              "attend: a context must hold the row's tokens and fit its block table");
        uint32_t largest = 0;  // negative ones are large, too
        for (int64_t i = 0; i < ceil_div(context, kBlockTokens); ++i)
            largest = std::max(largest, static_cast<uint32_t>(rows.blocks(row)[i]));
        check(largest < num_blocks, "attend: a block table names a block that the cache does not have");
    }
    bool inside = true;
    for (int64_t token = 0; token < tokens; ++token)
        inside &= rows.slots[token] >= -1 && rows.slots[token] < num_blocks * kBlockTokens;
    check(inside, "attend: a slot is outside the cache");
    return rows;
}

KVCache checked_cache(Tensor& cache, int64_t num_kv_heads) {
    const bool is_int8 = type_of(cache) == ScalarType::Char;
    check(cache.dim() == 3 && cache.size(1) == num_kv_heads && num_kv_heads > 0,
          "attend: cache must be [blocks, KV heads, 64 * head_dim] in bfloat16, [.., .., 64 * (head_dim + 4)] in int8");
    const int64_t head_dim = head_dim_of(cache);
    check(cache.size(2) % (2 * kBlockTokens) == 0 && head_dim % 32 == 0 && 0 < head_dim && head_dim <= kMaxHeadDim,
          "attend: head_dim must be a multiple of 32, at most 256");
    auto* base = is_int8 ? reinterpret_cast<uint8_t*>(mutable_pointer<int8_t>(cache, "cache"))
                         : reinterpret_cast<uint8_t*>(mutable_pointer<bf16>(cache, "cache"));
    check(reinterpret_cast<uintptr_t>(base) % alignof(float) == 0, "attend: cache must be aligned");
    return {base, cache.size(0), num_kv_heads, head_dim, is_int8};
}

const void* float_or_bf16(const std::optional<Tensor>& t, bool wide, const char* name) {
    return wide ? static_cast<const void*>(pointer<float>(t, name)) : static_cast<const void*>(pointer<bf16>(t, name));
}

bool is_wide(const std::optional<Tensor>& t) { return t.has_value() && type_of(*t) == ScalarType::Float; }

ProjectedTokens checked_projection(bf16* qkv, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                                   const std::optional<Tensor>& norm_weights, double eps, const KVCache& cache,
                                   int64_t num_heads, const Rows& rows) {
    const int64_t turned = num_heads + cache.num_kv_heads;
    check(!norm_weights || (norm_weights->dim() == 2 && norm_weights->size(0) == turned &&
                            norm_weights->size(1) == cache.head_dim),
          "attend: norm_weights must be [heads + KV heads, head_dim]");
    check(cos.has_value() == sin.has_value(), "attend: cos and sin come together");
    const int64_t rotary_dim = cos ? cos->size(-1) : 0;
    check(rotary_dim % 2 == 0 && rotary_dim <= cache.head_dim, "attend: rotary_dim must be even, at most head_dim");
    check(!cos || (cos->numel() == rows.tokens * rotary_dim && sin->numel() == cos->numel() &&
                   sin->size(-1) == rotary_dim && type_of(*cos) == type_of(*sin)),
          "attend: cos and sin must be [tokens, rotary_dim] and of one type");
    const bool wide_weights = is_wide(norm_weights), wide_rotation = is_wide(cos);
    return {qkv,
            num_heads,
            cache,
            rows.slots,
            float_or_bf16(norm_weights, wide_weights, "norm_weights"),
            wide_weights,
            static_cast<float>(eps),
            float_or_bf16(cos, wide_rotation, "cos"),
            float_or_bf16(sin, wide_rotation, "sin"),
            wide_rotation,
            rotary_dim};
}

// Sinks as float32, valid until the next call of this thread.
const float* checked_sinks(const std::optional<Tensor>& sinks, int64_t num_heads) {
    if (!sinks) return nullptr;
    check(sinks->dim() == 1 && sinks->size(0) == num_heads, "attend: one sink per head");
    if (type_of(*sinks) == ScalarType::Float) return pointer<float>(sinks, "sinks");
    const bf16* values = pointer<bf16>(sinks, "sinks");
    thread_local std::vector<float> widened;
    widened.resize(num_heads);
    for (int64_t head = 0; head < num_heads; ++head) widened[head] = to_float(values[head]);
    return widened.data();
}

// Norm, rotation and KV write. Tasks end where a chunk's blocks end: keys are stored a block at a time.
void rotate_and_store(const ProjectedTokens& projected, const Rows& rows) {
    thread_local std::vector<int64_t> cuts;
    cuts.clear();
    for (int64_t token = 0; token < rows.num_decodes; token += kTokensPerTask) cuts.push_back(token);
    for (int64_t row = rows.num_decodes; row < rows.count; ++row) {
        const int64_t offset = rows.first_position(row) % kBlockTokens;
        cuts.push_back(rows.starts[row]);
        for (int64_t i = kBlockTokens - offset; i < rows.length(row); i += kBlockTokens)
            cuts.push_back(rows.starts[row] + i);
    }
    cuts.push_back(rows.tokens);
    const int64_t* cut = cuts.data();
    run_tasks(static_cast<int64_t>(cuts.size()) - 1,
              [&, cut](int64_t task) { rotate_store(projected, cut[task], cut[task + 1]); });
}

// The tasks of all rows in one list: those of the chunks, which are the longest, then those of the decodes.
class Attending {
   public:
    Attending(const Rows& rows, const AttentionParams& params, const bf16* q, int64_t q_stride, bf16* out)
        : rows_(rows), params_(params), q_(q), q_stride_(q_stride), out_(out) {}

    void run() {
        thread_local std::vector<int64_t> ends;  // of each row's tasks, in the order of the tasks
        thread_local std::vector<float> partials;
        thread_local std::vector<int32_t> waiting;  // parts of a decode and KV head that are not yet done
        const int64_t kv_heads = params_.cache.num_kv_heads;
        ends.clear();
        int64_t total = 0;
        for (int64_t row = rows_.num_decodes; row < rows_.count; ++row)
            ends.push_back(total += prefill_tasks(chunk(row), params_));
        chunk_tasks_ = total;
        waiting.resize(rows_.num_decodes * kv_heads);
        for (int64_t row = 0; row < rows_.num_decodes; ++row) {
            const int64_t parts = decode(row).num_parts(params_);
            std::fill_n(waiting.begin() + row * kv_heads, kv_heads, static_cast<int32_t>(parts));
            ends.push_back(total += parts * kv_heads);
        }
        const size_t floats = (total - chunk_tasks_) * partial_size(params_);
        if (partials.size() < floats) partials.resize(floats);
        ends_ = ends.data(), partials_ = partials.data(), waiting_ = waiting.data();
        run_tasks(total, [this](int64_t task) { this->task(task); });
    }

   private:
    void task(int64_t task) const {
        const int64_t index = std::upper_bound(ends_, ends_ + rows_.count, task) - ends_;
        const int64_t first = index > 0 ? ends_[index - 1] : 0;
        const int64_t chunks = rows_.count - rows_.num_decodes;
        if (index < chunks) {
            prefill_task(chunk(rows_.num_decodes + index), params_, task - first);
        } else {
            decode_task(index - chunks, task - first, first - chunk_tasks_);
        }
    }

    // `before`: decode tasks of earlier rows. The last part of a row and KV head to be done merges all of them.
    void decode_task(int64_t index, int64_t task, int64_t before) const {
        const DecodeRow row = decode(index);
        const int64_t parts = row.num_parts(params_), kv_head = task / parts, part = task % parts;
        const int64_t kv_heads = params_.cache.num_kv_heads, size = partial_size(params_);
        float* partials = partials_ + (before + kv_head * parts) * size;
        decode_part(row, params_, kv_head, part, partials + part * size);
        std::atomic_ref<int32_t> waiting(waiting_[index * kv_heads + kv_head]);
        if (waiting.fetch_sub(1, std::memory_order_acq_rel) == 1) merge_parts(row, params_, kv_head, partials);
    }

    DecodeRow decode(int64_t row) const {
        const int64_t size = params_.num_heads * params_.cache.head_dim;
        return {q_ + row * q_stride_, rows_.contexts[row], rows_.blocks(row), out_ + row * size};
    }

    PrefillChunk chunk(int64_t row) const {
        const int64_t size = params_.num_heads * params_.cache.head_dim, first = rows_.starts[row];
        return {q_ + first * q_stride_, q_stride_,         rows_.length(row), rows_.first_position(row),
                rows_.blocks(row),      out_ + first * size, size};
    }

    const Rows& rows_;
    const AttentionParams& params_;
    const bf16* q_;
    int64_t q_stride_;
    bf16* out_;
    int64_t chunk_tasks_ = 0;
    const int64_t* ends_ = nullptr;
    float* partials_ = nullptr;
    int32_t* waiting_ = nullptr;
};

Tensor attend(Tensor qkv, std::optional<Tensor> cos, std::optional<Tensor> sin, std::optional<Tensor> norm_weights,
              double eps, Tensor cache, Tensor slots, Tensor query_starts, Tensor context_lens, Tensor block_tables,
              int64_t num_decodes, int64_t num_heads, int64_t num_kv_heads, double scale, int64_t window,
              double softcap, std::optional<Tensor> sinks) {
    const AttentionArguments arguments{cos, sin, norm_weights, eps, cache, slots, query_starts, context_lens,
                                       block_tables, num_decodes, num_heads, num_kv_heads, scale, window, softcap,
                                       sinks};
    const int64_t head_dim = arguments.head_dim();
    check(num_heads > 0 && num_kv_heads > 0 && qkv.dim() == 2 &&
              qkv.size(1) == (num_heads + 2 * num_kv_heads) * head_dim,
          "attend: qkv must be [tokens, (heads + 2 * KV heads) * head_dim]");
    Tensor out = new_output(qkv, {qkv.size(0), num_heads * head_dim});
    attend_into(mutable_pointer<bf16>(qkv, "qkv"), qkv.size(0), arguments, mutable_pointer<bf16>(out, "out"));
    return out;
}

}  // namespace

void attend_into(bf16* qkv, int64_t tokens, const AttentionArguments& a, bf16* out) {
    const KVCache blocks = checked_cache(a.cache, a.num_kv_heads);
    check(a.num_heads > 0 && a.num_heads % a.num_kv_heads == 0, "attend: num_heads must be a multiple of num_kv_heads");
    check(a.window >= 0 && a.softcap >= 0, "attend: window and softcap must not be negative");
    const Rows rows = checked_rows(a.slots, a.query_starts, a.context_lens, a.block_tables, a.num_decodes, tokens,
                                   blocks.num_blocks);
    const ProjectedTokens projected =
        checked_projection(qkv, a.cos, a.sin, a.norm_weights, a.eps, blocks, a.num_heads, rows);
    const AttentionParams params{blocks, a.num_heads, static_cast<float>(a.scale), a.window,
                                 static_cast<float>(a.softcap), checked_sinks(a.sinks, a.num_heads)};
    rotate_and_store(projected, rows);
    Attending(rows, params, qkv, projected.row_size(), out).run();
}

STABLE_TORCH_LIBRARY_FRAGMENT(powerband, m) {
    m.def(
        "attend(Tensor(a!) qkv, Tensor? cos, Tensor? sin, Tensor? norm_weights, float eps, Tensor(b!) cache, "
        "Tensor slots, Tensor query_starts, Tensor context_lens, Tensor block_tables, int num_decodes, int num_heads, "
        "int num_kv_heads, float scale, int window, float softcap, Tensor? sinks) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(powerband, CPU, m) { m.impl("attend", TORCH_BOX(&attend)); }

}  // namespace powerband
