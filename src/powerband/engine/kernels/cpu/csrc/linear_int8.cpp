// Linear layers with int8 weights: rows of x are quantized per token, multiplied exactly, scaled and rounded to bf16.
#include <tuple>

#include "gemm_int8.h"
#include "gemm_int8_amx.h"
#include "linear.h"
#include "output.h"

namespace powerband {
namespace {

constexpr int64_t kMaxFeatures = 1 << 16;        // sums of 255 * 128 * k stay in int32
constexpr int64_t kTileThreshold = 5;            // from so many rows on tiles are faster than VNNI
constexpr int64_t kWeightBytesPerTask = 1 << 16;  // a few microseconds for few rows
constexpr int64_t kRowBytesPerTask = 3 << 18;    // rows that stay in the L2 while the weights pass by

int64_t padded_features(int64_t features) { return ceil_div(features, kQuantizePadding) * kQuantizePadding; }

// ---- packing

void check_packed(const Tensor& packed, int64_t out_features, int64_t in_features) {
    check(out_features >= 1 && in_features >= 1 && in_features <= kMaxFeatures, "int8: too many or no features");
    check(packed.dim() == 4 && packed.size(0) == ceil_div(out_features, kPanel) &&
              packed.size(1) == padded_features(in_features) / 4 && packed.size(2) == kPanel && packed.size(3) == 4,
          "int8: packed must be [out / 16, in / 4, 16, 4] with in padded to a multiple of 64");
}

// Calls each(panel's position of the four k of a column, position in values, how many of the four there are).
template <class F>
void for_each_four(int64_t panel, int64_t out_features, int64_t in_features, const F& each) {
    const int64_t k = padded_features(in_features);
    for (int64_t column = 0; column < kPanel; ++column) {
        const int64_t row = panel * kPanel + column;
        for (int64_t i = 0; i < k; i += 4) {
            const int64_t count = row < out_features ? std::clamp<int64_t>(in_features - i, 0, 4) : 0;
            each((panel * k + i) * kPanel + column * 4, row * in_features + i, count);
        }
    }
}

void pack_int8_out(Tensor values, Tensor packed) {
    check(values.dim() == 2, "pack_int8: values must be [out, in]");
    const int64_t out_features = values.size(0), in_features = values.size(1);
    check_packed(packed, out_features, in_features);
    const int8_t* from = pointer<int8_t>(values, "values");
    int8_t* to = mutable_pointer<int8_t>(packed, "packed");
    run_tasks(packed.size(0), [=](int64_t panel) {
        for_each_four(panel, out_features, in_features, [=](int64_t at, int64_t source, int64_t count) {
            int32_t four = 0;
            if (count == 4) {
                std::memcpy(&four, from + source, 4);
            } else if (count > 0) {
                std::memcpy(&four, from + source, count);
            }
            std::memcpy(to + at, &four, 4);
        });
    });
}

Tensor pack_int8(Tensor values) {
    check(values.dim() == 2, "pack_int8: values must be [out, in]");
    const int64_t panels = ceil_div(values.size(0), kPanel), fours = padded_features(values.size(1)) / 4;
    Tensor packed = torch::stable::new_empty(values, {panels, fours, kPanel, 4});
    pack_int8_out(values, packed);
    return packed;
}

Tensor unpack_int8(Tensor packed, int64_t out_features, int64_t in_features) {
    check_packed(packed, out_features, in_features);
    Tensor values = torch::stable::new_empty(packed, {out_features, in_features});
    const int8_t* from = pointer<int8_t>(packed, "packed");
    int8_t* to = mutable_pointer<int8_t>(values, "values");
    run_tasks(packed.size(0), [=](int64_t panel) {
        for_each_four(panel, out_features, in_features, [=](int64_t at, int64_t source, int64_t count) {
            if (count > 0) std::memcpy(to + source, from + at, count);
        });
    });
    return values;
}

// ---- the product

struct Operands {
    const Activations& x;
    const Tensor &packed, &scales, &sums;
    const std::optional<Tensor>& bias;
    int64_t out_features;
};

// The product without its result. x is quantized into this thread's scratch, in the form that `tiles` or VNNI takes.
Int8Product quantized(const Operands& operands, bool tiles) {
    thread_local Scratch<int8_t> values_scratch;
    thread_local Scratch<float> scales_scratch;
    const int64_t rows = operands.x.rows, in_features = operands.x.features, k = padded_features(in_features);
    const int64_t rows_with_memory = ceil_div(rows, 32) * 32;  // tiles read whole blocks of rows
    int8_t* values = values_scratch.get(rows_with_memory * k);
    float* scales = scales_scratch.get(rows);
    quantize_rows(operands.x.data, rows, in_features, values, k, scales, tiles ? 0 : kFlip);
    return Int8Product{
        .x = values,
        .x_scales = scales,
        .weight = pointer<int8_t>(operands.packed, "packed"),
        .scales = pointer<float>(operands.scales, "scales"),
        .sums = pointer<int32_t>(operands.sums, "sums"),
        .bias = pointer<bf16>(operands.bias, "bias"),
        .out = nullptr,
        .rows = rows,
        .columns = operands.out_features,
        .k = k,
        .stride = operands.out_features,
        .add = false,
    };
}

void check_operands(const Operands& o) {
    check_packed(o.packed, o.out_features, o.x.features);
    check(o.scales.dim() == 1 && o.scales.size(0) == o.out_features, "linear_int8: scales must be [out]");
    check(o.sums.dim() == 1 && o.sums.size(0) == o.out_features, "linear_int8: sums must be [out]");
    check(!o.bias || (o.bias->dim() == 1 && o.bias->size(0) == o.out_features), "linear_int8: bias must be [out]");
}

bool use_tiles(int64_t rows) { return rows >= kTileThreshold && amx_permitted(); }

void multiply_part(const Int8Product& product, const Part& part, bool tiles) {
#ifdef POWERBAND_AMX
    if (tiles) return multiply_by_tiles(product, part);
#endif
    multiply(product, part);
}

// How the result is shared out: tasks of some rows by some panels.
struct Shares {
    int64_t all_rows, all_panels, rows, panels, across, tasks;

