// x [rows, k] times one pair of packed bf16 panels, in float32: the inside of every product with weights in bf16.
//
//     PanelProduct product(x, stride, first_row, rows, k);     // once per task: a thread's tiles are configured for it
//     product.multiply({left, right}, next, column, epilogue); // for each pair of panels
//
//     panel: 16 columns of the result over all of k      k = 0,1   [c0 c0][c1 c1] … [c15 c15]      64 bytes
//     (w[column, k] in bf16, zeros beyond the end)       k = 2,3   [c0 c0][c1 c1] … [c15 c15]
//                                                        …         one row is one dpbf16 operand, 16 rows an AMX tile
//
// k is a multiple of kStep (see padded_k). The epilogue receives each row's 32 sums, `left` those of the columns
// column … column + 15, `right` the next 16, and does with them what it likes (linear_epilogue.h):
//
//     epilogue.prepare(row, column)            soon (row, column …) will be given: bring what it needs into the cache
//     epilogue(row, column, left, right)       f32x16 each; rows in ascending order
#pragma once

#include <algorithm>
#include <optional>

#include "amx.h"
#include "common.h"
#include "gemm_bf16_tiles.h"
#include "gemm_bf16_vector.h"
#include "scratch.h"

namespace powerband {

// From so many rows on tiles beat vectors, even when half of a tile's rows are empty (measured).
constexpr int64_t kRowsForTiles = 8;
// k per pass over the rows: 16 KB of the panels stay in the first-level cache while the rows go by.
constexpr int64_t kStepsPerPass = 8;

class PanelProduct {
   public:
    PanelProduct(const bf16* x, int64_t stride, int64_t first_row, int64_t rows, int64_t k)
        : x_(x + first_row * stride), stride_(stride), first_row_(first_row), rows_(rows), k_(k) {
#ifdef POWERBAND_AMX
        constexpr uint8_t kRowTiles = 0b010011;  // C of the first 16 rows, and A: see panel_tiles
        if (rows >= kRowsForTiles && k > 0 && amx_permitted())
            tiles_.emplace(static_cast<int>(std::min<int64_t>(rows, 16)), kRowTiles);
#endif
    }

    // `next`: panels that will be wanted after these, fetched meanwhile, or nullptr.
    template <class Epilogue>
    void multiply(PanelPair pair, const bf16* next, int64_t column, const Epilogue& epilogue) const {
#ifdef POWERBAND_AMX
        if (tiles_) return with_tiles(pair, next, column, epilogue);
#endif
        alignas(64) float sums[kMaxVectorRows * 32];
        const int64_t blocks = ceil_div(rows_, kMaxVectorRows), size = ceil_div(rows_, std::max<int64_t>(blocks, 1));
        for (int64_t row = 0; row < rows_; row += size) {
            const int64_t count = std::min(size, rows_ - row);
            multiply_vectors(x_ + row * stride_, stride_, count, k_, pair, row == 0 ? next : nullptr, sums);
            give(sums, row, row, count, column, epilogue);
        }
    }

   private:
    // sums [.., 32] from `row` on; those before `from` have been given already.
    template <class Epilogue>
    void give(
        const float* sums, int64_t row, int64_t from, int64_t count, int64_t column, const Epilogue& epilogue) const {
        for (int64_t i = from - row; i < count; ++i)
            epilogue(first_row_ + row + i, column, load(sums + i * 32), load(sums + i * 32 + 16));
    }

#ifdef POWERBAND_AMX
    // Rows go by in tiles of 16. The last tile ends at the last row and so may repeat rows of the one before it.
    template <class Epilogue>
    void with_tiles(PanelPair pair, const bf16* next, int64_t column, const Epilogue& epilogue) const {
        thread_local Scratch<float> scratch;
        const int64_t steps = k_ / kStep, row_tiles = ceil_div(rows_, 16);
        const int64_t last_start = std::max<int64_t>(rows_ - 16, 0);
        float* sums = scratch.get(row_tiles * 512);
        PanelTiles block{.stride = stride_ * 2, .next = reinterpret_cast<const char*>(next)};
        block.next_lines = next ? ceil_div(32, ceil_div(row_tiles, 2)) : 0;
        tiles_see_memory();
        for (int64_t step = 0; step < steps; step += kStepsPerPass) {
            const bool last = step + kStepsPerPass >= steps;
            block.first = step == 0;
            block.steps = std::min(kStepsPerPass, steps - step);
            block.left = pair.left + step * kStep * 16;
            block.right = pair.right + step * kStep * 16;
            for (int64_t tile = 0; tile < row_tiles; tile += 2) {
                const int64_t count = std::min<int64_t>(2, row_tiles - tile);
                const int64_t row = std::min(tile * 16, last_start), second = std::min(tile * 16 + 16, last_start);
                const int64_t rows_end = last ? std::min(rows_, tile * 16 + 32) : 0;
                for (int64_t i = tile * 16; i < rows_end; ++i) epilogue.prepare(first_row_ + i, column);
                block.sums = sums + tile * 512;
                block.multiply(x_ + row * stride_ + step * kStep, x_ + second * stride_ + step * kStep, count);
                if (!last) continue;
                give(block.sums, row, tile * 16, std::min<int64_t>(rows_, 16), column, epilogue);
                if (count == 2) give(block.sums + 512, second, tile * 16 + 16, 16, column, epilogue);
            }
        }
    }

    std::optional<Tiles> tiles_;
#endif
    const bf16* x_;
    int64_t stride_, first_row_, rows_, k_;
};

}  // namespace powerband
