// Tokens from logits, and their log-probabilities: a row is a task, and what it needs stays in its thread's scratch.
//
//     pass 1   maxima of blocks of 64 logits            greedy: done. top-k: candidates lie in the largest blocks.
//     pass 2   weights e^((x - max) / temperature)      on the grid of ops.py, with their sums by block
//     pass 3+  draw by inverse CDF                      nucleus: again among the likelier ones, until inside it
//
// What the choices mean is written in ops.py, which is the reference.
#include <algorithm>
#include <tuple>
#include <vector>

#include "common.h"
#include "sampling_edits.h"

namespace powerband {
namespace {

constexpr int64_t kBlock = 64;
constexpr float kGrid = 1.0f / (1 << 17);  // adding it and taking it off leaves a multiple of 2^-40

// How a row's token is chosen; of params [rows, 3] and numbers [rows, 3].
struct Choice {
    double temperature, top_p, min_p;  // temperature 0: greedy
    int64_t seed, position, top_k;     // top_k 0: all
};

struct Scratch {
    std::vector<float> maxima, weights, order;
    std::vector<double> sums;
    std::vector<int64_t> ids, places;
    EditScratch edits;
};

Scratch& scratch() {
    thread_local Scratch mine;
    return mine;
}

template <class V>
V& grown(V& values, size_t size) {
    if (values.size() < size) values.resize(size);
    return values;
}

// 64 logits of a row: where they are, or those that are left, followed by -inf.
template <class T>
class Blocks {
   public:
    Blocks(const T* row, int64_t vocab) : row_(row), whole_(vocab / kBlock), count_(ceil_div(vocab, kBlock)) {
        for (int64_t i = 0; i < kLanes * 4; i += kLanes) store(rest_ + i, broadcast(-INFINITY));
        std::copy(row + whole_ * kBlock, row + vocab, rest_);
    }
    int64_t count() const { return count_; }
    const T* operator[](int64_t block) const { return block < whole_ ? row_ + block * kBlock : rest_; }

