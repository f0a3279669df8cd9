// Weights on their way into memory: from bf16 to int8 or int4, and straight into the panels of their products.
// A task takes one panel of sixteen outputs: it quantizes them row by row, then puts their words side by side.
#include "common.h"
#include "quantize_rows.h"
#include "scratch.h"
#include "transpose.h"

namespace powerband {
namespace {

constexpr int64_t kPanel = 16;
constexpr int64_t kBlockDepth = 8;  // int4: inputs of one word

// ---- int8: packed[out / 16][in / 4][16][4], in padded to a multiple of 64

void quantize_int8_out(Tensor weight, Tensor packed, Tensor scales, Tensor sums) {
    check(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0, "quantize_int8: weight must be [out, in]");
    const int64_t outputs = weight.size(0), inputs = weight.size(1);
    const int64_t depth = ceil_div(inputs, kQuantizePadding) * kQuantizePadding;
    check(packed.dim() == 4 && packed.size(0) == ceil_div(outputs, kPanel) && packed.size(1) == depth / 4 &&
              packed.size(2) == kPanel && packed.size(3) == 4,
          "quantize_int8: packed must be [out / 16, in / 4, 16, 4] with in padded to a multiple of 64");
    check(scales.dim() == 1 && scales.size(0) == outputs && sums.dim() == 1 && sums.size(0) == outputs,
          "quantize_int8: scales and sums must be [out]");
    const bf16* from = pointer<bf16>(weight, "weight");
    int8_t* to = mutable_pointer<int8_t>(packed, "packed");
    float* scale = mutable_pointer<float>(scales, "scales");
    int32_t* sum = mutable_pointer<int32_t>(sums, "sums");
    run_tasks(packed.size(0), [=](int64_t panel) {
        static thread_local Scratch<int8_t> scratch;
        int8_t* values = scratch.get(kPanel * depth);
        for (int64_t i = 0; i < kPanel; ++i) {
            const int64_t row = panel * kPanel + i;
            int8_t* own = values + i * depth;
            if (row >= outputs) {
                std::memset(own, 0, depth);
                continue;
            }
            scale[row] = quantize_row(from + row * inputs, inputs, own, depth, 0);
            int32_t total = 0;
            for (int64_t k = 0; k < depth; ++k) total += own[k];
            sum[row] = total;
        }
        transpose_words(values, depth, depth / 4, to + panel * kPanel * depth);
    });
}

// ---- int4: packed[out / 16][in / 8][16][4], scales[out / 16][groups][16]

constexpr float kLowest = -8, kHighest = 7;
// Ends of the range that are tried, as fractions of the group's extreme, and how often the best step is refined.
constexpr int kRatios = 9, kRefinements = 2;
constexpr float kRatioStep = 0.05f;

struct Fit {
    float inverse = 0;  // of the step that the values were rounded with
    float scale = 0;    // that fits them best
    float merit = -1;   // squared length of the group less its squared error
};

// -8 … 7, to the nearest whole number.
POWERBAND_INLINE f32x16 rounded(f32x16 w, float inverse) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    return min(max(w * inverse, broadcast(kLowest)), broadcast(kHighest)) + round - round;
}

// Keeps whichever leaves less error: `best`, or values rounded with this step and scaled as fits them best.
void improve(const float* w, int64_t size, float step, Fit& best) {
    if (step == 0) return;
    const float inverse = 1 / step;
    f32x16 overlap{}, length{};
    for (int64_t i = 0; i < size; i += kLanes) {
        const f32x16 v = load(w + i), q = rounded(v, inverse);
        overlap += v * q;
        length += q * q;
    }
    const float along = sum(overlap), square = sum(length);
    const float scale = square > 0 ? along / square : 0;
    if (along * scale > best.merit) best = {inverse, scale, along * scale};
}

// Of one group, w [size] with size a multiple of 16 (zeros behind the last): whole numbers q, 0 … 15. Returns the scale.
float quantize_group(const float* w, int64_t size, float magnitude, uint8_t* q) {
    i32x16 reached{};
    for (int64_t i = 0; i < size; i += kLanes) reached = reached | (load(w + i) == broadcast(-magnitude));
    bool below = false;
    for (int i = 0; i < kLanes; ++i) below = below || reached[i] != 0;
    const float extreme = below ? -magnitude : magnitude;
    Fit best;
    for (int i = 0; i < kRatios; ++i) improve(w, size, extreme * (1 - kRatioStep * i) / kLowest, best);
    for (int i = 0; i < kRefinements; ++i) improve(w, size, best.scale, best);
    for (int64_t i = 0; i < size; i += kLanes) {
        const i8x16 values = convert<i8x16>(round_to_int(rounded(load(w + i), best.inverse) - kLowest));
        std::memcpy(q + i, &values, sizeof values);
    }
    return best.scale;
}

// One output: q [groups * group, padded], scales every 16 floats. A group that holds NaN or infinity has the scale NaN.
void quantize_output(const bf16* weight, int64_t inputs, int64_t group, uint8_t* q, float* wide, float* scales) {
    for (int64_t k = 0; k < inputs; k += group, scales += kPanel) {
        const int64_t count = std::min(group, inputs - k), size = ceil_div(count, kLanes) * kLanes;
        const float magnitude = largest_magnitude(weight + k, count);
        const bool finite = magnitude <= std::numeric_limits<float>::max();
        if (!finite || magnitude < kSmallestMagnitude) {
            std::memset(q + k, static_cast<int>(-kLowest), count);
            *scales = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
            continue;
        }
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) store(wide + i, load(weight + k + i));
        if (i < count) store(wide + i, load(weight + k + i, count - i));
        *scales = quantize_group(wide, size, magnitude, q + k);
    }
}

