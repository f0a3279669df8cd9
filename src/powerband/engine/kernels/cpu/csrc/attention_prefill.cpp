// Attention of a prefill chunk: new queries of one request over its paged KV cache, softmax and products in one pass.
//
// A task is a tile of queries with all query heads of one KV head, folded into rows: row = query * group + head. It takes
// its keys a stretch of blocks at a time; for each stretch, and each group of rows:
//
//     scores  = queries * K           [32 rows][stretch]
//     weights = exp2(scores - maximum)  … the output so far shrinks where the maximum of a row has grown
//     output += weights * V           [32 rows][head size]
//
// The K part of a block and its V part are read as they lie in the cache. Only what a stretch ends in the middle of is
// copied: what lies beyond the last (or before the first) visible token is another request's, and 0 * NaN is NaN.
// Blocks of an int8 cache are copied as bf16, each once per task.
#include "attention_prefill.h"

#include <algorithm>

#include "attention_product.h"
#include "kv_int8.h"
#include "scratch.h"

namespace powerband {
namespace {

#ifdef POWERBAND_AVX512_BF16
using VectorProduct = DotProduct;
#else
using VectorProduct = WideProduct;
#endif

constexpr int64_t kTileRows = 128;
constexpr int64_t kGroupRows = 32;
constexpr int64_t kStretchBlocks = 8;
constexpr int64_t kStretch = kStretchBlocks * kBlockTokens;
constexpr int64_t kPad = 64;  // bytes at the end of a row of scratch: rows of a tile do not fall into the same cache sets
// A row's weights may grow to 2^8 before they are made relative to a larger score: that is seldom then, and no less exact.
constexpr float kSlack = 8.0f;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t queries_per_tile(const AttentionParams& params) {
    return std::max<int64_t>(1, kTileRows / params.group());
}

// A thread's, grown to the largest task that it has had.
template <class Operand>
struct Workspace {
    Scratch<Operand> queries, weights;
    Scratch<float> output, scores, maxima, tops;
    Scratch<f32x16> sums;
    Scratch<bf16> copies;
};

// 2^x to 3e-6 relative (minimax polynomial of degree 4 on [0, 1)): far below the rounding of the weights to bf16.
// -inf gives 0, NaN stays NaN. x <= 0 here, up to rounding.
inline f32x16 exp2(f32x16 x) {
#ifdef __AVX512DQ__
    constexpr int kFloor = 1;
    const __m512 value = as<__m512>(x);
    const f32x16 f = as<f32x16>(_mm512_reduce_ps(value, kFloor));
    f32x16 p = broadcast(0.01353416787f);
    p = p * f + 0.05201146277f;
    p = p * f + 0.2414427539f;
    p = p * f + 0.6930038356f;
    p = p * f + 1.000002593f;
    return as<f32x16>(_mm512_scalef_ps(as<__m512>(p), value));
#else
    return exp(x * 0.69314718055994531f);
#endif
}

template <class Products>
class Task {
    using Operand = typename Products::Operand;

   public:
    Task(const PrefillChunk& chunk, const AttentionParams& params, int64_t kv_head, int64_t tile)
        : chunk_(chunk),
          params_(params),
          kv_head_(kv_head),
          heads_(params.group()),
          first_query_(tile * queries_per_tile(params)),
          num_queries_(std::min(queries_per_tile(params), chunk.num_queries - first_query_)),
          num_rows_(num_queries_ * heads_),
          dim_(params.cache.head_dim),
          factor_((params.softcap > 0 ? params.softcap : params.scale) * kLog2E) {
        const int64_t rows = round_up(num_rows_, kGroupRows);
        thread_local Workspace<Operand> workspace;
        queries_ = workspace.queries.get(rows * q_stride());
        weights_ = workspace.weights.get(kGroupRows * kWeightStride);
        output_ = workspace.output.get(rows * o_stride());
        scores_ = workspace.scores.get(kGroupRows * kScoreStride);
        maxima_ = workspace.maxima.get(rows);
        tops_ = workspace.tops.get(kGroupRows);
        sums_ = workspace.sums.get(rows);
        copies_ = workspace.copies.get((params.cache.is_int8 ? 2 * kStretchBlocks : 2) * kBlockTokens * dim_);
    }

    void run() {
        take_queries();
        const int64_t begin = first_visible(first_query_), end = end_visible(first_query_ + num_queries_ - 1);
        const int64_t last_block = (end - 1) / kBlockTokens;
        for (int64_t block = begin / kBlockTokens; block <= last_block; block += kStretchBlocks) {
            const int64_t count = std::min(kStretchBlocks, last_block + 1 - block);
            find_blocks(block, count, begin, end);
            for (int64_t row = 0; row < num_rows_; row += kGroupRows)
                attend(block, count, row, std::min(kGroupRows, num_rows_ - row));
        }
        give_output();
    }

   private:
    static constexpr int64_t kScoreStride = kStretch + kPad / 4;
    static constexpr int64_t kWeightStride = kStretch + kPad / static_cast<int64_t>(sizeof(Operand));

