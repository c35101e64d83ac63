/* Products with packed weights: packs the activations once, then hands stretches of panels to the
 * kernel of the instruction set. Which panels a thread gets and how rows are cut into blocks never
 * changes the order in which one output's terms are added. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

/* --- packing activations --------------------------------------------------------------------- */

static void pack_row_bf16(uint16_t *out, const float *in, const struct weight *w) {
    int group = weight_group(DTYPE_BF16, w->tiles);
    for (int leaf = 0; leaf < w->n_leaves; leaf++) {
        const float *values = in + w->leaf_begin[leaf];
        int n = w->leaf_begin[leaf + 1] - w->leaf_begin[leaf];
        int padded = (w->leaf_steps[leaf + 1] - w->leaf_steps[leaf]) * group;
        for (int c = 0; c < n; c++) out[c] = bf16_from_f32(values[c]);
        for (int c = n; c < padded; c++) out[c] = 0;
        out += padded;
    }
}

/* Symmetric, one scale per row and leaf. bias: 128 where the kernel multiplies unsigned bytes. */
static void pack_row_i8(uint8_t *out, float *scales, const float *in, const struct weight *w,
                        int bias) {
    int group = weight_group(DTYPE_I8, w->tiles);
    for (int leaf = 0; leaf < w->n_leaves; leaf++) {
        const float *values = in + w->leaf_begin[leaf];
        int n = w->leaf_begin[leaf + 1] - w->leaf_begin[leaf];
        int padded = (w->leaf_steps[leaf + 1] - w->leaf_steps[leaf]) * group;
        float largest = 0;
        for (int c = 0; c < n; c++) {
            float magnitude = fabsf(values[c]);
            largest = magnitude > largest ? magnitude : largest;
        }
        scales[leaf] = largest / 127.0f;
        float inverse = largest > 0 ? 127.0f / largest : 0;
        /* Adding 1.5 * 2^23 rounds to an integer, nearest even, in the low bits. */
        for (int c = 0; c < n; c++) {
            float shifted = values[c] * inverse + 12582912.0f;
            int32_t bits;
            memcpy(&bits, &shifted, sizeof bits);
            out[c] = (uint8_t)(bits + bias);
        }
        memset(out + n, bias, (size_t)(padded - n));
        out += padded;
    }
}

struct packing {
    const struct weight *weight;
    const float *in;
    int in_stride, bias;
    char *data;
    float *scales;
    size_t row_bytes;
};

static void pack_one(void *arg, int row) {
    const struct packing *p = arg;
    const float *in = p->in + (size_t)row * (size_t)p->in_stride;
    char *out = p->data + (size_t)row * p->row_bytes;
    if (p->weight->format == DTYPE_I8) {
        pack_row_i8((uint8_t *)out, p->scales + row * p->weight->n_leaves, in, p->weight, p->bias);
    } else {
        pack_row_bf16((uint16_t *)out, in, p->weight);
    }
}

/* One block of 16 packed rows to tiles. */
struct turning {
    const struct packing *packing;
    char *tiles;
    int n_rows, n_steps;
};

static void turn_block(void *arg, int block_i) {
    const struct turning *t = arg;
    int row = block_i * TILE_COLUMNS;
    int n = t->n_rows - row < TILE_COLUMNS ? t->n_rows - row : TILE_COLUMNS;
    char *tile = t->tiles + (size_t)block_i * (size_t)t->n_steps * TILE_BYTES;
    for (int step = 0; step < t->n_steps; step++, tile += TILE_BYTES) {
        for (int c = 0; c < n; c++) {
            const char *in = t->packing->data + (size_t)(row + c) * t->packing->row_bytes + step * 64;
            for (int g = 0; g < 16; g++) memcpy(tile + g * 64 + c * 4, in + g * 4, 4);
        }
    }
}

