// RMSNorm of rows. A row is read from memory and written once: for the second pass it is in the cache.
#include "elementwise.h"
#include "output.h"

namespace powerband {
namespace {

// About 20 microseconds of work: less is not worth waking a thread.
constexpr int64_t kElementsPerTask = 1 << 16;

// kAdd: to what is in `out`, rounded once.
template <bool kAdd, class T, class W>
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
        f32x16 y = load(x + i, count...) * inverse_rms * load(weight + i, count...);
        if constexpr (kAdd) y += load(out + i, count...);
        store(out + i, y, count...);
    };
    for (int64_t i = 0; i < whole; i += kLanes) scale(i);
    if (whole < size) scale(whole, size - whole);
}

template <bool kAdd, class T, class W>
void norm_rows(const T* x, int64_t rows, int64_t size, const W* weight, float eps, T* out) {
    const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(size, 1));
    run_tasks(ceil_div(rows, rows_per_task), [=](int64_t task) {
        for (int64_t row = task * rows_per_task; row < std::min(rows, (task + 1) * rows_per_task); ++row)
            norm_row<kAdd>(x + row * size, weight, out + row * size, size, eps);
    });
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
    check(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(-1), "rms_norm: weight must be as long as a row");
    const int64_t size = x.size(-1), rows = size ? x.numel() / size : 0;
    Tensor out = new_output(x, x.sizes());
    if (type_of(x) == ScalarType::Float) {
        norm_rows<false>(pointer<float>(x, "x"), rows, size, pointer<float>(weight, "weight"), eps,
                         mutable_pointer<float>(out, "out"));
    } else {
        rms_norm_rows({pointer<bf16>(x, "x"), rows, size}, weight, eps, mutable_pointer<bf16>(out, "out"), false);
    }
    return out;
}

template <class W>
void norm_or_add(const Activations& x, const W* weight, float eps, bf16* out, bool add) {
    if (add) {
        norm_rows<true>(x.data, x.rows, x.features, weight, eps, out);
    } else {
        norm_rows<false>(x.data, x.rows, x.features, weight, eps, out);
    }
}

}  // namespace

void rms_norm_rows(const Activations& x, const Tensor& weight, float eps, bf16* out, bool add) {
    check(weight.dim() == 1 && weight.size(0) == x.features, "rms_norm: weight must be as long as a row");
    if (type_of(weight) == ScalarType::Float) {
        norm_or_add(x, pointer<float>(weight, "weight"), eps, out, add);
    } else {
        norm_or_add(x, pointer<bf16>(weight, "weight"), eps, out, add);
    }
}

STABLE_TORCH_LIBRARY_FRAGMENT(powerband, m) {
    m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(powerband, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }

}  // namespace powerband
