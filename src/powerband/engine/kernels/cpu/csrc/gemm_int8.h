// Products of int8 rows and packed int8 weights, exact in int32, then scaled, biased and rounded to bf16.
//
//     weight   [panel of 16 columns][k / 4][16 columns][4]     one vector holds four k of sixteen columns
//     x        [row][k]                                         four k of a row are broadcast to all columns
//
// k is a multiple of 64 everywhere. VNNI multiplies unsigned by signed: there x is stored as x + 128, and 128 times the
// sum of each column is taken off at the end.
#pragma once

#include "argmax.h"
#include "quantize_rows.h"

namespace powerband {

constexpr int64_t kPanel = 16;    // columns
constexpr int64_t kPanelRow = 64;  // bytes: four k of sixteen columns

struct Int8Product {
    const int8_t* x;        // [rows][k]
    const float* x_scales;  // [rows]
    const int8_t* weight;   // [panels][k / 4][16][4]
    const float* scales;    // [columns]
    const int32_t* sums;    // [columns]: the sum of each column's weights
    const bf16* bias;       // [columns] or null
    bf16* out;              // [rows][stride]
    int64_t rows, columns, k, stride;
    bool add;  // to what is in out
    const LargestOfRows* largest = nullptr;  // takes the results instead of out

    const int8_t* panel(int64_t index) const { return weight + index * k * kPanel; }
    int64_t panels() const { return ceil_div(columns, kPanel); }
};

// A part of the result: rows [row, row_end) of the panels [panel, panel_end).
struct Part {
    int64_t row, row_end, panel, panel_end;
};

// What belongs to the columns of one panel.
struct PanelScales {
    f32x16 scales{}, bias{};
    i32x16 shift{};
    int64_t first, count;

