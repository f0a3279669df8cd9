// Products with int4 weights, 16 columns at a time in the layout of int4_dot.h.
#include <algorithm>

#include "int4_dot.h"
#include "int4_expand.h"
#include "linear.h"
#include "linear_epilogue.h"
#include "output.h"
#include "scratch.h"

namespace powerband {
namespace {

constexpr int64_t kBytesPerTask = 1 << 15;       // of weights, for one row
constexpr int64_t kRowsForExpansion = 24;        // from so many rows on tiles win against vectors (measured)
constexpr int64_t kRowBytesPerTask = 768 << 10;  // of x: stays in the second-level cache beside the panels
constexpr int64_t kPanelBytesPerTask = 512 << 10;  // of expanded weights

#if defined(POWERBAND_AVX512_VNNI)
constexpr int kMaxRows = 8, kMaxPanels = 2;  // 16 sums, 4 operands of weights and 2 of activations in 32 registers
#elif defined(__AVX2__)
constexpr int kMaxRows = 4, kMaxPanels = 1;
#else
constexpr int kMaxRows = 1, kMaxPanels = 1;
#endif

// out (or residual +=) = x * weights + bias, rounded once.
struct Product {
    Int4Panels weights;
    GroupedRows x;
    int64_t rows, columns;
    const bf16* bias;
    bf16* out;
    bool add;
};

// ---- the product

void finish(const Product& product, int64_t row, int64_t panel, f32x16 v) {
    const int64_t column = panel * kLanes, count = std::min<int64_t>(kLanes, product.columns - column);
    bf16* out = product.out + row * product.columns + column;
    const auto write = [&](auto... lanes) {
        if (product.bias != nullptr) v += load(product.bias + column, lanes...);
        if (product.add) v += load(out, lanes...);
        store(out, v, lanes...);
    };
    if (count == kLanes) {
        write();
    } else {
        write(count);
    }
}

template <int ROWS, int PANELS>
void multiply(const Product& product, int64_t panel, int64_t row, int64_t count) {
    if constexpr (ROWS > 1) {
        if (count < ROWS) return multiply<ROWS - 1, PANELS>(product, panel, row, count);
    }
    f32x16 acc[ROWS][PANELS];
    int4::dot<ROWS, PANELS>(product.weights, panel, product.x, row, acc);
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p) finish(product, row + r, panel + p, acc[r][p]);
}

// All rows of some panels, in blocks of nearly equal numbers of rows.
void multiply_panels(const Product& product, int64_t begin, int64_t end) {
    const int64_t rows_at_once = ceil_div(product.rows, ceil_div(product.rows, kMaxRows));
    const auto all_rows = [&](const auto& multiply_rows) {
        for (int64_t row = 0; row < product.rows; row += rows_at_once)
            multiply_rows(row, std::min(rows_at_once, product.rows - row));
    };
    int64_t panel = begin;
    if (product.rows > 1)  // a single row streams one panel at a time
        for (; panel + kMaxPanels <= end; panel += kMaxPanels)
            all_rows([&](int64_t row, int64_t count) { multiply<kMaxRows, kMaxPanels>(product, panel, row, count); });
    for (; panel < end; ++panel)
        all_rows([&](int64_t row, int64_t count) { multiply<kMaxRows, 1>(product, panel, row, count); });
}

void quantize_rows(const bf16* x, int64_t rows, int64_t depth, int64_t group_size, int8_t* values, int64_t stride,
                   float* scales, int32_t* sums) {
    const int64_t groups = ceil_div(depth, group_size);
    const int64_t rows_per_task = std::max<int64_t>(1, (1 << 14) / depth);
    run_tasks(ceil_div(rows, rows_per_task), [=](int64_t task) {
        for (int64_t row = task * rows_per_task; row < std::min(rows, (task + 1) * rows_per_task); ++row) {
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t k = g * group_size, at = row * groups + g;
                quantize_group(x + row * depth + k, std::min(group_size, depth - k), values + row * stride + k,
                               scales + at, sums + at);
            }
            std::memset(values + row * stride + depth, 0, stride - depth);
        }
    });
}

// Few rows, or no tiles: activations as int8.
void compute_in_integers(Product& product, const bf16* x, int64_t depth, int64_t group_size) {
    static thread_local Scratch<int8_t> scratch;
    const int64_t rows = product.rows, groups = product.weights.groups;
    const int64_t stride = ceil_div(depth, 64) * 64;
    int8_t* values = scratch.get(rows * (stride + groups * 8));
    auto* scales = reinterpret_cast<float*>(values + rows * stride);
    auto* sums = reinterpret_cast<int32_t*>(scales + rows * groups);
    quantize_rows(x, rows, depth, group_size, values, stride, scales, sums);
    product.x = GroupedRows{values, scales, sums, stride, groups};
    const int64_t panels = ceil_div(product.columns, kLanes);
    const int64_t bytes = product.weights.blocks * kBlockBytes * std::max<int64_t>(1, rows / 4);
    const int64_t panels_per_task = std::max<int64_t>(rows == 1 ? 1 : 2, kBytesPerTask / bytes / 2 * 2);
    run_tasks(ceil_div(panels, panels_per_task), [&](int64_t task) {
        const int64_t begin = task * panels_per_task;
        multiply_panels(product, begin, std::min(panels, begin + panels_per_task));
    });
}