   private:
    const T* row_;
    int64_t whole_, count_;
    T rest_[kBlock];
};

// Maxima of all blocks, and the row's; NaN when the row holds one.
template <class T>
float find_maxima(const Blocks<T>& blocks, float* maxima) {
    float peak = -INFINITY;
    f32x16 not_numbers{};
    for (int64_t b = 0; b < blocks.count(); ++b) {
        const T* x = blocks[b];
        const f32x16 v0 = load(x), v1 = load(x + 16), v2 = load(x + 32), v3 = load(x + 48);
        not_numbers = max(not_numbers, select(as<i32x16>((v0 != v0) | (v1 != v1) | (v2 != v2) | (v3 != v3)),
                                              broadcast(1.0f), broadcast(0.0f)));
        maxima[b] = largest(max(max(v0, v1), max(v2, v3)));
        peak = maxima[b] > peak ? maxima[b] : peak;
    }
    return largest(not_numbers) > 0 ? NAN : peak;
}

// The lowest token whose logit is `peak`.
template <class T>
int64_t first_at(const Blocks<T>& blocks, const float* maxima, float peak) {
    const int64_t b = std::find(maxima, maxima + blocks.count(), peak) - maxima;
    if (b == blocks.count()) return 0;
    int64_t i = 0;
    while (i < kBlock - 1 && to_float(blocks[b][i]) != peak) ++i;
    return b * kBlock + i;
}

// Bounded, so that the likeliest token's 0 stays 0.
float inverse_of(double temperature) { return static_cast<float>(std::min(1 / temperature, 1e30)); }

POWERBAND_INLINE f32x16 weight(f32x16 x, float peak, float inverse_temperature, float min_p) {
    const f32x16 e = exp((x - peak) * inverse_temperature);
    return select(as<i32x16>(e >= broadcast(min_p)), e, broadcast(0.0f)) + kGrid - kGrid;
}

// Three rounds of splitmix64's finalizer: logits.uniform.
uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

double uniform(const Choice& choice, uint64_t draw) {
    const uint64_t mixed = mix(mix(static_cast<uint64_t>(choice.seed)) + static_cast<uint64_t>(choice.position));
    return static_cast<double>(mix(mixed + draw) >> 16) * 0x1p-48;
}

// Sums of the weights above `least`, by block; returns their total.
double sum_blocks(const float* weights, int64_t num_blocks, float least, double* sums) {
    double total = 0;
    const f32x16 limit = broadcast(least);
    for (int64_t b = 0; b < num_blocks; ++b) {
        f32x16 four{};
        for (int64_t i = 0; i < kBlock; i += kLanes) {
            const f32x16 w = load(weights + b * kBlock + i);
            four += select(as<i32x16>(w > limit), w, broadcast(0.0f));
        }
        sums[b] = sum(four);
        total += sums[b];
    }
    return total;
}

// The column at which the cumulated weights above `least` pass `target` (inverse CDF).
int64_t pick(const float* weights, int64_t num_blocks, float least, const double* sums, double target) {
    double before = 0;
    int64_t b = 0, last = 0;
    while (b < num_blocks && before + sums[b] <= target) before += sums[b++];
    if (b == num_blocks)  // rounding: then it is the last one with weight
        while (b > 0 && sums[--b] == 0) {}
    for (int64_t i = b * kBlock; i < (b + 1) * kBlock; ++i) {
        if (weights[i] <= least) continue;
        last = i;
        before += weights[i];
        if (before > target) break;
    }
    return last;
}

// A column of weights [blocks of 64]: any or, by rejection, one of the nucleus (choice.draw_nucleus).
int64_t draw_nucleus(Scratch& s, int64_t num_blocks, const Choice& choice) {
    const float* weights = s.weights.data();
    double* sums = grown(s.sums, num_blocks).data();
    float least = 0;
    double total = sum_blocks(weights, num_blocks, least, sums);
    const double wanted = choice.top_p * total;
    for (uint64_t number = 0;; ++number) {
        const int64_t drawn = pick(weights, num_blocks, least, sums, uniform(choice, number) * total);
        if (choice.top_p >= 1) return drawn;
        const double likelier = sum_blocks(weights, num_blocks, weights[drawn], sums);
        if (likelier < wanted || likelier <= 0) return drawn;
        least = weights[drawn];
        total = likelier;
    }
}

template <class T>
int64_t draw_all(Scratch& s, const Blocks<T>& blocks, const Choice& choice, float peak) {
    float* weights = grown(s.weights, blocks.count() * kBlock).data();
    const float inverse = inverse_of(choice.temperature), min_p = static_cast<float>(choice.min_p);
    for (int64_t b = 0; b < blocks.count(); ++b)
        for (int64_t i = 0; i < kBlock; i += kLanes)
            store(weights + b * kBlock + i, weight(load(blocks[b] + i), peak, inverse, min_p));
    return draw_nucleus(s, blocks.count(), choice);
}

// Logits of at least `least` and their tokens, ascending by token, into order and ids. Returns how many.
template <class T>
int64_t collect(Scratch& s, const Blocks<T>& blocks, float least) {
    int64_t count = 0;
    for (int64_t b = 0; b < blocks.count(); ++b) {
        if (!(s.maxima[b] >= least)) continue;
        grown(s.order, count + kBlock);
        grown(s.ids, count + kBlock);
        for (int64_t i = 0; i < kBlock; ++i) {  // without branches: what is not wanted is written over by the next
            const float x = to_float(blocks[b][i]);
            s.order[count] = x;
            s.ids[count] = b * kBlock + i;
            count += x >= least && x > -INFINITY;
        }
    }
    return count;
}

// The k-th largest of `count` values, which come into another order.
float kth_largest(float* values, int64_t count, int64_t k) {
    std::nth_element(values, values + k - 1, values + count, std::greater<float>());
    return values[k - 1];
}

// Candidates for the `k` largest of a row, ties with the last included: at least k of its logits (if it has as many above
// -inf) are not below the k-th largest maximum of a block.
template <class T>
int64_t candidates(Scratch& s, const Blocks<T>& blocks, int64_t k) {
    float least = -INFINITY;
    if (k <= blocks.count()) {
        std::copy(s.maxima.begin(), s.maxima.begin() + blocks.count(), grown(s.weights, blocks.count()).begin());
        least = kth_largest(s.weights.data(), blocks.count(), k);
    }
    return collect(s, blocks, least);
}

// The least of `count` weights such that all greater ones together stay below `wanted`, by a selection weighed by mass. The
// weights come into another order.
float least_in_nucleus(float* w, int64_t count, double wanted) {
    float *begin = w, *end = w + count, least = INFINITY;
    double above = 0;  // mass of what is greater than all in [begin, end)
    while (begin < end && above < wanted) {
        const float pivot = begin[(end - begin) / 2];
        float* equal = std::partition(begin, end, [=](float x) { return x > pivot; });
        float* below = std::partition(equal, end, [=](float x) { return x == pivot; });
        double greater = above;
        for (const float* x = begin; x < equal; ++x) greater += *x;
        if (greater >= wanted) {
            end = equal;
            continue;
        }
        least = pivot;
        above = greater + static_cast<double>(pivot) * static_cast<double>(below - equal);
        begin = below;
    }
    return least;
}

template <class T>
int64_t draw_top_k(Scratch& s, const Blocks<T>& blocks, const Choice& choice, float peak) {
    const int64_t count = candidates(s, blocks, choice.top_k), num_blocks = ceil_div(count, kBlock);
    float* weights = grown(s.weights, num_blocks * kBlock).data();
    grown(s.order, num_blocks * kBlock);
    float least = -INFINITY;
    if (choice.top_k < count) {
        std::copy(s.order.begin(), s.order.begin() + count, weights);
        least = kth_largest(weights, count, choice.top_k);
    }
    std::fill(s.order.begin() + count, s.order.begin() + num_blocks * kBlock, -INFINITY);
    const float inverse = inverse_of(choice.temperature), min_p = static_cast<float>(choice.min_p);
    for (int64_t i = 0; i < num_blocks * kBlock; i += kLanes) {
        const f32x16 x = load(s.order.data() + i);
        store(weights + i, select(as<i32x16>(x >= broadcast(least)), weight(x, peak, inverse, min_p), broadcast(0.0f)));
    }
    double* sums = grown(s.sums, num_blocks).data();
    double total = sum_blocks(weights, num_blocks, 0, sums);
    float below = 0;
    if (choice.top_p < 1) {
        std::copy(weights, weights + count, s.order.begin());
        const float lowest = least_in_nucleus(s.order.data(), count, choice.top_p * total);
        below = std::nextafter(lowest, 0.0f);
        total = sum_blocks(weights, num_blocks, below, sums);
    }
    return s.ids[pick(weights, num_blocks, below, sums, uniform(choice, 0) * total)];
}

template <class T>
std::pair<int64_t, float> choose(const T* row, int64_t vocab, const Choice& choice) {
    Scratch& s = scratch();
    const Blocks<T> blocks(row, vocab);
    const float peak = find_maxima(blocks, grown(s.maxima, blocks.count()).data());
    if (!std::isfinite(peak)) return {0, peak};
    if (choice.temperature == 0) return {first_at(blocks, s.maxima.data(), peak), peak};
    const bool few = choice.top_k > 0 && choice.top_k < vocab;
    return {few ? draw_top_k(s, blocks, choice, peak) : draw_all(s, blocks, choice, peak), peak};
}

template <class T>
void sample_rows(const Tensor& logits, const double* params, const int64_t* numbers, const Edits& edits, int64_t* ids,
                 float* peaks) {
    const int64_t vocab = logits.size(1);
    const T* values = pointer<T>(logits, "logits");
    run_tasks(logits.size(0), [=, &edits](int64_t row) {
        const double* p = params + row * 3;
        const int64_t* n = numbers + row * 3;
        const Choice choice{p[0], p[1], p[2], n[0], n[1], n[2]};
        const T* x = values + row * vocab;
        std::tie(ids[row], peaks[row]) =
            edits.touches(row) ? choose(edits.edited(x, vocab, row, scratch().edits), vocab, choice) : choose(x, vocab, choice);
    });
}

std::tuple<Tensor, Tensor> sample(Tensor logits, Tensor params, Tensor numbers, std::optional<Tensor> penalties,
                                  std::optional<Tensor> offsets, std::optional<Tensor> tokens,
                                  std::optional<Tensor> biases, std::optional<Tensor> masks) {
    check(logits.dim() == 2 && logits.size(1) > 0, "sample: logits must be [rows, vocab]");
    const int64_t rows = logits.size(0);
    check(params.dim() == 2 && params.size(0) == rows && params.size(1) == 3, "sample: params must be [rows, 3]");
    check(numbers.dim() == 2 && numbers.size(0) == rows && numbers.size(1) == 3, "sample: numbers must be [rows, 3]");
    const double* p = pointer<double>(params, "params");
    const int64_t* n = pointer<int64_t>(numbers, "numbers");
    for (int64_t row = 0; row < rows; ++row) {
        check(std::isfinite(p[row * 3]) && p[row * 3] >= 0, "sample: a temperature must be finite and not negative");
        check(n[row * 3 + 2] >= 0, "sample: top_k must not be negative");
    }
    const Edits edits(rows, logits.size(1), penalties, offsets, tokens, biases, masks);
    Tensor ids = torch::stable::new_empty(numbers, {rows});
    Tensor peaks = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
    int64_t* chosen = mutable_pointer<int64_t>(ids, "token_ids");
    float* largest_logits = mutable_pointer<float>(peaks, "peaks");
    if (type_of(logits) == ScalarType::BFloat16) {
        sample_rows<bf16>(logits, p, n, edits, chosen, largest_logits);
    } else {
        sample_rows<float>(logits, p, n, edits, chosen, largest_logits);
    }
    return {ids, peaks};
}

// Log-probabilities of a row: of `own` and of the `k` likeliest tokens, descending, ties by token. Returns own's rank.
template <class T>
int64_t logprobs_row(const T* row, int64_t vocab, int64_t own, int64_t k, int64_t* ids, float* logprobs) {
    Scratch& s = scratch();
    const Blocks<T> blocks(row, vocab);
    const float peak = find_maxima(blocks, grown(s.maxima, blocks.count()).data()), own_logit = to_float(row[own]);
    double total = 0;
    int64_t likelier = 0;
    for (int64_t b = 0; b < blocks.count(); ++b) {
        f32x16 sums{};
        i32x16 above{};
        for (int64_t i = 0; i < kBlock; i += kLanes) {
            const f32x16 x = load(blocks[b] + i);
            sums += exp(x - peak);
            above -= as<i32x16>(x > broadcast(own_logit));
        }
        total += sum(sums);
        if (s.maxima[b] > own_logit) likelier += static_cast<int64_t>(sum(convert<f32x16>(above)));
    }
    const float log_total = static_cast<float>(std::log(total));
    ids[0] = own;
    logprobs[0] = own_logit - peak - log_total;
    if (k == 0) return likelier + 1;
    const int64_t count = std::isfinite(peak) ? candidates(s, blocks, k) : 0;
    std::vector<int64_t>& places = s.places;
    for (int64_t i = 0; i < count; ++i) grown(places, i + 1)[i] = i;
    const int64_t found = std::min(k, count);
    std::partial_sort(places.begin(), places.begin() + found, places.begin() + count, [&](int64_t a, int64_t b) {
        return s.order[a] > s.order[b] || (s.order[a] == s.order[b] && a < b);
    });
    for (int64_t i = 0; i < k; ++i) {
        ids[1 + i] = i < found ? s.ids[places[i]] : 0;
        logprobs[1 + i] = i < found ? s.order[places[i]] - peak - log_total : -INFINITY;
    }
    return likelier + 1;
}

std::tuple<Tensor, Tensor, Tensor> logprobs(Tensor logits, Tensor token_ids, int64_t k) {
    check(logits.dim() == 2 && logits.size(1) > 0, "logprobs: logits must be [rows, vocab]");
    const int64_t rows = logits.size(0), vocab = logits.size(1);
    check(token_ids.dim() == 1 && token_ids.size(0) == rows, "logprobs: token_ids must be [rows]");
    check(0 <= k && k <= vocab, "logprobs: k must be at most the vocabulary");
    const int64_t* own = pointer<int64_t>(token_ids, "token_ids");
    for (int64_t row = 0; row < rows; ++row) check(0 <= own[row] && own[row] < vocab, "logprobs: no such token");
    Tensor ids = torch::stable::new_empty(token_ids, {rows, 1 + k}), ranks = torch::stable::new_empty(token_ids, {rows});
    Tensor found = torch::stable::new_empty(logits, {rows, 1 + k}, ScalarType::Float);
    int64_t* to_ids = mutable_pointer<int64_t>(ids, "ids");
    int64_t* to_ranks = mutable_pointer<int64_t>(ranks, "ranks");
    float* to = mutable_pointer<float>(found, "logprobs");
    const auto run = [&](const auto* x) {
        run_tasks(rows, [=](int64_t row) {
            const int64_t at = row * (1 + k);
            to_ranks[row] = logprobs_row(x + row * vocab, vocab, own[row], k, to_ids + at, to + at);
        });
    };
    if (type_of(logits) == ScalarType::BFloat16) {
        run(pointer<bf16>(logits, "logits"));
    } else {
        run(pointer<float>(logits, "logits"));
    }
    return {ids, found, ranks};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(powerband, m) {
    m.def("sample(Tensor logits, Tensor params, Tensor numbers, Tensor? penalties, Tensor? offsets, Tensor? tokens, "
          "Tensor? biases, Tensor? masks) -> (Tensor, Tensor)");
    m.def("logprobs(Tensor logits, Tensor token_ids, int k) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(powerband, CPU, m) {
    m.impl("sample", TORCH_BOX(&sample));
    m.impl("logprobs", TORCH_BOX(&logprobs));
}

}  // namespace powerband
