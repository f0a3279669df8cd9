// What LoRA adapters add to a projection, for operators that compute projections.
#pragma once

#include <memory>
#include <vector>

#include "linear.h"

namespace powerband {

struct AdapterDelta;

// A step's rows [first, end) belong to requests of one adapter, which adds this to a projection.
struct AdapterRows {
    std::shared_ptr<const AdapterDelta> delta;
    int64_t first, end;
};

// The groups of a step for one projection; deltas that are 0 add nothing.
std::vector<AdapterRows> adapter_rows(
    const int64_t* deltas, const std::vector<int64_t>& starts, const std::vector<int64_t>& ends);

// out[rows] += x[rows] @ A.T @ B.T of each group, inner values rounded to bf16.
void add_adapters(const std::vector<AdapterRows>& groups, const Activations& x, const Result& out);

}  // namespace powerband