    int64_t q_stride() const { return dim_ + kPad / static_cast<int64_t>(sizeof(Operand)); }
    int64_t o_stride() const { return dim_ + kPad / 4; }

    // The positions that a query sees: [first_visible, end_visible).
    int64_t end_visible(int64_t query) const { return chunk_.first_position + query + 1; }
    int64_t first_visible(int64_t query) const {
        return params_.first_visible(chunk_.first_position + query);
    }
    int64_t query_of(int64_t row) const { return first_query_ + row / heads_; }
    int64_t head_of(int64_t row) const { return kv_head_ * heads_ + row % heads_; }

    void take_queries() {
        for (int64_t row = 0; row < num_rows_; ++row) {
            const bf16* from = chunk_.q + query_of(row) * chunk_.q_stride + head_of(row) * dim_;
            for (int64_t d = 0; d < dim_; d += kLanes) copy(from + d, queries_ + row * q_stride() + d);
            const float sink = params_.sinks != nullptr ? params_.sinks[head_of(row)] * kLog2E : kNothing;
            maxima_[row] = sink;
            sums_[row] = broadcast(sink == kNothing ? 0.0f : 1.0f / kLanes);
        }
    }

    static void copy(const bf16* from, bf16* to) { std::memcpy(to, from, kLanes * sizeof *to); }
    static void copy(const bf16* from, float* to) { store(to, load(from)); }

    // Where K and V of the blocks from `block` on lie.
    void find_blocks(int64_t block, int64_t count, int64_t begin, int64_t end) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t first = (block + i) * kBlockTokens;
            const int64_t from = std::max<int64_t>(0, begin - first);
            const int64_t to = std::min<int64_t>(kBlockTokens, end - first);
            const int64_t id = chunk_.blocks[block + i];
            if (params_.cache.is_int8) {
                bf16* copy = copies_ + i * 2 * kBlockTokens * dim_;
                widen_part(params_.cache, id, kv_head_, from, to, copy);
                keys_[i] = copy;
                values_[i] = copy + kBlockTokens * dim_;
                continue;
            }
            keys_[i] = params_.cache.keys<bf16>(id, kv_head_);
            values_[i] = params_.cache.values<bf16>(id, kv_head_);
            bf16* copy = copies_ + (from > 0) * kBlockTokens * dim_;
            if (from > 0 || to < kBlockTokens) values_[i] = clean(values_[i], copy, from, to);
        }
    }

    // A copy of a V part, [16][head size][2], that is zero where its tokens are not in [from, to).
    const bf16* clean(const bf16* values, bf16* copy, int64_t from, int64_t to) const {
        for (int64_t pair = 0; pair < kBlockTokens / 2; ++pair) {
            const uint32_t even = 2 * pair >= from && 2 * pair < to ? 0xffffu : 0;
            const uint32_t odd = 2 * pair + 1 >= from && 2 * pair + 1 < to ? 0xffff0000u : 0;
            for (int64_t d = 0; d < dim_; d += kLanes) {
                u32x16 both;
                std::memcpy(&both, values + (pair * dim_ + d) * 2, sizeof both);
                both &= even | odd;
                std::memcpy(copy + (pair * dim_ + d) * 2, &both, sizeof both);
            }
        }
        return copy;
    }

    // Rows [row, row + num_rows) over those of the blocks [block, block + count) that they see.
    void attend(int64_t block, int64_t count, int64_t row, int64_t num_rows) {
        const int64_t first_seen = first_visible(query_of(row)) / kBlockTokens;
        const int64_t last_seen = (end_visible(query_of(row + num_rows - 1)) - 1) / kBlockTokens;
        const int64_t from = std::max<int64_t>(first_seen - block, 0), to = std::min(last_seen - block + 1, count);
        if (from >= to) return;
        const bool first = first_seen >= block;
        const int64_t whole_rows = round_up(num_rows, 16);
        for (int64_t i = from; i < to; ++i)
            Products::run({scores_ + (i - from) * kBlockTokens, kScoreStride, queries_ + row * q_stride(), q_stride(),
                           keys_ + i, 1, 0, 2 * kBlockTokens, dim_, false},
                          whole_rows);
        find_tops(row, num_rows, (block + from) * kBlockTokens, (to - from) * kBlockTokens);
        for (int64_t r = 0; r < num_rows; ++r) {
            if (tops_[r] > maxima_[row + r] + (first ? 0.0f : kSlack)) raise(row + r, tops_[r], !first);
            weigh(row + r, scores_ + r * kScoreStride, weights_ + r * kWeightStride, (to - from) * kBlockTokens);
        }
        for (int64_t d = 0; d < dim_; d += 32)
            Products::run({output_ + row * o_stride() + d, o_stride(), weights_, kWeightStride, values_ + from,
                           to - from, 2 * d, 2 * dim_, kBlockTokens, !first},
                          whole_rows);
    }

