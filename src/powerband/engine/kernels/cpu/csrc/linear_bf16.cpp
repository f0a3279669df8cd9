// Products with bf16 weights that were packed once: x @ weight.T + bias, in float32 until the result is rounded.
// Few rows read the weights at the memory's speed; many rows run in AMX tiles where there are any.
#include <algorithm>
#include <tuple>

#include "common.h"
#include "gemm_bf16.h"
#include "argmax.h"
#include "linear.h"
#include "linear_epilogue.h"
#include "output.h"
#include "transpose.h"

namespace powerband {
namespace {

constexpr int64_t kPanel = 16;
constexpr int64_t kRowBlockBytes = 768 << 10;   // of x: stays in the second-level cache beside two pairs of panels
constexpr int64_t kTaskBytes = 64 << 10;        // of weights: some 5 us of the memory's time for a thread
constexpr int64_t kTasksPerThread = 8;          // where tasks are large: a late thread costs one eighth of its part
constexpr int64_t kMaxPairs = 16;               // of panels per task

// [columns, k] in panels: packed[column / 16][k / 2][column % 16][k % 2]
struct Panels {
    const bf16* data;
    int64_t columns, k;  // k as packed

    int64_t pairs() const { return ceil_div(columns, 2 * kPanel); }
    int64_t pair_size() const { return 2 * kPanel * k; }
    PanelPair pair(int64_t i) const {
        const bf16* left = data + i * pair_size();
        return {left, (2 * i + 1) * kPanel < columns ? left + kPanel * k : left};
    }
};

// ---- packing

void pack_panel(const bf16* weight, int64_t columns, int64_t k, int64_t panel, bf16* out) {
    const int64_t present = std::min(kPanel, columns - panel * kPanel), pairs = padded_k(k) / 2;
    const bf16* from = weight + panel * kPanel * k;
    constexpr int64_t kBlock = 16;  // a cache line of each column at a time
    if (present < kPanel || k != pairs * 2) std::fill(out, out + pairs * 2 * kPanel, bf16{0});
    const int64_t whole = present == kPanel ? k / (2 * kBlock) * kBlock : 0;
    transpose_words(from, k * sizeof(bf16), whole, out);
    for (int64_t block = whole; block < pairs; block += kBlock)
        for (int64_t column = 0; column < present; ++column)
            for (int64_t pair = block; pair < std::min(block + kBlock, pairs); ++pair)
                if (pair * 2 < k)
                    std::memcpy(out + (pair * kPanel + column) * 2, from + column * k + pair * 2,
                                pair * 2 + 1 < k ? 2 * sizeof(bf16) : sizeof(bf16));
}

void check_packed(const Tensor& packed, int64_t columns, int64_t k) {
    check(packed.dim() == 4 && packed.size(2) == kPanel && packed.size(3) == 2,
          "packed must be [panels, k / 2, 16, 2]");
    check(columns >= 0 && packed.size(0) == ceil_div(columns, kPanel), "packed must have one panel per 16 columns");
    check(k >= 0 && packed.size(1) * 2 == padded_k(k), "packed must be as deep as x is wide");
}

void pack_bf16_out(Tensor weight, Tensor packed) {
    check(weight.dim() == 2, "weight must be [out_features, in_features]");
    const int64_t columns = weight.size(0), k = weight.size(1);
    check_packed(packed, columns, k);
    const bf16* from = pointer<bf16>(weight, "weight");
    bf16* to = mutable_pointer<bf16>(packed, "packed");
    run_tasks(ceil_div(columns, kPanel), [=](int64_t panel) {
        pack_panel(from, columns, k, panel, to + panel * kPanel * padded_k(k));
    });
}

Tensor pack_bf16(Tensor weight) {
    check(weight.dim() == 2, "weight must be [out_features, in_features]");
    Tensor packed = torch::stable::new_empty(
        weight, {ceil_div(weight.size(0), kPanel), padded_k(weight.size(1)) / 2, kPanel, 2});
    pack_bf16_out(weight, packed);
    return packed;
}

Tensor unpack_bf16(Tensor packed, int64_t columns, int64_t k) {
    check_packed(packed, columns, k);
    Tensor weight = torch::stable::new_empty(packed, {columns, k});
    const bf16* from = pointer<bf16>(packed, "packed");
    bf16* to = mutable_pointer<bf16>(weight, "weight");
    run_tasks(columns, [=](int64_t column) {
        const bf16* panel = from + (column / kPanel) * kPanel * padded_k(k) + column % kPanel * 2;
        for (int64_t i = 0; i < k; ++i) to[column * k + i] = panel[i / 2 * kPanel * 2 + i % 2];
    });
    return weight;
}

// ---- the product

// x as the panels want it: as it is, or with zeros up to a multiple of kStep.
struct Input {
    const bf16* data;
    int64_t rows, stride;
};

Input input(const Activations& x, int64_t k) {
    thread_local Scratch<bf16> scratch;
    if (x.features == k) return {x.data, x.rows, k};
    bf16* padded = scratch.get(x.rows * k);
    for (int64_t row = 0; row < x.rows; ++row) {
        std::copy(x.data + row * x.features, x.data + (row + 1) * x.features, padded + row * k);
        std::fill(padded + row * k + x.features, padded + (row + 1) * k, bf16{0});
    }
    return {padded, x.rows, k};
}

// How the result is shared out. A task is some rows by some pairs of panels; those that read the same weights follow
// each other.
struct Shares {
    int64_t rows, row_blocks, pairs, tasks;

