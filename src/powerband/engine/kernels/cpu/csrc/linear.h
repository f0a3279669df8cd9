// The products as other operators call them: x [rows, in_features] times packed weights, each checked as its operator
// does it. The form of the weights is described where they are computed: linear_bf16.cpp, linear_int8.cpp, linear_int4.cpp.
#pragma once

#include "common.h"

namespace powerband {

struct Activations {
    const bf16* data;  // [rows][features]
    int64_t rows, features;
};

inline Activations activations(const Tensor& x) {
    check(x.dim() == 2, "x must be [rows, in_features]");
    return {pointer<bf16>(x, "x"), x.size(0), x.size(1)};
}

struct Result {
    bf16* data;  // [rows][features]
    int64_t features;
    bool add;  // to what is there, rounded once
};

// residual [rows, out_features], to be added to.
inline Result residual_of(Tensor& residual, const Activations& x) {
    check(residual.dim() == 2 && residual.size(0) == x.rows, "residual must be [rows of x, out_features]");
    return {mutable_pointer<bf16>(residual, "residual"), residual.size(1), true};
}

void multiply_bf16(const Activations& x, const Tensor& packed, const std::optional<Tensor>& bias, const Result& result);
void multiply_int8(const Activations& x, const Tensor& packed, const Tensor& scales, const Tensor& sums,
                   const std::optional<Tensor>& bias, const Result& result);
void multiply_int4(const Activations& x, const Tensor& packed, const Tensor& scales, const std::optional<Tensor>& zeros,
                   const std::optional<Tensor>& bias, int64_t group_size, const Result& result);

}  // namespace powerband
