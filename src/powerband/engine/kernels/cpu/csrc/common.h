// What every operator needs: checked views of tensors, and work shared out among torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>

#include "simd.h"
#include "thread_team.h"

namespace powerband {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

// Every size that a request can influence is checked before a kernel runs. torch turns this into a RuntimeError.
inline void check(bool condition, const char* complaint) {
    if (!condition) throw std::runtime_error(std::string("powerband: ") + complaint);
}

inline ScalarType type_of(const Tensor& t) { return t.scalar_type(); }

template <class T>
constexpr ScalarType scalar_type();
template <> constexpr ScalarType scalar_type<float>() { return ScalarType::Float; }
template <> constexpr ScalarType scalar_type<bf16>() { return ScalarType::BFloat16; }
template <> constexpr ScalarType scalar_type<int8_t>() { return ScalarType::Char; }
template <> constexpr ScalarType scalar_type<uint8_t>() { return ScalarType::Byte; }
template <> constexpr ScalarType scalar_type<int32_t>() { return ScalarType::Int; }
template <> constexpr ScalarType scalar_type<int64_t>() { return ScalarType::Long; }

// The memory of a contiguous CPU tensor of T. `name` is for the complaint.
template <class T>
const T* pointer(const Tensor& t, const char* name) {
    if (t.scalar_type() != scalar_type<T>() || !t.is_contiguous() || !t.is_cpu())
        throw std::runtime_error(std::string("powerband: ") + name + " must be contiguous, on the CPU and of its type");
    return static_cast<const T*>(t.data_ptr());
}

template <class T>
T* mutable_pointer(Tensor& t, const char* name) {
    return const_cast<T*>(pointer<T>(t, name));
}

template <class T>
const T* pointer(const std::optional<Tensor>& t, const char* name) {
    return t.has_value() ? pointer<T>(*t, name) : nullptr;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs task(0) … task(count - 1), each once, on as many threads as torch is set to. A thread takes the next task when it
// has finished one: a core that another process uses gets fewer of them. Tasks must not throw.
template <class F>
void run_tasks(int64_t count, const F& task) {
    const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
    if (threads <= 1) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    run_on_team(count, threads, [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); }, &task);
}

}  // namespace powerband
