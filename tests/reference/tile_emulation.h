/* The AMX operations of kernels/cpu/tile.h in plain C, with the processor's semantics: configured rows
 * and row bytes, zeroing of what a load does not cover, the order of a bf16 product. One state
 * per thread, as in hardware. */
#pragma once
#include <math.h>
#include <string.h>

#include "common/dtype.h"
#include "common/error.h"

struct tile_state {
    bool configured;
    int rows[8], row_bytes[8];
    unsigned char data[8][16][64];
};
static _Thread_local struct tile_state tile_state;

static void tile_configure(const struct tile_config *config) {
    memset(&tile_state, 0, sizeof tile_state);
    CHECK(config->palette == 1 && config->start_row == 0);
    for (int t = 0; t < 8; t++) {
        CHECK(config->rows[t] <= 16 && config->row_bytes[t] <= 64);
        tile_state.rows[t] = config->rows[t];
        tile_state.row_bytes[t] = config->row_bytes[t];
    }
    tile_state.configured = true;
}

static void tile_release(void) {
    memset(&tile_state, 0, sizeof tile_state);
}

static void tile_zero(int t) {
    CHECK(tile_state.configured);
    memset(tile_state.data[t], 0, sizeof tile_state.data[t]);
}

static void tile_load(int t, const void *base, size_t stride) {
    tile_zero(t);
    for (int r = 0; r < tile_state.rows[t]; r++) {
        memcpy(tile_state.data[t][r], (const char *)base + (size_t)r * stride,
               (size_t)tile_state.row_bytes[t]);
    }
}

static void tile_store(int t, void *base, size_t stride) {
    CHECK(tile_state.configured);
    for (int r = 0; r < tile_state.rows[t]; r++) {
        memcpy((char *)base + (size_t)r * stride, tile_state.data[t][r],
               (size_t)tile_state.row_bytes[t]);
    }
}

/* What the product instructions fault on. */
static void tile_check_shapes(int c, int a, int b) {
    CHECK(tile_state.configured && c != a && c != b && a != b);
    CHECK(tile_state.rows[c] == tile_state.rows[a]);
    CHECK(tile_state.row_bytes[c] == tile_state.row_bytes[b]);
    CHECK(tile_state.row_bytes[a] == 4 * tile_state.rows[b]);
}

/* Subnormals count as zero and become zero. */
static float tile_flush(float value) {
    return fabsf(value) < 0x1p-126f ? copysignf(0, value) : value;
}

/* The manual's order: even and odd elements of the pairs are summed apart over the whole product,
 * from zero and with fused multiply-adds; then both are added, then what the tile held. */
static float tile_pairs_bf16(int a, int m, int b, int n) {
    float sums[2] = {0, 0};
    for (int k = 0; k < tile_state.row_bytes[a] / 4; k++) {
        uint16_t x[2], y[2];
        memcpy(x, tile_state.data[a][m] + 4 * k, 4);
        memcpy(y, tile_state.data[b][k] + 4 * n, 4);
        for (int i = 0; i < 2; i++) {
            float u = tile_flush(bf16_to_f32(x[i])), v = tile_flush(bf16_to_f32(y[i]));
            sums[i] = tile_flush(fmaf(u, v, sums[i]));
        }
    }
    return tile_flush(sums[0] + sums[1]);
}

static void tile_dot_bf16(int c, int a, int b) {
    tile_check_shapes(c, a, b);
    for (int m = 0; m < tile_state.rows[c]; m++) {
        for (int n = 0; n < tile_state.row_bytes[c] / 4; n++) {
            float sum;
            memcpy(&sum, tile_state.data[c][m] + 4 * n, 4);
            sum = tile_flush(tile_flush(sum) + tile_pairs_bf16(a, m, b, n));
            memcpy(tile_state.data[c][m] + 4 * n, &sum, 4);
        }
    }
}

static void tile_dot_i8(int c, int a, int b) {
    tile_check_shapes(c, a, b);
    for (int m = 0; m < tile_state.rows[c]; m++) {
        for (int k = 0; k < tile_state.row_bytes[a] / 4; k++) {
            for (int n = 0; n < tile_state.row_bytes[c] / 4; n++) {
                int8_t x[4], y[4];
                int32_t sum;
                memcpy(x, tile_state.data[a][m] + 4 * k, 4);
                memcpy(y, tile_state.data[b][k] + 4 * n, 4);
                memcpy(&sum, tile_state.data[c][m] + 4 * n, 4);
                for (int i = 0; i < 4; i++) sum += x[i] * y[i];
                memcpy(tile_state.data[c][m] + 4 * n, &sum, 4);
            }
        }
    }
}
