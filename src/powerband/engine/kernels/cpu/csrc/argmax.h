// The largest of each row's results and where it is, found while a product makes them: they are never all in memory.
//
//     task 0: its columns  ─► best of 16 lanes ─► best of task 0 ┐
//     task 1: its columns  ─► best of 16 lanes ─► best of task 1 ┴─► best of the row
//
// Results count as rounded to bf16, so that this is the argmax of what the product would have written. Of equals the
// lowest column wins; NaN is above everything, as in torch.argmax.
#pragma once

#include "scratch.h"
#include "simd.h"

namespace powerband {

struct Largest {
    float value;
    int32_t column;

    static bool above(float a, float b) { return a > b || (a != a && b == b); }

    void take(Largest other) {
        const bool equal = other.value == value || (other.value != other.value && value != value);
        if (above(other.value, value) || (equal && other.column < column)) *this = other;
    }
};

// An epilogue (see gemm_bf16.h) for one task: rows first_row … first_row + rows - 1, any columns in ascending order.
class LargestOfRows {
   public:
    LargestOfRows(const bf16* bias, int64_t first_row, int64_t rows, int64_t columns)
        : bias_(bias), first_row_(first_row), columns_(columns) {
        thread_local Scratch<Lanes> scratch;
        lanes_ = scratch.get(rows);
        for (int64_t row = 0; row < rows; ++row) lanes_[row] = {broadcast(-INFINITY), i32x16{} + kNone};
    }

    void prepare(int64_t, int64_t) const {}

    void operator()(int64_t row, int64_t column, f32x16 left, f32x16 right) const {
        Lanes& lanes = lanes_[row - first_row_];
        take(lanes, column, left);
        if (column + kLanes < columns_) take(lanes, column + kLanes, right);
    }

    Largest of(int64_t row) const {
        const Lanes& lanes = lanes_[row - first_row_];
        Largest best{lanes.value[0], lanes.column[0]};
        for (int lane = 1; lane < kLanes; ++lane) best.take({lanes.value[lane], lanes.column[lane]});
        return best;
    }

    void operator()(int64_t row, int64_t column, f32x16 sums) const { take(lanes_[row - first_row_], column, sums); }

   private:
    static constexpr int32_t kNone = std::numeric_limits<int32_t>::max();  // in lanes that no column has reached yet

    struct Lanes {
        f32x16 value;
        i32x16 column;
    };

    void take(Lanes& lanes, int64_t column, f32x16 sums) const {
        const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const int64_t count = columns_ - column;
        if (bias_ != nullptr) sums += count >= kLanes ? load(bias_ + column) : load(bias_ + column, count);
        const f32x16 value = widen(narrow(sums));
        const i32x16 columns = lane + static_cast<int32_t>(column);
        const i32x16 unseen = lanes.column == kNone;
        const i32x16 above = (value > lanes.value) | ((value != value) & (lanes.value == lanes.value)) | unseen;
        const i32x16 takes = above & (columns < static_cast<int32_t>(columns_));
        lanes.value = select(takes, value, lanes.value);
        lanes.column = (columns & takes) | (lanes.column & ~takes);
    }

    const bf16* bias_;
    int64_t first_row_, columns_;
    Lanes* lanes_;
};

}  // namespace powerband
