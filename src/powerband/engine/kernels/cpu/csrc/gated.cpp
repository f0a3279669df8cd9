// The gated MLP's middle: activation(gate) * up in float32, rounded once. A row of gate_up is [gate | up].
#include "elementwise.h"
#include "output.h"

namespace powerband {
namespace {

// About 20 microseconds of work: less is not worth waking a thread.
constexpr int64_t kElementsPerTask = 1 << 15;

enum class Activation : int64_t { kSilu, kGeluTanh, kGelu };

POWERBAND_INLINE f32x16 silu(f32x16 x) { return x / (1.0f + exp(-x)); }

// 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2 z)), with z = sqrt(2 / pi) (x + 0.044715 x^3)
POWERBAND_INLINE f32x16 gelu_tanh(f32x16 x) {
    return x / (1.0f + exp(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

// x Phi(x), with Phi(-z) = erfc(z / sqrt 2) / 2 and, for z >= 0, erfc(z) = e^(-z^2) t p(t), t = 1 / (1 + 0.3275911 z): the
// form of Abramowitz and Stegun 7.1.26, with p fitted to a relative error of 1.1e-7 up to z = 9.5, where erfc is 0.
POWERBAND_INLINE f32x16 gelu(f32x16 x) {
    const f32x16 z = abs(x) * 0.70710678118654752f;
    const f32x16 t = 1.0f / (1.0f + 0.3275911f * z);
    f32x16 p = broadcast(-1.416645456e-1f);
    p = p * t + 4.988874897e-1f;
    p = p * t - 4.096168832e-1f;
    p = p * t + 4.565787299e-1f;
    p = p * t + 2.370672112e-2f;
    p = p * t + 2.064010266e-1f;
    p = p * t + 1.806494470e-1f;
    p = p * t + 1.850581237e-1f;
    const f32x16 tail = 0.5f * p * t * exp(-z * z);
    return x * select(as<i32x16>(x < broadcast(0.0f)), tail, 1.0f - tail);
}

template <Activation kActivation>
POWERBAND_INLINE f32x16 activated(f32x16 x) {
    if constexpr (kActivation == Activation::kSilu) return silu(x);
    if constexpr (kActivation == Activation::kGeluTanh) return gelu_tanh(x);
    if constexpr (kActivation == Activation::kGelu) return gelu(x);
}

template <class T, Activation kActivation>
void gated_part(const T* gate, const T* up, T* out, int64_t count) {
    const int64_t whole = count - count % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) store(out + i, activated<kActivation>(load(gate + i)) * load(up + i));
    if (const int64_t rest = count - whole)
        store(out + whole, activated<kActivation>(load(gate + whole, rest)) * load(up + whole, rest), rest);
}

// A task is some whole rows, or a part of a long one.
template <class T, Activation kActivation>
void gated_tasks(const T* from, T* to, int64_t rows, int64_t size) {
    const int64_t parts = std::max<int64_t>(1, ceil_div(size, kElementsPerTask));
    const int64_t part = ceil_div(size, parts * kLanes) * kLanes;
    const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(size, 1));
    run_tasks(ceil_div(rows, rows_per_task) * parts, [=](int64_t task) {
        const int64_t begin = task % parts * part, end = std::min(size, begin + part);
        const int64_t first = task / parts * rows_per_task;
        for (int64_t row = first; row < std::min(rows, first + rows_per_task) && begin < end; ++row) {
            const T* gate = from + row * 2 * size;
            gated_part<T, kActivation>(gate + begin, gate + size + begin, to + row * size + begin, end - begin);
        }
    });
}

template <class T>
void gated_as(const T* gate_up, T* out, int64_t rows, int64_t size, int64_t activation) {
    check(0 <= activation && activation <= 2, "gated: the activation is 0 (silu), 1 (gelu_tanh) or 2 (gelu)");
    switch (Activation{activation}) {
        case Activation::kSilu: return gated_tasks<T, Activation::kSilu>(gate_up, out, rows, size);
        case Activation::kGeluTanh: return gated_tasks<T, Activation::kGeluTanh>(gate_up, out, rows, size);
        case Activation::kGelu: return gated_tasks<T, Activation::kGelu>(gate_up, out, rows, size);
    }
}

Tensor gated(Tensor gate_up, int64_t activation) {
    check(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gated: gate_up must be [rows, 2 * size]");
    const int64_t rows = gate_up.size(0), size = gate_up.size(1) / 2;
    Tensor out = new_output(gate_up, {rows, size});
    if (type_of(gate_up) == ScalarType::Float) {
        gated_as(pointer<float>(gate_up, "gate_up"), mutable_pointer<float>(out, "out"), rows, size, activation);
    } else {
        gated_as(pointer<bf16>(gate_up, "gate_up"), mutable_pointer<bf16>(out, "out"), rows, size, activation);
    }
    return out;
}

}  // namespace

void gated_rows(const Activations& gate_up, int64_t activation, bf16* out) {
    gated_as(gate_up.data, out, gate_up.rows, gate_up.features / 2, activation);
}

STABLE_TORCH_LIBRARY_FRAGMENT(powerband, m) { m.def("gated(Tensor gate_up, int activation) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(powerband, CPU, m) { m.impl("gated", TORCH_BOX(&gated)); }

}  // namespace powerband
