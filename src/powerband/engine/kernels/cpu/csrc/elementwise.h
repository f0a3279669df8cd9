// What lies between the products, as other operators call it.
#pragma once

#include "linear.h"

namespace powerband {

// norm.cpp: out [rows][features] = norm of x, or out += norm of x. weight: [features], bf16 or float32.
void rms_norm_rows(const Activations& x, const Tensor& weight, float eps, bf16* out, bool add);

// gated.cpp: gate_up [rows][2 * size] → out [rows][size]. activation: as the operator takes it.
void gated_rows(const Activations& gate_up, int64_t activation, bf16* out);

}  // namespace powerband