// Eight values per word: byte j holds value j, and value j + 4 in its upper half.
void pack_words(const uint8_t* q, int64_t blocks, uint32_t* words) {
    for (int64_t b = 0; b < blocks; ++b) {
        uint64_t eight;
        std::memcpy(&eight, q + b * kBlockDepth, sizeof eight);
        words[b] = static_cast<uint32_t>(eight) | static_cast<uint32_t>(eight >> 32) << 4;
    }
}

void quantize_int4_out(Tensor weight, int64_t group_size, Tensor packed, Tensor scales) {
    check(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0, "quantize_int4: weight must be [out, in]");
    check(group_size > 0, "quantize_int4: groups must not be empty");
    const int64_t outputs = weight.size(0), inputs = weight.size(1), panels = ceil_div(outputs, kPanel);
    const int64_t blocks = ceil_div(inputs, kBlockDepth), group = std::min(group_size, inputs);
    const int64_t groups = ceil_div(inputs, group);
    check(packed.dim() == 4 && packed.size(0) == panels && packed.size(1) == blocks && packed.size(2) == kPanel &&
              packed.size(3) == 4,
          "quantize_int4: packed must be [panels, blocks, 16, 4]");
    check(scales.dim() == 3 && scales.size(0) == panels && scales.size(1) == groups && scales.size(2) == kPanel,
          "quantize_int4: scales must be [panels, groups, 16]");
    const bf16* from = pointer<bf16>(weight, "weight");
    uint8_t* to = mutable_pointer<uint8_t>(packed, "packed");
    float* scale = mutable_pointer<float>(scales, "scales");
    const int64_t room = blocks * kBlockDepth + kLanes;  // a group's last vector may reach beyond the last block
    run_tasks(panels, [=](int64_t panel) {
        static thread_local Scratch<uint8_t> bytes;
        static thread_local Scratch<uint32_t> packed_rows;
        static thread_local Scratch<float> floats;
        uint8_t* q = bytes.get(room);
        uint32_t* words = packed_rows.get(kPanel * blocks);
        float* wide = floats.get(ceil_div(group, kLanes) * kLanes);
        for (int64_t i = 0; i < kPanel; ++i) {
            const int64_t row = panel * kPanel + i;
            float* own = scale + panel * groups * kPanel + i;
            if (row >= outputs) {
                std::memset(words + i * blocks, 0, blocks * kWordBytes);
                for (int64_t g = 0; g < groups; ++g) own[g * kPanel] = 0;
                continue;
            }
            quantize_output(from + row * inputs, inputs, group, q, wide, own);
            std::memset(q + inputs, 0, room - inputs);
            pack_words(q, blocks, words + i * blocks);
        }
        transpose_words(words, blocks * kWordBytes, blocks, to + panel * blocks * kPanel * kWordBytes);
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(powerband, m) {
    m.def("quantize_int8_out(Tensor weight, Tensor(a!) packed, Tensor(b!) scales, Tensor(c!) sums) -> ()");
    m.def("quantize_int4_out(Tensor weight, int group_size, Tensor(a!) packed, Tensor(b!) scales) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(powerband, CPU, m) {
    m.impl("quantize_int8_out", TORCH_BOX(&quantize_int8_out));
    m.impl("quantize_int4_out", TORCH_BOX(&quantize_int4_out));
}

}  // namespace powerband
