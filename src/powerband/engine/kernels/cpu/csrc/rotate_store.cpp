#include "rotate_store.h"

#include <algorithm>

#include "quantize_rows.h"

namespace powerband {
namespace {

constexpr int64_t kTransposed = 16;  // consecutive positions of a block whose keys are stored at once

// Norm of a head (weights: nullptr: none), then rotation (rotary_dim 0: none), in float32 and rounded once.
//
//     pairs (x[i], x[i + half]) with half = rotary_dim / 2; beyond rotary_dim x stays as it is
template <class W, class R>
void turn_head(bf16* x, int64_t size, const W* weights, float eps, const R* cos, const R* sin, int64_t rotary_dim) {
    float y[kMaxHeadDim];
    f32x16 squares{};
    for (int64_t i = 0; i < size; i += kLanes) {
        const f32x16 v = load(x + i);
        squares += v * v;
        store(y + i, v);
    }
    if (weights != nullptr) {
        const float inverse_rms = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
        for (int64_t i = 0; i < size; i += kLanes) store(y + i, load(y + i) * inverse_rms * load(weights + i));
    }
    const int64_t half = rotary_dim / 2;
    const auto turn = [&](int64_t i, auto... count) {
        const f32x16 a = load(y + i, count...), b = load(y + half + i, count...);
        store(y + i, a * load(cos + i, count...) + b * load(sin + i, count...), count...);
        store(y + half + i, b * load(cos + half + i, count...) + a * load(sin + half + i, count...), count...);
    };
    const int64_t whole = half - half % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) turn(i);
    if (whole < half) turn(whole, half - whole);
    for (int64_t i = 0; i < size; i += kLanes) store(x + i, load(y + i));
}

template <class W, class R>
void turn_token(const ProjectedTokens& tokens, int64_t token) {
    const int64_t size = tokens.cache.head_dim, turned = tokens.num_heads + tokens.cache.num_kv_heads;
    bf16* row = tokens.qkv + token * tokens.row_size();
    const W* weights = static_cast<const W*>(tokens.norm_weights);
    const int64_t at = token * tokens.rotary_dim;
    const R *cos = static_cast<const R*>(tokens.cos) + at, *sin = static_cast<const R*>(tokens.sin) + at;
    for (int64_t head = 0; head < turned; ++head)
        turn_head(row + head * size, size, weights ? weights + head * size : nullptr, tokens.eps, cos, sin,
                  tokens.rotary_dim);
}

void turn(const ProjectedTokens& tokens, int64_t token) {
    if (tokens.norm_weights == nullptr && tokens.rotary_dim == 0) return;
    if (tokens.wide_weights)
        tokens.wide_rotation ? turn_token<float, float>(tokens, token) : turn_token<float, bf16>(tokens, token);
    else
        tokens.wide_rotation ? turn_token<bf16, float>(tokens, token) : turn_token<bf16, bf16>(tokens, token);
}

// ---- keys: [head_dim / 2][32 positions][2]

template <class Element>
void store_key(const Element* key, int64_t size, Element* block, int64_t offset) {
    for (int64_t d = 0; d < size; d += 2) std::memcpy(block + d * kBlockTokens + 2 * offset, key + d, 2 * sizeof *key);
}

#ifdef __AVX512F__
// rows[i][j] becomes rows[j][i]: in each of four steps, halves of half the size trade places between rows.
POWERBAND_INLINE void transpose(u32x16 (&rows)[16]) {
    const auto trade = [&](int apart, u32x16 upper, u32x16 lower) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            if (i & apart) continue;
            const u32x16 a = rows[i], b = rows[i + apart];
            rows[i] = __builtin_shuffle(a, b, upper);
            rows[i + apart] = __builtin_shuffle(a, b, lower);
        }
    };
    trade(8, u32x16{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
          u32x16{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
    trade(4, u32x16{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
          u32x16{4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
    trade(2, u32x16{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
          u32x16{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
    trade(1, u32x16{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
          u32x16{1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31});
}

void store_sixteen_keys(const bf16* keys, int64_t stride, int64_t size, bf16* block, int64_t offset) {
    for (int64_t d = 0; d < size; d += 32) {
        u32x16 rows[16];
        for (int i = 0; i < 16; ++i) std::memcpy(&rows[i], keys + i * stride + d, sizeof rows[i]);
        transpose(rows);
        for (int i = 0; i < 16; ++i)
            std::memcpy(block + (d + 2 * i) * kBlockTokens + 2 * offset, &rows[i], sizeof rows[i]);
    }
}

// Rows of four dimensions, which are then taken apart into pairs.
void store_sixteen_keys(const int8_t* keys, int64_t stride, int64_t size, int8_t* block, int64_t offset) {
    for (int64_t d = 0; d < size; d += 64) {
        u32x16 rows[16]{};
        for (int i = 0; i < 16; ++i) {
            const int8_t* from = keys + i * stride + d;
            size - d >= 64 ? std::memcpy(&rows[i], from, 64) : std::memcpy(&rows[i], from, 32);
        }
        transpose(rows);
        for (int i = 0; i < std::min<int64_t>(16, (size - d) / 4); ++i) {
            int8_t* to = block + (d + 4 * i) * kBlockTokens + 2 * offset;
            const u16x16 first = convert<u16x16>(rows[i] & 0xffffu), second = convert<u16x16>(rows[i] >> 16);
            std::memcpy(to, &first, sizeof first);
            std::memcpy(to + 2 * kBlockTokens, &second, sizeof second);
        }
    }
}
#else
template <class Element>
void store_sixteen_keys(const Element* keys, int64_t stride, int64_t size, Element* block, int64_t offset) {
    for (int64_t d = 0; d < size; d += 2)
        for (int i = 0; i < 16; ++i)
            std::memcpy(block + d * kBlockTokens + 2 * (offset + i), keys + i * stride + d, 2 * sizeof *keys);
}
#endif

// ---- values: [16][head_dim][2 positions]

// Writes nothing but its own half of each pair: another thread may be writing the other.
void store_value(const bf16* value, int64_t size, bf16* block, int64_t offset) {
    bf16* row = block + offset / 2 * 2 * size;
#ifdef POWERBAND_AVX512_BF16
    const __mmask32 mine = offset % 2 ? 0xaaaaaaaau : 0x55555555u;
    for (int64_t d = 0; d < size; d += kLanes) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(value + d)));
        _mm512_mask_storeu_epi16(row + 2 * d, mine, _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16)));
    }
#else
    for (int64_t d = 0; d < size; ++d) row[2 * d + offset % 2] = value[d];
#endif
}

void store_two_values(const bf16* first, const bf16* second, int64_t size, bf16* block, int64_t offset) {
    bf16* row = block + offset / 2 * 2 * size;
    for (int64_t d = 0; d < size; d += kLanes) {
        u16x16 a, b;
        std::memcpy(&a, first + d, sizeof a);
        std::memcpy(&b, second + d, sizeof b);
        const u32x16 pairs = convert<u32x16>(a) | convert<u32x16>(b) << 16;
        std::memcpy(row + 2 * d, &pairs, sizeof pairs);
    }
}

void store_value(const int8_t* value, int64_t size, int8_t* block, int64_t offset) {
    int8_t* row = block + offset / 2 * 2 * size;
    for (int64_t d = 0; d < size; ++d) row[2 * d + offset % 2] = value[d];
}

void store_two_values(const int8_t* first, const int8_t* second, int64_t size, int8_t* block, int64_t offset) {
    int8_t* row = block + offset / 2 * 2 * size;
    for (int64_t d = 0; d < size; ++d) {
        row[2 * d] = first[d];
        row[2 * d + 1] = second[d];
    }
}

// ---- both

// `count` consecutive positions of a block, from `offset` on. Strides are in elements.
template <class Element>
void store_rows(const Element* key, const Element* value, int64_t stride, int64_t size, int64_t count, Element* keys,
                Element* values, int64_t offset) {
    int64_t i = 0;
    for (; i + kTransposed <= count; i += kTransposed)
        store_sixteen_keys(key + i * stride, stride, size, keys, offset + i);
    for (; i < count; ++i) store_key(key + i * stride, size, keys, offset + i);
    for (i = 0; i < count;) {
        const Element* first = value + i * stride;
        if ((offset + i) % 2 == 0 && i + 1 < count) {
            store_two_values(first, first + stride, size, values, offset + i);
            i += 2;
        } else {
            store_value(first, size, values, offset + i);
            i += 1;
        }
    }
}

// The same in int8, each key and each value with a scale of its own.
void store_quantized(const bf16* key, const bf16* value, int64_t stride, int64_t count, const KVCache& cache,
                     int64_t block, int64_t head, int64_t offset) {
    int8_t keys[kBlockTokens * kMaxHeadDim], values[kBlockTokens * kMaxHeadDim];
    const int64_t size = cache.head_dim;
    float* scales = cache.scales(block, head) + offset;
    for (int64_t i = 0; i < count; ++i) {
        scales[i] = quantize_row(key + i * stride, size, keys + i * size, size, 0);
        scales[kBlockTokens + i] = quantize_row(value + i * stride, size, values + i * size, size, 0);
    }
    store_rows(keys, values, size, size, count, cache.keys<int8_t>(block, head), cache.values<int8_t>(block, head),
               offset);
}

// `count` consecutive positions of one block, for all KV heads.
void store_run(const ProjectedTokens& tokens, int64_t token, int64_t count) {
    const KVCache& cache = tokens.cache;
    const int64_t stride = tokens.row_size(), size = cache.head_dim;
    const int64_t block = tokens.slots[token] / kBlockTokens, offset = tokens.slots[token] % kBlockTokens;
    for (int64_t head = 0; head < cache.num_kv_heads; ++head) {
        const bf16* key = tokens.qkv + token * stride + (tokens.num_heads + head) * size;
        const bf16* value = key + cache.num_kv_heads * size;
        if (cache.is_int8)
            store_quantized(key, value, stride, count, cache, block, head, offset);
        else
            store_rows(key, value, stride, size, count, cache.keys<bf16>(block, head), cache.values<bf16>(block, head),
                       offset);
    }
}

}  // namespace

void rotate_store(const ProjectedTokens& tokens, int64_t first, int64_t end) {
    for (int64_t token = first; token < end; ++token) turn(tokens, token);
    for (int64_t token = first; token < end;) {
        int64_t count = 1;
        const int64_t slot = tokens.slots[token];
        while (token + count < end && tokens.slots[token + count] == slot + count && (slot + count) % kBlockTokens)
            ++count;
        if (slot >= 0) store_run(tokens, token, count);
        token += slot >= 0 ? count : 1;
    }
}

}  // namespace powerband
