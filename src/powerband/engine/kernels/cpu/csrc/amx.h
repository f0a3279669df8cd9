// AMX tiles: 16 rows of 64 bytes. The system has to permit them once per process, and a thread configures them before use.
//
//     bf16   C[16][16] f32 += A[16][32] * B, where B holds [16 pairs of k][16 columns][2]
//     int8   C[16][16] i32 += A[16][64] * B, where B holds [16 fours of k][16 columns][4]
#pragma once

#include "simd.h"

#ifdef POWERBAND_AMX
#include <sys/syscall.h>
#include <unistd.h>

namespace powerband {

// Whether this process may use tiles; asks the system the first time. False: take the AVX-512 path.
inline bool amx_permitted() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return permitted;
}

// What has been written is in memory before the tile loads that follow. GCC's tile intrinsics do not say what they read,
// so without this the compiler may move a store past them, or drop it. Use it between writing an operand and loading it.
inline void tiles_see_memory() { asm volatile("" ::: "memory"); }

// For the life of this object this thread has eight tiles of 16 rows of 64 bytes. Those whose bit is set in `short_tiles`
// (A and C of the last rows of a product) have only `rows` rows.
class Tiles {
   public:
    explicit Tiles(int rows = 16, uint8_t short_tiles = 0) {
        alignas(64) Config config{};
        config.palette = 1;
        for (int tile = 0; tile < 8; ++tile) {
            config.bytes[tile] = 64;
            config.rows[tile] = static_cast<uint8_t>(short_tiles >> tile & 1 ? rows : 16);
        }
        asm volatile("" ::"r"(&config) : "memory");  // all 64 bytes: the intrinsic declares only the first eight
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

   private:
    struct Config {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    };
};

}  // namespace powerband
#else
namespace powerband {
inline bool amx_permitted() { return false; }
}  // namespace powerband
#endif