static struct packed_rows pack(struct backend *backend, const struct weight *w, const float *in,
                               int in_stride, int n_rows) {
    size_t element = w->format == DTYPE_I8 ? 1 : 2;
    int group = weight_group(w->format, w->tiles);
    size_t row_bytes = (size_t)w->leaf_steps[w->n_leaves] * (size_t)group * element;
    row_bytes = (row_bytes + 63) / 64 * 64 + 64; /* rows must not all start in one cache set */
    size_t data_bytes = row_bytes * (size_t)n_rows;
    size_t scale_bytes = ((size_t)n_rows * (size_t)w->n_leaves * sizeof(float) + 63) / 64 * 64;
    int n_steps = w->leaf_steps[w->n_leaves];
    int n_blocks = (n_rows + TILE_COLUMNS - 1) / TILE_COLUMNS;
    size_t tile_bytes = w->tiles ? (size_t)n_blocks * (size_t)n_steps * TILE_BYTES : 0;
    char *data = backend_packed(backend, data_bytes + scale_bytes + tile_bytes);
    struct packing packing = {
        .weight = w,
        .in = in,
        .in_stride = in_stride,
        .bias = w->tiles ? 0 : 128,
        .data = data,
        .scales = (float *)(data + data_bytes),
        .row_bytes = row_bytes,
    };
    if (n_rows < 16) {
        for (int row = 0; row < n_rows; row++) pack_one(&packing, row);
    } else {
        pool_run(backend, pack_one, &packing, n_rows);
    }
    if (!w->tiles) return (struct packed_rows){data, packing.scales, n_rows, row_bytes};
    char *tiles = data + data_bytes + scale_bytes;
    struct turning turning = {&packing, tiles, n_rows, n_steps};
    pool_run(backend, turn_block, &turning, n_blocks);
    return (struct packed_rows){tiles, packing.scales, n_rows, 0};
}

/* --- running the kernel ----------------------------------------------------------------------- */

static linear_kernel_fn kernel_of(const struct backend *backend, enum dtype format) {
    bool i8 = format == DTYPE_I8;
    switch (backend->isa) {
    case BACKEND_AMX: return i8 ? linear_i8_amx : linear_bf16_amx;
    case BACKEND_AVX512: return i8 ? linear_i8_avx512 : linear_bf16_avx512;
    case BACKEND_AVX2: return i8 ? linear_i8_avx2 : linear_bf16_avx2;
    default: return i8 ? linear_i8_portable : linear_bf16_portable;
    }
}

struct product {
    linear_kernel_fn kernel;
    float *out;
    const struct weight *weight;
    const struct packed_rows *rows;
    const float *bias;
    int n_tasks;
};

static void run_stretch(void *arg, int task_i) {
    const struct product *p = arg;
    int n = p->weight->n_panels;
    /* Borders between interleaved panels would cost both neighbours a stream of half lines. */
    int unit = p->weight->interleave;
    int begin = (int)((int64_t)n * task_i / p->n_tasks) / unit * unit;
    int end = (int)((int64_t)n * (task_i + 1) / p->n_tasks) / unit * unit;
    if (task_i + 1 == p->n_tasks) end = n;
    p->kernel(p->out, (size_t)p->weight->n, p->weight, p->rows, p->bias, begin, end);
}

static void multiply(struct backend *backend, float *out, const float *in, int in_stride,
                     const struct weight *weight, const float *bias, int n_rows) {
    if (n_rows == 0 || weight->n == 0) return;
    struct packed_rows rows = pack(backend, weight, in, in_stride, n_rows);
    struct product product = {
        .kernel = kernel_of(backend, weight->format),
        .out = out,
        .weight = weight,
        .rows = &rows,
        .bias = bias,
        .n_tasks = backend->options.n_threads,
    };
    pool_run(backend, run_stretch, &product, product.n_tasks);
}

void cpu_linear(struct backend *backend, float *out, const float *in, int in_stride,
                    const struct weight *weight, const float *bias, int n_rows) {
    CHECK(weight->n_leaves == 1);
    multiply(backend, out, in, in_stride, weight, bias, n_rows);
}

void cpu_linear_tree(struct backend *backend, float *out, const float *in,
                         const struct weight *weight, int n_rows) {
    multiply(backend, out, in, weight->k, weight, NULL, n_rows);
}
