/* The handful of AMX operations that the products use. A test may define TILE_EMULATION and give the
 * same names in plain C (tests/reference/tile_emulation.h), to run the kernel on any processor. */
#pragma once
#include <stdint.h>

/* The 64 bytes that configure the tiles. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

#ifdef TILE_EMULATION
#include "tests/reference/tile_emulation.h"
#else
#include <immintrin.h>

/* GCC 12 tells the optimiser that only 8 of the 64 bytes are read, and drops the stores of the rest:
 * the barrier keeps them. */
static inline void tile_configure(const struct tile_config *config) {
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(config);
}
#define tile_release() _tile_release()
#define tile_zero(t) _tile_zero(t)
#define tile_load(t, base, stride) _tile_loadd(t, base, stride)
#define tile_store(t, base, stride) _tile_stored(t, base, stride)
#define tile_dot_bf16(c, a, b) _tile_dpbf16ps(c, a, b)
#define tile_dot_i8(c, a, b) _tile_dpbssd(c, a, b)
#endif
