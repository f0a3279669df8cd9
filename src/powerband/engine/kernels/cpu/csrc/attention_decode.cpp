// Decode attention at the speed of memory: query heads that share a KV head are computed together, so that each block
// is read once; softmax runs along block by block (online), and the next block is fetched while one is computed.
//
// Over an int8 cache queries and weights are int16: products are of pairs of numbers as with bf16, but exact.
#include "attention_decode.h"

#include <algorithm>

#include "kv_int8.h"

namespace powerband {
namespace {

constexpr int kMaxTile = 8;          // query heads computed together
constexpr float kHidden = -1e30f;    // score of a position that is not seen: finite, for -inf - -inf is not a number
#ifdef __AVX512F__
constexpr int kAccumulators = 16;    // of 32 registers
#else
constexpr int kAccumulators = 4;     // of 16 registers half as wide
#endif

// What a cache of Element is multiplied with, and what the sums are.
template <class Element>
struct Operands;
template <>
struct Operands<bf16> {
    using Number = bf16;
    using Sum = f32x16;
};
template <>
struct Operands<int8_t> {
    using Number = int16_t;
    using Sum = i32x16;
};
template <class Element>
using NumberOf = typename Operands<Element>::Number;
template <class Element>
using SumOf = typename Operands<Element>::Sum;

// One block, as the query sees it: positions [first, end) of 32.
template <class Element>
struct Block {
    const Element *keys, *values;
    const Element *next_keys, *next_values;  // fetched meanwhile
    const float *scales, *next_scales;       // int8 only
    int first, end;
};

// The state of the online softmax of one query head: weights are relative to the largest score so far.
template <class Element>
struct Head {
    const NumberOf<Element>* q;
    float scale;  // of products with q
    float* sums;  // [head_dim] sum of weight * value
    f32x16 total;
    float largest;
};

// What a block's values are multiplied with: weights are step * numbers.
template <class Element>
struct Weights {
    alignas(64) NumberOf<Element> numbers[kBlockTokens];
    float step;    // int8 only
    float factor;  // of the sums so far
};

// Elements 0 and 1 in every pair of lanes.
template <class Number>
POWERBAND_INLINE auto broadcast_pair(const Number* p) {
    using Vector = std::conditional_t<std::is_same_v<Number, bf16>, u16x32, i16x32>;
    uint32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return as<Vector>(u32x16{} + pair);
}

// Into L2: many more lines can be on their way there than to L1. A block of one KV head is up to 32 KiB.
POWERBAND_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// What 32 elements after p lie in.
template <class Element>
POWERBAND_INLINE void fetch_row(const Element* p) {
    fetch(p);
    if constexpr (sizeof(Element) == 2) fetch(p + 32);
}

// scores[g] = scale * keys . q of head g, for 32 positions. Rows of keys are 32 positions of two dimensions.
template <int G, bool kFetch, class Element>
POWERBAND_INLINE void score(const Block<Element>& block, const Head<Element>* heads, int64_t head_dim,
                            f32x16 (&scores)[G][2]) {
    constexpr int kChains = G == 1 ? 4 : G <= 3 ? 2 : 1;  // a sum is begun that often: dot products take several cycles
    SumOf<Element> sums[kChains][G][2] = {};
    for (int64_t d = 0; d < head_dim; d += 2 * kChains) {
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) {
            const int64_t at = (d / 2 + c) * 2 * kBlockTokens;
            if (kFetch) fetch_row(block.next_keys + at);
            const auto low = load_pairs(block.keys + at), high = load_pairs(block.keys + at + 32);
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) {
                const auto pair = broadcast_pair(heads[g].q + d + 2 * c);
                sums[c][g][0] = dot(sums[c][g][0], pair, low);
                sums[c][g][1] = dot(sums[c][g][1], pair, high);
            }
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            SumOf<Element> all = sums[0][g][half];
#pragma GCC unroll 4
            for (int c = 1; c < kChains; ++c) all += sums[c][g][half];
            if constexpr (std::is_same_v<Element, int8_t>)
                scores[g][half] = convert<f32x16>(all) * heads[g].scale * load(block.scales + half * kLanes);
            else
                scores[g][half] = all * heads[g].scale;
        }
}

// sums = sums * factor + weights . values, for columns [begin, begin + 16 * C) of all heads.
template <int G, int C, bool kFetch, class Element>
POWERBAND_INLINE void weigh(const Block<Element>& block, Head<Element>* heads, const Weights<Element>* weights,
                            int64_t head_dim, int64_t begin) {
    constexpr bool kInt8 = std::is_same_v<Element, int8_t>;
    SumOf<Element> sums[G][C] = {};
    if constexpr (!kInt8)
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) sums[g][c] = load(heads[g].sums + begin + c * kLanes) * weights[g].factor;
    for (int pair = 0; pair < kBlockTokens / 2; ++pair) {
        const int64_t at = (pair * head_dim + begin) * 2;
        decltype(load_pairs(block.values)) values[C];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            if (kFetch && (!kInt8 || c % 2 == 0)) fetch(block.next_values + at + c * 32);
            values[c] = load_pairs(block.values + at + c * 32);
        }
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
            const auto weight = broadcast_pair(weights[g].numbers + 2 * pair);
#pragma GCC unroll 8
            for (int c = 0; c < C; ++c) sums[g][c] = dot(sums[g][c], weight, values[c]);
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            float* to = heads[g].sums + begin + c * kLanes;
            if constexpr (kInt8)
                store(to, load(to) * weights[g].factor + convert<f32x16>(sums[g][c]) * weights[g].step);
            else
                store(to, sums[g][c]);
        }
}

