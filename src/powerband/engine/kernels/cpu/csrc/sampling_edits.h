// What requests ask for to be done to their logits (engine/sampling/logits.py, the reference), on a float32 copy of the row that is
// in its thread's cache. A row's tokens lie in `tokens`; `offsets` has where each part begins. Rows may share their allowed tokens.
//
//     offsets    0       1       2      3      4      5      6      7
//                | allowed |     | biased |    |prompt|output|      row of `masks`, -1: none
//
// Values to add to the biased ones lie in `biases`. A mask has a bit for each token that may be chosen.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "common.h"

namespace powerband {
template <> constexpr ScalarType scalar_type<double>() { return ScalarType::Double; }

struct EditScratch {
    std::vector<float> row;
    std::vector<int32_t> counts;  // by token; zero between rows
};

class Edits {
   public:
    // penalties float32 [rows, 3]: repetition, presence, frequency. offsets int64 [rows, 8].
    // tokens int64, biases float32 as long. masks int32 [masks, words]. All of them, or none.
    Edits(int64_t rows, int64_t vocab, const std::optional<Tensor>& penalties, const std::optional<Tensor>& offsets,
          const std::optional<Tensor>& tokens, const std::optional<Tensor>& biases, const std::optional<Tensor>& masks) {
        const bool all = penalties && offsets && tokens && biases && masks;
        check(all == (penalties || offsets || tokens || biases || masks),
              "sample: penalties, offsets, tokens, biases and masks come together");
        if (!all) return;
        check(penalties->dim() == 2 && penalties->size(0) == rows && penalties->size(1) == 3,
              "sample: penalties must be [rows, 3]");
        check(offsets->dim() == 2 && offsets->size(0) == rows && offsets->size(1) == kOffsets,
              "sample: offsets must be [rows, 8]");
        check(tokens->dim() == 1 && biases->dim() == 1 && tokens->size(0) == biases->size(0),
              "sample: tokens and biases must be equally long");
        penalties_ = pointer<float>(*penalties, "penalties");
        offsets_ = pointer<int64_t>(*offsets, "offsets");
        tokens_ = pointer<int64_t>(*tokens, "tokens");
        biases_ = pointer<float>(*biases, "biases");
        check(masks->dim() == 2, "sample: masks must be [masks, words]");
        masks_ = pointer<int32_t>(*masks, "masks");
        words_ = masks->size(1);
        const int64_t count = tokens->size(0);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t* at = offsets_ + row * kOffsets;
            check(0 <= at[0] && at[0] <= at[1] && at[1] <= count && 0 <= at[2] && std::is_sorted(at + 2, at + 7) &&
                      at[6] <= count,
                  "sample: offsets must ascend");
            check(-1 <= at[7] && at[7] < masks->size(0), "sample: no such mask");
        }
        for (int64_t i = 0; i < count; ++i) check(0 <= tokens_[i] && tokens_[i] < vocab, "sample: no such token");
    }

    bool touches(int64_t row) const {
        if (offsets_ == nullptr) return false;
        const int64_t* at = offsets_ + row * kOffsets;
        return at[0] < at[1] || at[2] < at[6] || at[7] >= 0;
    }

    // The edited row, in scratch.
    template <class T>
    const float* edited(const T* logits, int64_t vocab, int64_t row, EditScratch& s) const {
        if (static_cast<int64_t>(s.row.size()) < vocab) {
            s.row.resize(vocab);
            s.counts.resize(vocab);
        }
        float* x = s.row.data();
        const int64_t* at = offsets_ + row * kOffsets;
        if (at[0] < at[1]) {
            std::fill(x, x + vocab, -INFINITY);
            for (int64_t i = at[0]; i < at[1]; ++i) x[tokens_[i]] = to_float(logits[tokens_[i]]);
        } else {
            copy(logits, x, vocab);
        }
        if (at[7] >= 0) keep_masked(x, vocab, masks_ + at[7] * words_);
        for (int64_t i = at[2]; i < at[3]; ++i) x[tokens_[i]] += biases_[i];
        const float *p = penalties_ + row * 3, repetition = p[0];
        if (repetition != 1.0f) {
            each_once(s, at[4], at[6], [&](int64_t token, int32_t) {
                x[token] = x[token] > 0 ? x[token] / repetition : x[token] * repetition;
            });
        }
        if (p[1] != 0.0f || p[2] != 0.0f) {
            each_once(s, at[5], at[6], [&](int64_t token, int32_t times) {
                const float lowered = x[token] - p[2] * static_cast<float>(times);
                x[token] = lowered - p[1];
            });
        }
        return x;
    }

   private:
    static constexpr int64_t kOffsets = 8;

    // Words that allow none or all of their tokens are the rule.
    void keep_masked(float* x, int64_t vocab, const int32_t* words) const {
        for (int64_t word = 0, first = 0; first < vocab; ++word, first += 32) {
            const int64_t end = std::min(first + 32, vocab);
            const uint32_t bits = word < words_ ? static_cast<uint32_t>(words[word]) : 0;
            if (bits == 0) {
                std::fill(x + first, x + end, -INFINITY);
            } else if (bits != ~uint32_t{0}) {
                for (int64_t i = first; i < end; ++i) {
                    if (!(bits >> (i - first) & 1)) x[i] = -INFINITY;
                }
            }
        }
    }

    template <class T>
    static void copy(const T* from, float* to, int64_t count) {
        const int64_t whole = count - count % kLanes;
        for (int64_t i = 0; i < whole; i += kLanes) store(to + i, load(from + i));
        for (int64_t i = whole; i < count; ++i) to[i] = to_float(from[i]);
    }

    // f(token, how often it occurs) for each of tokens [begin, end), once.
    template <class F>
    void each_once(EditScratch& s, int64_t begin, int64_t end, const F& f) const {
        for (int64_t i = begin; i < end; ++i) ++s.counts[tokens_[i]];
        for (int64_t i = begin; i < end; ++i) {
            int32_t& times = s.counts[tokens_[i]];
            if (times) f(tokens_[i], times);
            times = 0;
        }
    }

    const float *penalties_ = nullptr, *biases_ = nullptr;
    const int64_t *offsets_ = nullptr, *tokens_ = nullptr;
    const int32_t* masks_ = nullptr;
    int64_t words_ = 0;
};

}  // namespace powerband
