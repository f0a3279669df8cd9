// Decode attention at the speed of memory: query heads that share a KV head are computed together, so that each block
// is read once; softmax runs along block by block (online), and the next block is fetched while one is computed.
#include "attention_decode.h"

#include <algorithm>

namespace powerband {
namespace {

constexpr int kMaxTile = 8;          // query heads computed together
constexpr float kHidden = -1e30f;    // score of a position that is not seen: finite, for -inf - -inf is not a number
#ifdef __AVX512F__
constexpr int kAccumulators = 16;    // of 32 registers
#else
constexpr int kAccumulators = 4;     // of 16 registers half as wide
#endif

// One block, as the query sees it: positions [first, end) of 32.
struct Block {
    const bf16 *keys, *values;
    const bf16 *next_keys, *next_values;  // fetched meanwhile
    int first, end;
};

// The state of the online softmax of one query head: weights are relative to the largest score so far.
struct Head {
    const bf16* q;
    float* sums;  // [head_dim] sum of weight * value
    f32x16 total;
    float largest;
};

POWERBAND_INLINE u16x32 load_pairs(const bf16* p) {
    u16x32 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Elements 2i and 2i + 1 in every pair of lanes.
POWERBAND_INLINE u16x32 broadcast_pair(const bf16* p) {
    uint32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return as<u16x32>(u32x16{} + pair);
}

// scores[g] = keys . q of head g, for 32 positions. Rows of keys are 32 positions of two dimensions.
template <int G, bool kFetch>
POWERBAND_INLINE void score(const Block& block, const Head* heads, int64_t head_dim, f32x16 (&scores)[G][2]) {
    constexpr int kChains = G == 1 ? 4 : G <= 3 ? 2 : 1;  // a sum is begun that often: dot products take several cycles
    f32x16 sums[kChains][G][2] = {};
    for (int64_t d = 0; d < head_dim; d += 2 * kChains) {
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) {
            const int64_t at = (d / 2 + c) * 2 * kBlockTokens;
            if (kFetch) prefetch(block.next_keys + at), prefetch(block.next_keys + at + 32);
            const u16x32 low = load_pairs(block.keys + at), high = load_pairs(block.keys + at + 32);
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) {
                const u16x32 pair = broadcast_pair(heads[g].q + d + 2 * c);
                sums[c][g][0] = dot(sums[c][g][0], pair, low);
                sums[c][g][1] = dot(sums[c][g][1], pair, high);
            }
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            scores[g][half] = sums[0][g][half];
#pragma GCC unroll 4
            for (int c = 1; c < kChains; ++c) scores[g][half] += sums[c][g][half];
        }
}

// sums = sums * factor + weights . values, for columns [begin, begin + 16 * C) of all heads.
template <int G, int C, bool kFetch>
POWERBAND_INLINE void weigh(const Block& block, Head* heads, const bf16 (*weights)[kBlockTokens], const float* factors,
                  int64_t head_dim, int64_t begin) {
    f32x16 sums[G][C];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sums[g][c] = load(heads[g].sums + begin + c * kLanes) * factors[g];
    for (int pair = 0; pair < kBlockTokens / 2; ++pair) {
        const int64_t at = (pair * head_dim + begin) * 2;
        u16x32 values[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            if (kFetch) prefetch(block.next_values + at + c * 32);
            values[c] = load_pairs(block.values + at + c * 32);
        }
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
            const u16x32 weight = broadcast_pair(weights[g] + 2 * pair);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) sums[g][c] = dot(sums[g][c], weight, values[c]);
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) store(heads[g].sums + begin + c * kLanes, sums[g][c]);
}

// All columns from `begin` on, C vectors at a time, then with half as many.
template <int G, int C, bool kFetch>
POWERBAND_INLINE void weigh_from(const Block& block, Head* heads, const bf16 (*weights)[kBlockTokens], const float* factors,
                       int64_t head_dim, int64_t begin) {
    if constexpr (G * C <= kAccumulators || C == 1)
        for (; begin + C * kLanes <= head_dim; begin += C * kLanes)
            weigh<G, C, kFetch>(block, heads, weights, factors, head_dim, begin);
    if constexpr (C > 1)
        if (begin < head_dim) weigh_from<G, C / 2, kFetch>(block, heads, weights, factors, head_dim, begin);
}

// One block for G query heads.
template <int G, bool kFetch>
void attend_block(const Block& block, Head* heads, const AttentionParams& params) {
    const int64_t head_dim = params.cache.head_dim;
    f32x16 scores[G][2];
    score<G, kFetch>(block, heads, head_dim, scores);
    alignas(64) bf16 weights[G][kBlockTokens];
    float factors[G];
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int g = 0; g < G; ++g) {
        f32x16 low = scores[g][0] * params.scale, high = scores[g][1] * params.scale;
        if (params.softcap > 0) {
            low = tanh(low / params.softcap) * params.softcap;
            high = tanh(high / params.softcap) * params.softcap;
        }
        if (block.first > 0 || block.end < kBlockTokens) {
            const i32x16 upper = lane + kLanes;
            low = select((lane >= block.first) & (lane < block.end), low, broadcast(kHidden));
            high = select((upper >= block.first) & (upper < block.end), high, broadcast(kHidden));
        }
        Head& head = heads[g];
        const float now = std::max(head.largest, largest(max(low, high)));
        factors[g] = now == head.largest ? 1.0f : std::exp(head.largest - now);
        head.largest = now;
        low = exp(low - now);
        high = exp(high - now);
        head.total = head.total * factors[g] + (low + high);
        store(weights[g], low);
        store(weights[g] + kLanes, high);
    }
    weigh_from<G, 8, kFetch>(block, heads, weights, factors, head_dim, 0);
}