#ifdef POWERBAND_AMX
// Many rows: some panels at a time are expanded to bf16 and multiplied in tiles. Both they and the rows that meet them
// stay in the second-level cache: were the panels fewer, all of x would be read again for each few columns.
void compute_in_tiles(const Product& product, const bf16* x, int64_t depth) {
    const int64_t panels = ceil_div(product.columns, kLanes), panel_size = depth * kLanes;
    const int64_t rows_per_task = std::max<int64_t>(32, kRowBytesPerTask / (2 * depth) / 32 * 32);
    const int64_t panels_per_task = std::max<int64_t>(4, kPanelBytesPerTask / (2 * panel_size) / 2 * 2);
    const StoreRows store{product.bias, product.out, product.columns};
    run_tasks(ceil_div(panels, panels_per_task), [=](int64_t task) {
        static thread_local Scratch<bf16> scratch;
        const int64_t begin = task * panels_per_task, end = std::min(panels, begin + panels_per_task);
        bf16* expanded = scratch.get((end - begin) * panel_size);
        for (int64_t panel = begin; panel < end; ++panel)
            int4::expand_panel(product.weights, panel, expanded + (panel - begin) * panel_size);
        for (int64_t row = 0; row < product.rows; row += rows_per_task) {
            const PanelProduct tiles(x, depth, row, std::min(rows_per_task, product.rows - row), depth);
            for (int64_t panel = begin; panel < end; panel += 2) {
                const bf16* first = expanded + (panel - begin) * panel_size;
                const PanelPair pair{first, panel + 1 < end ? first + panel_size : first};
                if (product.add) {
                    tiles.multiply(pair, nullptr, panel * kLanes, AddRows{store});
                } else {
                    tiles.multiply(pair, nullptr, panel * kLanes, store);
                }
            }
        }
    });
}
#endif

void compute(Product& product, const bf16* x, int64_t depth, int64_t group_size) {
#ifdef POWERBAND_AMX
    if (product.rows >= kRowsForExpansion && depth % kStep == 0 && amx_permitted())
        return compute_in_tiles(product, x, depth);
#endif
    compute_in_integers(product, x, depth, group_size);
}

// ---- operators

Product checked(const Activations& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                const std::optional<Tensor>& bias, int64_t columns, int64_t group_size) {
    check(packed.dim() == 4 && scales.dim() == 3, "linear_int4: packed and scales have 4 and 3 axes");
    const int64_t depth = x.features, panels = packed.size(0), blocks = packed.size(1);
    check(depth > 0 && columns > 0 && panels == ceil_div(columns, kLanes), "linear_int4: packed must have out_features");
    check(blocks == ceil_div(depth, kBlockDepth) && packed.size(2) == kLanes && packed.size(3) == 4,
          "linear_int4: packed must be as deep as x is wide");
    check(group_size > 0 && (group_size % kBlockDepth == 0 || group_size >= depth),
          "linear_int4: group_size must be a multiple of 8, or all of a row");
    const int64_t groups = ceil_div(depth, group_size);
    check(scales.size(0) == panels && scales.size(1) == groups && scales.size(2) == kLanes,
          "linear_int4: scales must be [panels, groups, 16]");
    check(!zeros || (zeros->dim() == 3 && zeros->size(0) == panels && zeros->size(1) == groups &&
                     zeros->size(2) == kLanes),
          "linear_int4: zeros must have the shape of scales");
    check(!bias || (bias->dim() == 1 && bias->size(0) == columns), "linear_int4: bias must have out_features");
    const Int4Panels weights{pointer<uint8_t>(packed, "packed"), pointer<float>(scales, "scales"),
                             pointer<uint8_t>(zeros, "zeros"), blocks, groups, ceil_div(group_size, kBlockDepth)};
    return Product{weights, {}, x.rows, columns, pointer<bf16>(bias, "bias"), nullptr, false};
}

Tensor linear_int4(Tensor x, Tensor packed, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> bias,
                   int64_t out_features, int64_t group_size) {
    const Activations rows = activations(x);
    checked(rows, packed, scales, zeros, bias, out_features, group_size);  // before memory is taken for so many
    Tensor out = new_output(x, {rows.rows, out_features});
    const Result result{mutable_pointer<bf16>(out, "out"), out_features, false};
    multiply_int4(rows, packed, scales, zeros, bias, group_size, result);
    return out;
}