    // The largest visible score of each row; scores that are not visible become -inf. A row after the other would wait
    // for each maximum before its weights: so they are all found first.
    void find_tops(int64_t row, int64_t num_rows, int64_t start, int64_t count) {
        for (int64_t r = 0; r < num_rows; ++r) {
            float* scores = scores_ + r * kScoreStride;
            const int64_t from = first_visible(query_of(row + r)) - start, to = end_visible(query_of(row + r)) - start;
            if (params_.softcap > 0) cap(scores, count);
            if (from > 0 || to < count) mask(scores, count, from, to);
            f32x16 even = load(scores), odd = load(scores + kLanes);
            for (int64_t i = 2 * kLanes; i < count; i += 2 * kLanes) {
                even = max(even, load(scores + i));
                odd = max(odd, load(scores + i + kLanes));
            }
            tops_[r] = largest(max(even, odd)) * factor_;
        }
    }

    // Makes the weights of a row relative to a larger score.
    void raise(int64_t row, float top, bool has_output) {
        const float shrink = std::exp2(maxima_[row] - top);
        maxima_[row] = top;
        sums_[row] *= shrink;
        float* output = output_ + row * o_stride();
        if (has_output)
            for (int64_t d = 0; d < dim_; d += kLanes) store(output + d, load(output + d) * shrink);
    }

    void weigh(int64_t row, const float* scores, Operand* weights, int64_t count) {
        const float base = maxima_[row] == kNothing ? 0.0f : maxima_[row];
        f32x16 even = sums_[row], odd{};
        for (int64_t i = 0; i < count; i += 2 * kLanes) {
            const f32x16 first = exp2(load(scores + i) * factor_ - base);
            const f32x16 second = exp2(load(scores + i + kLanes) * factor_ - base);
            even += first;
            odd += second;
            store_pair(weights + i, first, second);
        }
        sums_[row] = even + odd;
    }

    static void store_pair(float* to, f32x16 first, f32x16 second) {
        store(to, first);
        store(to + kLanes, second);
    }
    static void store_pair(bf16* to, f32x16 first, f32x16 second) {
#ifdef POWERBAND_AVX512_BF16
        const __m512bh both = _mm512_cvtne2ps_pbh(as<__m512>(second), as<__m512>(first));
        std::memcpy(to, &both, sizeof both);
#else
        store(to, first);
        store(to + kLanes, second);
#endif
    }

    void cap(float* scores, int64_t count) const {
        const float inner = params_.scale / params_.softcap;
        for (int64_t i = 0; i < count; i += kLanes) store(scores + i, tanh(load(scores + i) * inner));
    }

    static void mask(float* scores, int64_t count, int64_t from, int64_t to) {
        const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const int32_t low = static_cast<int32_t>(std::max<int64_t>(from, 0));
        const int32_t high = static_cast<int32_t>(std::min(to, count));
        for (int64_t i = 0; i < count; i += kLanes) {
            const i32x16 index = lanes + static_cast<int32_t>(i);
            store(scores + i, select(as<i32x16>(index >= low & index < high), load(scores + i), broadcast(kNothing)));
        }
    }

    void give_output() const {
        for (int64_t row = 0; row < num_rows_; ++row) {
            const float share = 1.0f / sum(sums_[row]);
            bf16* to = chunk_.out + query_of(row) * chunk_.out_stride + head_of(row) * dim_;
            for (int64_t d = 0; d < dim_; d += kLanes) store(to + d, load(output_ + row * o_stride() + d) * share);
        }
    }

    const PrefillChunk& chunk_;
    const AttentionParams& params_;
    const int64_t kv_head_, heads_, first_query_, num_queries_, num_rows_, dim_;
    const float factor_;  // from what `weigh` exponentiates to powers of two
    Operand *queries_, *weights_;
    float *output_, *scores_;
    float *maxima_, *tops_;  // of each row: what its weights are relative to, in powers of two; the stretch's largest score
    f32x16* sums_;           // of each row's weights, by lane
    bf16* copies_;           // V parts of the last and of the first block; all of a stretch's blocks if they are int8
    const bf16 *keys_[kStretchBlocks], *values_[kStretchBlocks];
};

}  // namespace

int64_t prefill_tasks(const PrefillChunk& chunk, const AttentionParams& params) {
    const int64_t per_tile = queries_per_tile(params);
    return (chunk.num_queries + per_tile - 1) / per_tile * params.cache.num_kv_heads;
}

// The last queries see most: their tasks come first, so that the threads finish together.
void prefill_task(const PrefillChunk& chunk, const AttentionParams& params, int64_t task) {
    const int64_t tiles = prefill_tasks(chunk, params) / params.cache.num_kv_heads;
    const int64_t kv_head = task / tiles, tile = tiles - 1 - task % tiles;
#ifdef POWERBAND_AMX
    if (amx_permitted()) {
        const Tiles tiles_of_this_thread;
        return Task<TileProduct>(chunk, params, kv_head, tile).run();
    }
#endif
    Task<VectorProduct>(chunk, params, kv_head, tile).run();
}

}  // namespace powerband