// Up to eight heads in tiles for which there is code. Only the first tile fetches.
void attend_heads(const Block& block, Head* heads, int64_t count, const AttentionParams& params) {
    switch (count) {
        case 1: return attend_block<1, true>(block, heads, params);
        case 2: return attend_block<2, true>(block, heads, params);
        case 3: return attend_block<3, true>(block, heads, params);
        case 4: return attend_block<4, true>(block, heads, params);
        case 5:
        case 6:
        case 7:
            attend_block<4, true>(block, heads, params);
            if (count == 5) return attend_block<1, false>(block, heads + 4, params);
            if (count == 6) return attend_block<2, false>(block, heads + 4, params);
            return attend_block<3, false>(block, heads + 4, params);
        default: return attend_block<8, true>(block, heads, params);
    }
}

// The values of positions [first, end), zeros elsewhere: what an earlier owner left there may not be a number, and
// zero times that would not be zero.
void clean_values(const Block& block, int64_t head_dim, bf16* clean) {
    const int64_t row = 2 * head_dim;
    for (int position = 0; position < kBlockTokens; position += 2) {
        const bool first = position >= block.first && position < block.end;
        const bool second = position + 1 >= block.first && position + 1 < block.end;
        const u32x16 mask = u32x16{} + ((first ? 0x0000ffffu : 0u) | (second ? 0xffff0000u : 0u));
        const int64_t at = position / 2 * row;
        for (int64_t i = 0; i < row; i += 32) {
            const u32x16 kept = as<u32x16>(load_pairs(block.values + at + i)) & mask;
            std::memcpy(clean + at + i, &kept, sizeof kept);
        }
    }
}

}  // namespace

void decode_part(const DecodeRow& row, const AttentionParams& params, int64_t kv_head, int64_t part, float* partial) {
    const KVCache& cache = params.cache;
    const int64_t head_dim = cache.head_dim, group = params.group(), size = head_dim + kLanes;
    const int64_t part_start = (row.first_part(params) + part) * kPartTokens;
    const int64_t start = std::max(part_start, params.first_visible(row.context - 1));
    const int64_t end = std::min(part_start + kPartTokens, row.context);
    const int64_t first_block = start / kBlockTokens, last_block = (end - 1) / kBlockTokens;
    alignas(64) bf16 clean[kBlockTokens * kMaxHeadDim];
    for (int64_t tile = 0; tile < group; tile += kMaxTile) {
        const int64_t count = std::min<int64_t>(kMaxTile, group - tile);
        Head heads[kMaxTile];
        for (int64_t g = 0; g < count; ++g) {
            float* sums = partial + (tile + g) * size;
            std::fill_n(sums, head_dim, 0.0f);
            heads[g] = {row.q + (kv_head * group + tile + g) * head_dim, sums, f32x16{},
                        -std::numeric_limits<float>::infinity()};
        }
        for (int64_t index = first_block; index <= last_block; ++index) {
            const int64_t id = row.blocks[index], next = row.blocks[std::min(index + 1, last_block)];
            const int64_t base = index * kBlockTokens;
            Block block{cache.keys(id, kv_head), cache.values(id, kv_head), cache.keys(next, kv_head),
                        cache.values(next, kv_head), static_cast<int>(std::max<int64_t>(start - base, 0)),
                        static_cast<int>(std::min(end - base, kBlockTokens))};
            if (block.first > 0 || block.end < kBlockTokens) {
                clean_values(block, head_dim, clean);
                block.values = clean;
            }
            attend_heads(block, heads, count, params);
        }
        for (int64_t g = 0; g < count; ++g) {
            heads[g].sums[head_dim] = sum(heads[g].total);
            heads[g].sums[head_dim + 1] = heads[g].largest;
        }
    }
}

void merge_parts(const DecodeRow& row, const AttentionParams& params, int64_t kv_head, const float* partials) {
    const int64_t head_dim = params.cache.head_dim, group = params.group(), parts = row.num_parts(params);
    const int64_t size = head_dim + kLanes, stride = partial_size(params);
    for (int64_t g = 0; g < group; ++g) {
        const int64_t head = kv_head * group + g;
        const float* first = partials + g * size;
        const float sink = params.sinks ? params.sinks[head] : -std::numeric_limits<float>::infinity();
        float most = sink;
        for (int64_t part = 0; part < parts; ++part) most = std::max(most, first[part * stride + head_dim + 1]);
        float total = params.sinks ? std::exp(sink - most) : 0.0f;
        f32x16 sums[kMaxHeadDim / kLanes] = {};
        for (int64_t part = 0; part < parts; ++part) {
            const float* partial = first + part * stride;
            const float factor = std::exp(partial[head_dim + 1] - most);
            total += partial[head_dim] * factor;
            for (int64_t i = 0; i < head_dim; i += kLanes) sums[i / kLanes] += load(partial + i) * factor;
        }
        const float inverse = 1.0f / total;
        for (int64_t i = 0; i < head_dim; i += kLanes)
            store(row.out + head * head_dim + i, sums[i / kLanes] * inverse);
    }
}

}  // namespace powerband
