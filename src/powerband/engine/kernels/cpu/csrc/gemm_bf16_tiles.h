// Up to 32 rows times a pair of bf16 panels in AMX tiles.
//
//                     B6 = left     B7 = right         each step: 32 of k
//     A4 = rows 0…15      C0            C1
//     A5 = rows 16…31     C2            C3
#pragma once

#include "amx.h"

#ifdef POWERBAND_AMX
namespace powerband {

struct PanelTiles {
    int64_t stride;            // bytes between rows of x
    const char* next;          // what to fetch meanwhile
    int64_t next_lines = 0;    // cache lines of it per step
    bool first = true;         // sums start at zero
    int64_t steps = 0;
    const bf16 *left = nullptr, *right = nullptr;
    float* sums = nullptr;     // [tiles of rows][16][32]

    // sums of `count` (1 or 2) tiles of rows, which start at x and at x16, += x * panels
    void multiply(const bf16* x, const bf16* x16, int64_t count) {
        if (count == 2) {
            multiply_two(reinterpret_cast<const char*>(x), reinterpret_cast<const char*>(x16));
        } else {
            multiply_one(reinterpret_cast<const char*>(x));
        }
    }

   private:
    static constexpr int64_t kTileBytes = 1024, kSumsStride = 128;

    void multiply_two(const char* a, const char* a16) {
        const char *b = reinterpret_cast<const char*>(left), *b16 = reinterpret_cast<const char*>(right);
        if (first) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, sums, kSumsStride);
            _tile_loadd(1, sums + 16, kSumsStride);
            _tile_loadd(2, sums + 512, kSumsStride);
            _tile_loadd(3, sums + 528, kSumsStride);
        }
        for (int64_t step = 0; step < steps; ++step) {
            _tile_loadd(4, a + step * 64, stride);
            _tile_loadd(6, b + step * kTileBytes, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b16 + step * kTileBytes, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a16 + step * 64, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            fetch_next();
        }
        _tile_stored(0, sums, kSumsStride);
        _tile_stored(1, sums + 16, kSumsStride);
        _tile_stored(2, sums + 512, kSumsStride);
        _tile_stored(3, sums + 528, kSumsStride);
    }

    void multiply_one(const char* a) {
        const char *b = reinterpret_cast<const char*>(left), *b16 = reinterpret_cast<const char*>(right);
        if (first) {
            _tile_zero(0);
            _tile_zero(1);
        } else {
            _tile_loadd(0, sums, kSumsStride);
            _tile_loadd(1, sums + 16, kSumsStride);
        }
        for (int64_t step = 0; step < steps; ++step) {
            _tile_loadd(4, a + step * 64, stride);
            _tile_loadd(6, b + step * kTileBytes, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b16 + step * kTileBytes, 64);
            _tile_dpbf16ps(1, 4, 7);
            fetch_next();
        }
        _tile_stored(0, sums, kSumsStride);
        _tile_stored(1, sums + 16, kSumsStride);
    }

    void fetch_next() {
        for (int64_t line = 0; line < next_lines; ++line) __builtin_prefetch(next + line * 64, 0, 2);
        next += next_lines * 64;
    }
};

}  // namespace powerband
#endif