void linear_int4_add(Tensor x, Tensor packed, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> bias,
                     int64_t out_features, int64_t group_size, Tensor residual) {
    const Activations rows = activations(x);
    const Result result = residual_of(residual, rows);
    checked(rows, packed, scales, zeros, bias, out_features, group_size);
    check(result.features == out_features, "residual must be [rows of x, out_features]");
    multiply_int4(rows, packed, scales, zeros, bias, group_size, result);
}

// values [columns][depth], 0 … 15. Columns and steps of K that fill the last panel and block are zero.
void pack(const uint8_t* values, int64_t columns, int64_t depth, uint8_t* packed) {
    const int64_t panels = ceil_div(columns, kLanes), blocks = ceil_div(depth, kBlockDepth);
    run_tasks(panels, [=](int64_t panel) {
        uint8_t* to = packed + panel * blocks * kBlockBytes;
        for (int64_t b = 0; b < blocks; ++b, to += kBlockBytes)
            for (int64_t i = 0; i < kBlockBytes; ++i) {
                const int64_t column = panel * kLanes + i / 4, k = b * kBlockDepth + i % 4;
                const uint8_t* from = values + column * depth + k;
                const bool inside = column < columns;
                const int low = inside && k < depth ? from[0] & 15 : 0;
                const int high = inside && k + 4 < depth ? from[4] & 15 : 0;
                to[i] = static_cast<uint8_t>(high << 4 | low);
            }
    });
}

void pack_int4_out(Tensor values, Tensor packed) {
    check(values.dim() == 2 && values.size(0) > 0 && values.size(1) > 0, "pack_int4: values must be [N, K]");
    const int64_t columns = values.size(0), depth = values.size(1);
    check(packed.dim() == 4 && packed.size(0) == ceil_div(columns, kLanes) &&
              packed.size(1) == ceil_div(depth, kBlockDepth) && packed.size(2) == kLanes && packed.size(3) == 4,
          "pack_int4: packed must be [panels, blocks, 16, 4]");
    pack(pointer<uint8_t>(values, "values"), columns, depth, mutable_pointer<uint8_t>(packed, "packed"));
}

Tensor pack_int4(Tensor values) {
    check(values.dim() == 2, "pack_int4: values must be [N, K]");
    Tensor packed = torch::stable::new_empty(
        values, {ceil_div(values.size(0), kLanes), ceil_div(values.size(1), kBlockDepth), kLanes, 4});
    pack_int4_out(values, packed);
    return packed;
}

Tensor unpack_int4(Tensor packed, int64_t columns, int64_t depth) {
    check(packed.dim() == 4 && columns > 0 && depth > 0 && packed.size(0) == ceil_div(columns, kLanes) &&
              packed.size(1) == ceil_div(depth, kBlockDepth) && packed.size(2) == kLanes && packed.size(3) == 4,
          "unpack_int4: packed must be [panels, blocks, 16, 4] of out_features and in_features");
    const uint8_t* from = pointer<uint8_t>(packed, "packed");
    Tensor values = torch::stable::new_empty(packed, {columns, depth});
    uint8_t* to = mutable_pointer<uint8_t>(values, "values");
    const int64_t blocks = packed.size(1);
    run_tasks(columns, [=](int64_t column) {
        const uint8_t* panel = from + column / kLanes * blocks * kBlockBytes + column % kLanes * 4;
        for (int64_t k = 0; k < depth; ++k) {
            const int byte = panel[k / kBlockDepth * kBlockBytes + k % 4];
            to[column * depth + k] = static_cast<uint8_t>(k % kBlockDepth < 4 ? byte & 15 : byte >> 4);
        }
    });
    return values;
}

}  // namespace

void multiply_int4(const Activations& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                   const std::optional<Tensor>& bias, int64_t group_size, const Result& result) {
    Product product = checked(x, packed, scales, zeros, bias, result.features, group_size);
    product.out = result.data;
    product.add = result.add;
    if (x.rows > 0) compute(product, x.data, x.features, std::min(group_size, x.features));
}

STABLE_TORCH_LIBRARY_FRAGMENT(powerband, m) {
    m.def("pack_int4(Tensor values) -> Tensor");
    m.def("pack_int4_out(Tensor values, Tensor(a!) packed) -> ()");
    m.def("unpack_int4(Tensor packed, int out_features, int in_features) -> Tensor");
    m.def("linear_int4(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, int out_features, "
          "int group_size) -> Tensor");
    m.def("linear_int4_add(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, int out_features, "
          "int group_size, Tensor(a!) residual) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(powerband, CPU, m) {
    m.impl("pack_int4", TORCH_BOX(&pack_int4));
    m.impl("pack_int4_out", TORCH_BOX(&pack_int4_out));
    m.impl("unpack_int4", TORCH_BOX(&unpack_int4));
    m.impl("linear_int4", TORCH_BOX(&linear_int4));
    m.impl("linear_int4_add", TORCH_BOX(&linear_int4_add));
}

}  // namespace powerband
