// RMSNorm of rows, with the residual's sum before it: each row is read and written once.
#include "common.h"

namespace powerband {
namespace {

// About 20 microseconds of work: less is not worth waking a thread.
constexpr int64_t kElementsPerTask = 1 << 16;

// Stores v and returns what was stored.
POWERBAND_INLINE f32x16 store_rounded(float* p, f32x16 v, auto... count) {
    store(p, v, count...);
    return v;
}

POWERBAND_INLINE f32x16 store_rounded(bf16* p, f32x16 v, auto... count) {
    const f32x16 rounded = widen(narrow(v));
    store(p, rounded, count...);
    return rounded;
}

template <class T, class W>
void norm_row(const T* x, T* residual, const W* weight, T* out, int64_t size, float eps) {
    const T* values = residual != nullptr ? residual : x;
    f32x16 squares{};
    const auto gather = [&](int64_t i, auto... count) {
        f32x16 v = load(x + i, count...);
        if (residual != nullptr) v = store_rounded(residual + i, v + load(residual + i, count...), count...);
        squares += v * v;
    };
    const int64_t whole = size - size % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) gather(i);
    if (whole < size) gather(whole, size - whole);
    const float inverse_rms = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
    const auto scale = [&](int64_t i, auto... count) {
        store(out + i, load(values + i, count...) * inverse_rms * load(weight + i, count...), count...);
    };
    for (int64_t i = 0; i < whole; i += kLanes) scale(i);
    if (whole < size) scale(whole, size - whole);
}

template <class T, class W>
void norm_rows(const Tensor& x, std::optional<Tensor>& residual, const Tensor& weight, Tensor& out, float eps) {
    const int64_t size = x.size(-1), rows = size ? x.numel() / size : 0;
    const T* from = pointer<T>(x, "x");
    T* sum = residual ? mutable_pointer<T>(*residual, "residual") : nullptr;
    const W* weights = pointer<W>(weight, "weight");
    T* to = mutable_pointer<T>(out, "out");
    const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(size, 1));
    run_tasks(ceil_div(rows, rows_per_task), [=](int64_t task) {
        for (int64_t row = task * rows_per_task; row < std::min(rows, (task + 1) * rows_per_task); ++row)
            norm_row(from + row * size, sum ? sum + row * size : nullptr, weights, to + row * size, size, eps);
    });
}

Tensor rms_norm(Tensor x, std::optional<Tensor> residual, Tensor weight, double eps) {
    check(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1), "rms_norm: weight must be as long as a row");
    check(!residual || (residual->numel() == x.numel() && residual->size(-1) == x.size(-1)),
          "rms_norm: residual must have the shape of x");
    Tensor out = torch::stable::empty_like(x);
    const bool wide = type_of(weight) == ScalarType::Float;
    if (type_of(x) == ScalarType::Float) {
        norm_rows<float, float>(x, residual, weight, out, eps);
    } else if (wide) {
        norm_rows<bf16, float>(x, residual, weight, out, eps);
    } else {
        norm_rows<bf16, bf16>(x, residual, weight, out, eps);
    }
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(powerband, m) {
    m.def("rms_norm(Tensor x, Tensor(a!)? residual, Tensor weight, float eps) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(powerband, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }

}  // namespace powerband