    explicit Shares(const Int8Product& product)
        : all_rows(product.rows),
          all_panels(product.panels()),
          rows(std::max<int64_t>(32, kRowBytesPerTask / product.k / 32 * 32)),
          panels(panels_per_task(product)),
          across(ceil_div(all_panels, panels)),
          tasks(ceil_div(all_rows, rows) * across) {}

    // One row takes panel after panel, more rows four at a time.
    static int64_t panels_per_task(const Int8Product& product) {
        const int64_t fit = kWeightBytesPerTask / (product.k * kPanel);
        return product.rows == 1 ? std::max<int64_t>(1, fit) : std::max<int64_t>(4, fit / 4 * 4);
    }

    Part part(int64_t task) const {
        const int64_t row = task / across * rows, panel = task % across * panels;
        return {row, std::min(all_rows, row + rows), panel, std::min(all_panels, panel + panels)};
    }
};

Tensor linear_int8(Tensor x, Tensor packed, Tensor scales, Tensor sums, std::optional<Tensor> bias,
                   int64_t out_features) {
    const Activations rows = activations(x);
    check_packed(packed, out_features, rows.features);  // before memory is taken for so many
    Tensor out = new_output(x, {rows.rows, out_features});
    multiply_int8(rows, packed, scales, sums, bias, {mutable_pointer<bf16>(out, "out"), out_features, false});
    return out;
}

void linear_int8_add(Tensor x, Tensor packed, Tensor scales, Tensor sums, std::optional<Tensor> bias, Tensor residual) {
    const Activations rows = activations(x);
    multiply_int8(rows, packed, scales, sums, bias, residual_of(residual, rows));
}

// ids int64 [rows] and values float32 [rows] of the largest results.
std::tuple<Tensor, Tensor> argmax_int8(Tensor x, Tensor packed, Tensor scales, Tensor sums) {
    const std::optional<Tensor> no_bias;
    check(scales.dim() == 1 && scales.size(0) < 1 << 30, "argmax_int8: scales must be [out], of fewer than 2^30");
    const Activations from = activations(x);
    const Operands operands{from, packed, scales, sums, no_bias, scales.size(0)};
    check_operands(operands);
    const int64_t rows = from.rows;
    Tensor ids = torch::stable::new_empty(x, {rows}, ScalarType::Long);
    Tensor values = torch::stable::new_empty(x, {rows}, ScalarType::Float);
    if (rows == 0) return {ids, values};
    const bool tiles = use_tiles(rows);
    const Int8Product product = quantized(operands, tiles);
    const Shares shares(product);
    thread_local Scratch<Largest> scratch;
    Largest* found = scratch.get(shares.across * rows);  // [across][rows]
    run_tasks(shares.tasks, [&](int64_t task) {
        const Part part = shares.part(task);
        const LargestOfRows largest(nullptr, part.row, part.row_end - part.row, product.columns);
        Int8Product mine = product;
        mine.largest = &largest;
        multiply_part(mine, part, tiles);
        for (int64_t row = part.row; row < part.row_end; ++row) found[task % shares.across * rows + row] = largest.of(row);
    });
    int64_t* to_ids = mutable_pointer<int64_t>(ids, "ids");
    float* to_values = mutable_pointer<float>(values, "values");
    for (int64_t row = 0; row < rows; ++row) {
        Largest best = found[row];
        for (int64_t i = 1; i < shares.across; ++i) best.take(found[i * rows + row]);
        to_ids[row] = best.column;
        to_values[row] = best.value;
    }
    return {ids, values};
}

}  // namespace

void multiply_int8(const Activations& x, const Tensor& packed, const Tensor& scales, const Tensor& sums,
                   const std::optional<Tensor>& bias, const Result& result) {
    const Operands operands{x, packed, scales, sums, bias, result.features};
    check_operands(operands);
    if (x.rows == 0) return;
    const bool tiles = use_tiles(x.rows);
    Int8Product product = quantized(operands, tiles);
    product.out = result.data;
    product.add = result.add;
    const Shares shares(product);
    run_tasks(shares.tasks, [&](int64_t task) { multiply_part(product, shares.part(task), tiles); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(powerband, m) {
    m.def("pack_int8(Tensor values) -> Tensor");
    m.def("pack_int8_out(Tensor values, Tensor(a!) packed) -> ()");
    m.def("unpack_int8(Tensor packed, int out_features, int in_features) -> Tensor");
    m.def("linear_int8(Tensor x, Tensor packed, Tensor scales, Tensor sums, Tensor? bias, int out_features) -> Tensor");
    m.def(
        "linear_int8_add(Tensor x, Tensor packed, Tensor scales, Tensor sums, Tensor? bias, Tensor(a!) residual) -> ()");
    m.def("argmax_int8(Tensor x, Tensor packed, Tensor scales, Tensor sums) -> (Tensor ids, Tensor values)");
}
STABLE_TORCH_LIBRARY_IMPL(powerband, CPU, m) {
    m.impl("pack_int8", TORCH_BOX(&pack_int8));
    m.impl("pack_int8_out", TORCH_BOX(&pack_int8_out));
    m.impl("unpack_int8", TORCH_BOX(&unpack_int8));
    m.impl("linear_int8", TORCH_BOX(&linear_int8));
    m.impl("linear_int8_add", TORCH_BOX(&linear_int8_add));
    m.impl("argmax_int8", TORCH_BOX(&argmax_int8));
}

}  // namespace powerband
