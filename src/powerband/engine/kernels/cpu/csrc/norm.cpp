// RMSNorm of rows. A row is read from memory and written once: for the second pass it is in the cache.
#include "common.h"
#include "output.h"

namespace powerband {
namespace {

// About 20 microseconds of work: less is not worth waking a thread.
constexpr int64_t kElementsPerTask = 1 << 16;

template <class T, class W>
void norm_row(const T* x, const W* weight, T* out, int64_t size, float eps) {
    f32x16 squares{};
    const auto gather = [&](int64_t i, auto... count) {
        const f32x16 v = load(x + i, count...);
        squares += v * v;
    };
    const int64_t whole = size - size % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) gather(i);
    if (whole < size) gather(whole, size - whole);
    const float inverse_rms = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
    const auto scale = [&](int64_t i, auto... count) {
        store(out + i, load(x + i, count...) * inverse_rms * load(weight + i, count...), count...);
    };
    for (int64_t i = 0; i < whole; i += kLanes) scale(i);
    if (whole < size) scale(whole, size - whole);
}

template <class T, class W>
void norm_rows(const Tensor& x, const Tensor& weight, Tensor& out, float eps) {
    const int64_t size = x.size(-1), rows = size ? x.numel() / size : 0;
    const T* from = pointer<T>(x, "x");
    const W* weights = pointer<W>(weight, "weight");
    T* to = mutable_pointer<T>(out, "out");
    const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(size, 1));
    run_tasks(ceil_div(rows, rows_per_task), [=](int64_t task) {
        for (int64_t row = task * rows_per_task; row < std::min(rows, (task + 1) * rows_per_task); ++row)
            norm_row(from + row * size, weights, to + row * size, size, eps);
    });
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
    check(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1), "rms_norm: weight must be as long as a row");
    Tensor out = new_output(x, x.sizes());
    const bool wide = type_of(weight) == ScalarType::Float;
    if (type_of(x) == ScalarType::Float) {
        norm_rows<float, float>(x, weight, out, eps);
    } else if (wide) {
        norm_rows<bf16, float>(x, weight, out, eps);
    } else {
        norm_rows<bf16, bf16>(x, weight, out, eps);
    }
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(powerband, m) {
    m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(powerband, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }

}  // namespace powerband