// All columns from `begin` on, C vectors at a time, then with half as many.
template <int G, int C, bool kFetch, class Element>
POWERBAND_INLINE void weigh_from(const Block<Element>& block, Head<Element>* heads, const Weights<Element>* weights,
                                 int64_t head_dim, int64_t begin) {
    if constexpr (G * C <= kAccumulators || C == 1)
        for (; begin + C * kLanes <= head_dim; begin += C * kLanes)
            weigh<G, C, kFetch>(block, heads, weights, head_dim, begin);
    if constexpr (C > 1)
        if (begin < head_dim) weigh_from<G, C / 2, kFetch>(block, heads, weights, head_dim, begin);
}

// One block for G query heads.
template <int G, bool kFetch, class Element>
void attend_block(const Block<Element>& block, Head<Element>* heads, const AttentionParams& params) {
    const int64_t head_dim = params.cache.head_dim;
    f32x16 scores[G][2];
    score<G, kFetch>(block, heads, head_dim, scores);
    Weights<Element> weights[G];
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, upper = lane + kLanes;
    const bool whole = block.first == 0 && block.end == kBlockTokens;
    const auto visible = [&](f32x16 v, i32x16 position, float otherwise) {
        if (whole) return v;
        return select((position >= block.first) & (position < block.end), v, broadcast(otherwise));
    };
    for (int g = 0; g < G; ++g) {
        f32x16 low = scores[g][0], high = scores[g][1];
        if (params.softcap > 0) {
            low = tanh(low / params.softcap) * params.softcap;
            high = tanh(high / params.softcap) * params.softcap;
        }
        low = visible(low, lane, kHidden);
        high = visible(high, upper, kHidden);
        Head<Element>& head = heads[g];
        const float now = std::max(head.largest, largest(max(low, high)));
        weights[g].factor = now == head.largest ? 1.0f : std::exp(head.largest - now);
        head.largest = now;
        low = exp(low - now);
        high = exp(high - now);
        head.total = head.total * weights[g].factor + (low + high);
        if constexpr (std::is_same_v<Element, int8_t>) {
            const float* scales = block.scales + kBlockTokens;
            low = visible(low * load(scales), lane, 0.0f);
            high = visible(high * load(scales + kLanes), upper, 0.0f);
            weights[g].step = quantize_weights(low, high, weights[g].numbers);
        } else {
            store(weights[g].numbers, low);
            store(weights[g].numbers + kLanes, high);
        }
    }
    weigh_from<G, 8, kFetch>(block, heads, weights, head_dim, 0);
}