    PanelScales(const Int8Product& product, int64_t panel, int32_t shift_by)
        : first(panel * kPanel), count(std::min(kPanel, product.columns - panel * kPanel)) {
        if (count == kPanel) {
            std::memcpy(&scales, product.scales + first, sizeof scales);
            if (shift_by != 0) std::memcpy(&shift, product.sums + first, sizeof shift);
        } else {
            std::memcpy(&scales, product.scales + first, count * sizeof(float));
            if (shift_by != 0) std::memcpy(&shift, product.sums + first, count * sizeof(int32_t));
        }
        shift *= shift_by;
        if (product.bias != nullptr) bias = load(product.bias + first, count);
    }
};

inline void finish(const Int8Product& product, const PanelScales& panel, int64_t row, i32x16 whole) {
    const f32x16 y = convert<f32x16>(whole - panel.shift) * (panel.scales * product.x_scales[row]) + panel.bias;
    if (product.largest != nullptr) return (*product.largest)(row, panel.first, y);
    bf16* to = product.out + row * product.stride + panel.first;
    if (panel.count == kPanel) {
        store(to, product.add ? load(to) + y : y);
    } else {
        store(to, product.add ? load(to, panel.count) + y : y, panel.count);
    }
}

inline int32_t four_bytes(const int8_t* p) {
    int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
}

// ---- sixteen sums at a time: add the products of four k of sixteen columns with the same four k of a row

#if defined(POWERBAND_AVX512_VNNI)

constexpr int8_t kFlip = static_cast<int8_t>(0x80);
constexpr int32_t kShift = 128;
constexpr int kMaxRows = 12, kManyPanels = 4, kManyPanelsRows = 6;

struct Weights {
    __m512i values;
    explicit Weights(const int8_t* p) : values(_mm512_loadu_si512(p)) {}
};
struct Sums {
    __m512i values = _mm512_setzero_si512();
    void add(const Weights& weights, int32_t x) {
        values = _mm512_dpbusd_epi32(values, _mm512_set1_epi32(x), weights.values);
    }
    i32x16 get() const { return as<i32x16>(values); }
};

#elif defined(__AVX2__)

// |w| * (x with the sign of w): both fit, and the sums of two products fit int16 (2 * 128 * 127), so nothing saturates.
constexpr int8_t kFlip = 0;
constexpr int32_t kShift = 0;
constexpr int kMaxRows = 4, kManyPanels = 1, kManyPanelsRows = 4;

struct Weights {
    __m256i values[2], magnitudes[2];
    explicit Weights(const int8_t* p) {
        for (int half = 0; half < 2; ++half) {
            values[half] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + half);
            magnitudes[half] = _mm256_abs_epi8(values[half]);
        }
    }
};
struct Sums {
    __m256i values[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    void add(const Weights& weights, int32_t x) {
        const __m256i row = _mm256_set1_epi32(x);
        for (int half = 0; half < 2; ++half) {
            const __m256i with_sign = _mm256_sign_epi8(row, weights.values[half]);
#ifdef __AVXVNNI__
            values[half] = _mm256_dpbusd_avx_epi32(values[half], weights.magnitudes[half], with_sign);
#else
            const __m256i pairs = _mm256_maddubs_epi16(weights.magnitudes[half], with_sign);
            values[half] = _mm256_add_epi32(values[half], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
        }
    }
    i32x16 get() const {
        i32x16 sums;
        std::memcpy(&sums, values, sizeof sums);
        return sums;
    }
};

#else

constexpr int8_t kFlip = 0;
constexpr int32_t kShift = 0;
constexpr int kMaxRows = 4, kManyPanels = 1, kManyPanelsRows = 4;

struct Weights {
    const int8_t* values;
    explicit Weights(const int8_t* p) : values(p) {}
};
struct Sums {
    i32x16 values{};
    void add(const Weights& weights, int32_t x) {
        int8_t row[4];
        std::memcpy(row, &x, sizeof row);
        for (int column = 0; column < kPanel; ++column)
            for (int i = 0; i < 4; ++i) values[column] += weights.values[column * 4 + i] * row[i];
    }
    i32x16 get() const { return values; }
};

#endif

// ---- blocks of Rows x Panels sums in registers

constexpr int64_t kPrefetchAhead = 4096;  // bytes of each panel; at its end, of the panel that comes next in its place

template <int Rows, int Panels>
void multiply_block(const Int8Product& product, int64_t row, int64_t panel) {
    // Each sum is a chain of dependent instructions: with few sums, two chains for even and odd k.
    constexpr int kChains = Rows * Panels <= 2 ? 4 : Rows * Panels <= 8 ? 2 : 1;
    const int64_t k = product.k, panel_bytes = k * kPanel;
    const int8_t* x = product.x + row * k;
    const int8_t* w = product.panel(panel);
    Sums sums[kChains][Rows][Panels];
    const auto run = [&](int64_t from, int64_t to, int64_t ahead) {
        for (int64_t i = from; i < to; i += 4 * kChains) {
            for (int chain = 0; chain < kChains; ++chain) {
                const int8_t* at = w + (i / 4 + chain) * kPanelRow;
                for (int p = 0; p < Panels; ++p) prefetch(at + p * panel_bytes + ahead);
                for (int p = 0; p < Panels; ++p) {
                    const Weights weights(at + p * panel_bytes);
                    for (int r = 0; r < Rows; ++r)
                        sums[chain][r][p].add(weights, four_bytes(x + r * k + i + chain * 4));
                }
            }
        }
    };
    const int64_t ahead = std::min(kPrefetchAhead, panel_bytes), turn = k - ahead / kPanel;
    run(0, turn, ahead);
    run(turn, k, ahead + (Panels - 1) * panel_bytes);
    for (int p = 0; p < Panels; ++p) {
        const PanelScales scales(product, panel + p, kShift);
        for (int r = 0; r < Rows; ++r) {
            i32x16 whole = sums[0][r][p].get();
            for (int chain = 1; chain < kChains; ++chain) whole += sums[chain][r][p].get();
            finish(product, scales, row + r, whole);
        }
    }
}

// Panels [panel, panel_end) for `Rows` rows, as many panels at a time as there are registers for.
template <int Rows>
void multiply_rows(const Int8Product& product, int64_t row, int64_t panel, int64_t panel_end) {
    // One row reads panel after panel, as they lie.
    constexpr int kPanels = Rows == 1 ? 1 : Rows <= kManyPanelsRows ? kManyPanels : std::max(1, kManyPanels / 2);
    for (; panel + kPanels <= panel_end; panel += kPanels) multiply_block<Rows, kPanels>(product, row, panel);
    if constexpr (kPanels > 1)
        for (; panel < panel_end; ++panel) multiply_block<Rows, 1>(product, row, panel);
}

template <int Rows = kMaxRows>
void multiply_some_rows(const Int8Product& product, int64_t rows, int64_t row, int64_t panel, int64_t panel_end) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return multiply_some_rows<Rows - 1>(product, rows, row, panel, panel_end);
    }
    multiply_rows<Rows>(product, row, panel, panel_end);
}

// A part of the product, on any processor: few panels at a time for all rows, so that they are read from memory once.
inline void multiply(const Int8Product& product, const Part& part) {
    const int64_t rows = part.row_end - part.row;
    const int64_t step = ceil_div(rows, ceil_div(rows, kMaxRows));  // blocks of nearly the same size
    const int64_t panels = rows <= kManyPanelsRows ? part.panel_end - part.panel : std::max(1, kManyPanels / 2);
    for (int64_t panel = part.panel; panel < part.panel_end; panel += panels)
        for (int64_t row = part.row; row < part.row_end; row += step)
            multiply_some_rows(product, std::min(step, part.row_end - row), row, panel,
                               std::min(panel + panels, part.panel_end));
}

}  // namespace powerband
