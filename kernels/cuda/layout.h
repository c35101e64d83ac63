/* Where an element lies in the operands of mma.sync. Everything that a product or attention reads lies
 * in memory as the tensor cores want it, lane by lane, 16 bytes each: a kernel is a stream of
 * coalesced loads, without shared memory, ldmatrix or transposition in between. Host and device.
 *
 *   unit       the columns one step of a product consumes: 32 (bf16, fp8) or 64 (int8)
 *   rows       [row / 8][unit][lane][16 bytes]: two B operands of 8 tokens
 *   weights    [output / 16][unit][1 (fp8) or 2][lane][16 bytes]: two A operands of 16 outputs
 *   K          [block][KV head][position / 8 of 2][dim / 32][lane][16 bytes]: two B operands, k = dims
 *   V          [block][KV head][dim / 16][lane][16 bytes]: two B operands, k = the block's 16 positions */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kernels/cuda/queue.h"

enum { ROW_TILE = 8, PANEL = 16, LANES = 32, PIECE = 256, MAX_LEAVES = 8 };

/* Leaves of a product's K in units; passed to kernels by value. */
struct leaf_units {
    int n_leaves;
    int column[MAX_LEAVES + 1]; /* where a leaf begins */
    int unit[MAX_LEAVES + 1];   /* where its units begin */
};

/* 16-bit element of packed bf16 rows. */
CUDA_BOTH size_t packed_row_at(int row, int unit, int column_in_unit, int n_units) {
    int step = column_in_unit / 16, rest = column_in_unit % 16;
    int lane = row % 8 * 4 + rest % 8 / 2;
    size_t quad = ((size_t)(row / 8) * (size_t)n_units + (size_t)unit) * LANES + (size_t)lane;
    return quad * 8 + (size_t)(step * 4 + rest / 8 * 2 + rest % 2);
}

/* Byte of packed int8 rows. */
CUDA_BOTH size_t packed_byte_at(int row, int unit, int column_in_unit, int n_units) {
    int step = column_in_unit / 32, rest = column_in_unit % 32;
    int lane = row % 8 * 4 + rest % 16 / 4;
    size_t quad = ((size_t)(row / 8) * (size_t)n_units + (size_t)unit) * LANES + (size_t)lane;
    return quad * 16 + (size_t)(step * 8 + rest / 16 * 4 + rest % 4);
}

/* Element of a packed weight, in elements of its format. output is taken modulo 16, the panel's base
 * is the caller's: [unit][quad][lane][16 bytes]. */
CUDA_BOTH size_t weight_bf16_at(int output, int unit, int column_in_unit) {
    int tile = column_in_unit / 16, rest = column_in_unit % 16;
    int lane = output % 8 * 4 + rest % 8 / 2;
    int reg = rest / 8 * 2 + output % 16 / 8;
    return (((size_t)unit * 2 + (size_t)tile) * LANES + (size_t)lane) * 8 +
           (size_t)(reg * 2 + rest % 2);
}
CUDA_BOTH size_t weight_i8_at(int output, int unit, int column_in_unit) {
    int tile = column_in_unit / 32, rest = column_in_unit % 32;
    int lane = output % 8 * 4 + rest % 16 / 4;
    int reg = rest / 16 * 2 + output % 16 / 8;
    return (((size_t)unit * 2 + (size_t)tile) * LANES + (size_t)lane) * 16 +
           (size_t)(reg * 4 + rest % 4);
}
CUDA_BOTH size_t weight_f8_at(int output, int unit, int column_in_unit) {
    int tile = column_in_unit / 16, rest = column_in_unit % 16;
    int lane = output % 8 * 4 + rest % 8 / 2;
    int reg = rest / 8 * 2 + output % 16 / 8;
    return ((size_t)unit * LANES + (size_t)lane) * 16 + (size_t)(tile * 8 + reg * 2 + rest % 2);
}

/* Element of K, and of V, of one head in one block; padded: head_dim rounded up to 32. */
CUDA_BOTH size_t key_at(int slot, int dim, int padded) {
    int rest = dim % 32, step = rest / 16, in_step = rest % 16;
    int lane = slot % 8 * 4 + in_step % 8 / 2;
    size_t quad = ((size_t)(slot / 8) * (size_t)(padded / 32) + (size_t)(dim / 32)) * LANES;
    return (quad + (size_t)lane) * 8 + (size_t)(step * 4 + in_step / 8 * 2 + in_step % 2);
}
CUDA_BOTH size_t value_at(int slot, int dim) {
    int tile = dim % 16 / 8, lane = dim % 8 * 4 + slot % 8 / 2;
    return ((size_t)(dim / 16) * LANES + (size_t)lane) * 8 +
           (size_t)(tile * 4 + slot / 8 * 2 + slot % 2);
}