// Up to eight heads in tiles for which there is code. Only the first tile fetches.
template <class Element>
void attend_heads(const Block<Element>& block, Head<Element>* heads, int64_t count, const AttentionParams& params) {
    if constexpr (std::is_same_v<Element, int8_t>)
        for (int64_t i = 0; i < 2 * kBlockTokens; i += kLanes) fetch(block.next_scales + i);
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
void clean_values(const Block<bf16>& block, int64_t head_dim, bf16* clean) {
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

// The positions of a request that a part has to look at: [start, end).
struct Stretch {
    int64_t start, end;
};

Stretch stretch_of(const DecodeRow& row, const AttentionParams& params, int64_t part) {
    const int64_t part_start = (row.first_part(params) + part) * kPartTokens;
    return {std::max(part_start, params.first_visible(row.context - 1)),
            std::min(part_start + kPartTokens, row.context)};
}

template <class Element>
Block<Element> block_at(const DecodeRow& row, const KVCache& cache, int64_t kv_head, int64_t index, Stretch seen) {
    const int64_t id = row.blocks[index], next = row.blocks[std::min(index + 1, (seen.end - 1) / kBlockTokens)];
    const int64_t base = index * kBlockTokens;
    return {cache.keys<Element>(id, kv_head),
            cache.values<Element>(id, kv_head),
            cache.keys<Element>(next, kv_head),
            cache.values<Element>(next, kv_head),
            cache.scales(id, kv_head),
            cache.scales(next, kv_head),
            static_cast<int>(std::max<int64_t>(seen.start - base, 0)),
            static_cast<int>(std::min(seen.end - base, kBlockTokens))};
}

// Up to eight query heads of a KV head, from `head` on, over the part.
template <class Element>
void decode_tile(const DecodeRow& row, const AttentionParams& params, int64_t kv_head, int64_t head, int64_t count,
                 Stretch seen, float* partial) {
    const int64_t head_dim = params.cache.head_dim, size = head_dim + kLanes;
    alignas(64) NumberOf<Element> queries[std::is_same_v<Element, int8_t> ? kMaxTile * kMaxHeadDim : 1];
    alignas(64) bf16 clean[std::is_same_v<Element, bf16> ? kBlockTokens * kMaxHeadDim : 1];
    Head<Element> heads[kMaxTile];
    for (int64_t g = 0; g < count; ++g) {
        const bf16* q = row.q + (head + g) * head_dim;
        float* sums = partial + g * size;
        std::fill_n(sums, head_dim, 0.0f);
        if constexpr (std::is_same_v<Element, int8_t>) {
            int16_t* numbers = queries + g * head_dim;
            const float step = quantize_query(q, head_dim, numbers);
            heads[g] = {numbers, params.scale * step, sums, f32x16{}, -std::numeric_limits<float>::infinity()};
        } else {
            heads[g] = {q, params.scale, sums, f32x16{}, -std::numeric_limits<float>::infinity()};
        }
    }
    for (int64_t index = seen.start / kBlockTokens; index <= (seen.end - 1) / kBlockTokens; ++index) {
        Block<Element> block = block_at<Element>(row, params.cache, kv_head, index, seen);
        if constexpr (std::is_same_v<Element, bf16>)
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

}  // namespace

void decode_part(const DecodeRow& row, const AttentionParams& params, int64_t kv_head, int64_t part, float* partial) {
    const int64_t group = params.group(), size = params.cache.head_dim + kLanes;
    const Stretch seen = stretch_of(row, params, part);
    for (int64_t tile = 0; tile < group; tile += kMaxTile) {
        const auto decode = params.cache.is_int8 ? decode_tile<int8_t> : decode_tile<bf16>;
        decode(row, params, kv_head, kv_head * group + tile, std::min<int64_t>(kMaxTile, group - tile), seen,
               partial + tile * size);
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
