// The int8 product by AMX tiles: 16 rows of x by 16 columns, 64 k at a time. x is signed, as it is.
//
//     several rows of tiles         tiles 0 1   4 | 6 7        C00 C01   A0 | B0 B1
//                                         2 3   5 |            C10 C11   A1 |
//     at most 16 rows of x          tiles 0 1 2 3   4 | 5 6    C0 C1 C2 C3   A | B in turn
#pragma once

#include "amx.h"
#include "gemm_int8.h"

#ifdef POWERBAND_AMX
namespace powerband {

constexpr int64_t kTileRows = 16, kTileBytes = 1024;
constexpr uint8_t kOneRowOfTiles = 0b00011111;  // C0..C3 and A

struct TileSums {
    alignas(64) int32_t values[4][kTileRows][kPanel];
};

inline void finish_tile(const Int8Product& product, int64_t row, int64_t panel, const int32_t (&sums)[kTileRows][kPanel]) {
    const PanelScales scales(product, panel, 0);
    const int64_t rows = std::min(kTileRows, product.rows - row);
    for (int64_t r = 0; r < rows; ++r) {
        i32x16 whole;
        std::memcpy(&whole, sums[r], sizeof whole);
        finish(product, scales, row + r, whole);
    }
}

// 32 rows by two panels. Rows beyond the last are in x's memory, but not in the result.
inline void multiply_tiles_2x2(const Int8Product& product, int64_t row, int64_t panel, TileSums& sums) {
    const int64_t k = product.k;
    const int8_t* x = product.x + row * k;
    const int8_t* w = product.panel(panel);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < k; i += kPanelRow, w += kTileBytes) {
        _tile_loadd(6, w, kPanelRow);
        _tile_loadd(4, x + i, k);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, w + k * kPanel, kPanelRow);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, x + kTileRows * k + i, k);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums.values[0], kPanelRow);
    _tile_stored(1, sums.values[1], kPanelRow);
    _tile_stored(2, sums.values[2], kPanelRow);
    _tile_stored(3, sums.values[3], kPanelRow);
    tiles_see_memory();
    finish_tile(product, row, panel, sums.values[0]);
    finish_tile(product, row, panel + 1, sums.values[1]);
    if (row + kTileRows >= product.rows) return;
    finish_tile(product, row + kTileRows, panel, sums.values[2]);
    finish_tile(product, row + kTileRows, panel + 1, sums.values[3]);
}

// At most 16 rows by four panels.
inline void multiply_tiles_1x4(const Int8Product& product, int64_t row, int64_t panel, TileSums& sums) {
    const int64_t k = product.k, panel_bytes = k * kPanel;
    const int8_t* x = product.x + row * k;
    const int8_t* w = product.panel(panel);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < k; i += kPanelRow, w += kTileBytes) {
        _tile_loadd(4, x + i, k);
        _tile_loadd(5, w, kPanelRow);
        _tile_dpbssd(0, 4, 5);
        _tile_loadd(6, w + panel_bytes, kPanelRow);
        _tile_dpbssd(1, 4, 6);
        _tile_loadd(7, w + 2 * panel_bytes, kPanelRow);
        _tile_dpbssd(2, 4, 7);
        _tile_loadd(5, w + 3 * panel_bytes, kPanelRow);
        _tile_dpbssd(3, 4, 5);
    }
    _tile_stored(0, sums.values[0], kPanelRow);
    _tile_stored(1, sums.values[1], kPanelRow);
    _tile_stored(2, sums.values[2], kPanelRow);
    _tile_stored(3, sums.values[3], kPanelRow);
    tiles_see_memory();
    for (int p = 0; p < 4; ++p) finish_tile(product, row, panel + p, sums.values[p]);
}

// At most 16 rows by one panel: what is left at the right edge.
inline void multiply_tiles_1x1(const Int8Product& product, int64_t row, int64_t panel, TileSums& sums) {
    const int64_t k = product.k;
    const int8_t* x = product.x + row * k;
    const int8_t* w = product.panel(panel);
    _tile_zero(0);
    for (int64_t i = 0; i < k; i += kPanelRow, w += kTileBytes) {
        _tile_loadd(4, x + i, k);
        _tile_loadd(5, w, kPanelRow);
        _tile_dpbssd(0, 4, 5);
    }
    _tile_stored(0, sums.values[0], kPanelRow);
    tiles_see_memory();
    finish_tile(product, row, panel, sums.values[0]);
}

// A part of the product whose x is signed and has memory for a multiple of 32 rows, unless it has at most 16.
inline void multiply_by_tiles(const Int8Product& product, const Part& part) {
    const int64_t rows = part.row_end - part.row;
    const bool one_row = product.rows <= kTileRows;
    const Tiles tiles(one_row ? static_cast<int>(rows) : kTileRows, one_row ? kOneRowOfTiles : 0);
    TileSums sums;
    const int64_t pairs_end = part.row + (rows % (2 * kTileRows) <= kTileRows ? rows - rows % (2 * kTileRows) : rows);
    const int64_t panels_2 = part.panel_end - (part.panel_end - part.panel) % 2;
    for (int64_t panel = part.panel; panel < panels_2; panel += 2)
        for (int64_t row = part.row; row < pairs_end; row += 2 * kTileRows)
            multiply_tiles_2x2(product, row, panel, sums);
    for (int64_t row = part.row; row < pairs_end; row += kTileRows)
        for (int64_t panel = panels_2; panel < part.panel_end; ++panel) multiply_tiles_1x1(product, row, panel, sums);
    if (pairs_end >= part.row_end) return;
    int64_t panel = part.panel;
    for (; panel + 4 <= part.panel_end; panel += 4) multiply_tiles_1x4(product, pairs_end, panel, sums);
    for (; panel < part.panel_end; ++panel) multiply_tiles_1x1(product, pairs_end, panel, sums);
}

}  // namespace powerband
#endif