    Shares(int64_t all_rows, const Panels& panels) {
        const int64_t most = std::max<int64_t>(32, kRowBlockBytes / (2 * panels.k + 1) / 32 * 32);
        row_blocks = ceil_div(all_rows, most);
        rows = ceil_div(ceil_div(all_rows, std::max<int64_t>(row_blocks, 1)), 32) * 32;
        const int64_t pair_bytes = panels.pair_size() * static_cast<int64_t>(sizeof(bf16)), all = panels.pairs();
        const int64_t share = all * row_blocks / (kTasksPerThread * torch::stable::get_num_threads());
        pairs = row_blocks > 1 ? std::clamp<int64_t>(share, 1, kMaxPairs)
                               : std::clamp<int64_t>(kTaskBytes / std::max<int64_t>(pair_bytes, 1), 1, kMaxPairs);
        tasks = row_blocks * ceil_div(all, pairs);
    }

    int64_t first_row(int64_t task) const { return task % row_blocks * rows; }
    int64_t rows_of(int64_t task, int64_t all_rows) const { return std::min(rows, all_rows - first_row(task)); }
};

template <class Epilogue>
void multiply_share(
    const Input& x, const Panels& panels, const Shares& shares, int64_t task, const Epilogue& epilogue) {
    const int64_t first = task / shares.row_blocks * shares.pairs;
    const int64_t end = std::min(first + shares.pairs, panels.pairs());
    const PanelProduct product(x.data, x.stride, shares.first_row(task), shares.rows_of(task, x.rows), panels.k);
    for (int64_t i = first; i < end; ++i) {
        // After this task's last pair comes, for this thread, most likely the next task's first.
        const bf16* next = i + 1 < panels.pairs() ? panels.data + (i + 1) * panels.pair_size() : nullptr;
        product.multiply(panels.pair(i), next, i * 2 * kPanel, epilogue);
    }
}

template <class Epilogue>
void multiply(const Input& x, const Panels& panels, const Epilogue& epilogue) {
    const Shares shares(x.rows, panels);
    run_tasks(shares.tasks, [&](int64_t task) { multiply_share(x, panels, shares, task, epilogue); });
}

Panels checked(const Activations& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t columns) {
    check_packed(packed, columns, x.features);
    check(!bias || (bias->dim() == 1 && bias->size(0) == columns), "bias must be [out_features]");
    return {pointer<bf16>(packed, "packed"), columns, packed.size(1) * 2};
}

Tensor linear_bf16(Tensor x, Tensor packed, std::optional<Tensor> bias, int64_t columns) {
    const Activations rows = activations(x);
    check_packed(packed, columns, rows.features);  // before memory is taken for so many
    Tensor out = new_output(x, {rows.rows, columns});
    multiply_bf16(rows, packed, bias, {mutable_pointer<bf16>(out, "out"), columns, false});
    return out;
}

void linear_bf16_add(Tensor x, Tensor packed, std::optional<Tensor> bias, Tensor residual) {
    const Activations rows = activations(x);
    multiply_bf16(rows, packed, bias, residual_of(residual, rows));
}

std::tuple<Tensor, Tensor> argmax_bf16(Tensor x, Tensor packed, int64_t columns) {
    check(columns > 0 && columns < 1 << 30, "out_features must be 1 to 2^30");
    const Panels panels = checked(activations(x), packed, std::nullopt, columns);
    const Input rows = input(activations(x), panels.k);
    Tensor ids = torch::stable::new_empty(x, {rows.rows}, ScalarType::Long);
    Tensor values = torch::stable::new_empty(x, {rows.rows}, ScalarType::Float);
    int64_t* to_ids = mutable_pointer<int64_t>(ids, "ids");
    float* to_values = mutable_pointer<float>(values, "values");
    const Shares shares(rows.rows, panels);
    thread_local Scratch<Largest> scratch;
    Largest* found = scratch.get(shares.tasks * shares.rows);  // [tasks][rows]
    run_tasks(shares.tasks, [&](int64_t task) {
        const int64_t first = shares.first_row(task), count = shares.rows_of(task, rows.rows);
        const LargestOfRows largest(nullptr, first, count, columns);
        multiply_share(rows, panels, shares, task, largest);
        for (int64_t row = 0; row < count; ++row) found[task * shares.rows + row] = largest.of(first + row);
    });
    for (int64_t row = 0; row < rows.rows; ++row) {
        const int64_t block = row / shares.rows;
        Largest best = found[block * shares.rows + row % shares.rows];
        for (int64_t task = block; task < shares.tasks; task += shares.row_blocks)
            best.take(found[task * shares.rows + row % shares.rows]);
        to_ids[row] = best.column;
        to_values[row] = best.value;
    }
    return {ids, values};
}

}  // namespace

void multiply_bf16(const Activations& x, const Tensor& packed, const std::optional<Tensor>& bias, const Result& result) {
    const Panels panels = checked(x, packed, bias, result.features);
    const StoreRows store{pointer<bf16>(bias, "bias"), result.data, result.features};
    if (result.add) {
        multiply(input(x, panels.k), panels, AddRows{store});
    } else {
        multiply(input(x, panels.k), panels, store);
    }
}

STABLE_TORCH_LIBRARY_FRAGMENT(powerband, m) {
    m.def("pack_bf16(Tensor weight) -> Tensor");
    m.def("pack_bf16_out(Tensor weight, Tensor(a!) packed) -> ()");
    m.def("unpack_bf16(Tensor packed, int out_features, int in_features) -> Tensor");
    m.def("linear_bf16(Tensor x, Tensor packed, Tensor? bias, int out_features) -> Tensor");
    m.def("linear_bf16_add(Tensor x, Tensor packed, Tensor? bias, Tensor(a!) residual) -> ()");
    m.def("argmax_bf16(Tensor x, Tensor packed, int out_features) -> (Tensor ids, Tensor values)");
}
STABLE_TORCH_LIBRARY_IMPL(powerband, CPU, m) {
    m.impl("pack_bf16", TORCH_BOX(&pack_bf16));
    m.impl("pack_bf16_out", TORCH_BOX(&pack_bf16_out));
    m.impl("unpack_bf16", TORCH_BOX(&unpack_bf16));
    m.impl("linear_bf16", TORCH_BOX(&linear_bf16));
    m.impl("linear_bf16_add", TORCH_BOX(&linear_bf16_add));
    m.impl("argmax_bf16", TORCH_BOX(&argmax_bf16));
}

}  // namespace powerband
