/* Ops that work row by row: embedding, RMSNorm, SwiGLU, the sum of the leaf tree. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/ops.h"

/* Below this many floats a pool costs more than it brings. */
enum { POOL_MIN_FLOATS = 16 * 1024 };

static void run_rows(struct backend *backend, void (*task)(void *, int), void *arg, int n_rows,
                     int width) {
    if ((int64_t)n_rows * width >= POOL_MIN_FLOATS) {
        pool_run(backend, task, arg, n_rows);
        return;
    }
    for (int r = 0; r < n_rows; r++) task(arg, r);
}

struct table {
    struct backend_head head;
    struct weight_source source; /* read in place */
};

struct rows {
    const struct backend *backend;
    const struct cpu_ops *ops;
    float *out;
    const float *in, *weight, *bias;
    float eps;
    int width, n_roots;
    size_t root_stride;
    const struct weight_source *table;
    const int32_t *tokens;
};

static void embed_row(void *arg, int r) {
    const struct rows *rows = arg;
    int32_t token = rows->tokens[r];
    if (token < 0) token = rows->backend->drawn[-1 - token].token; /* BACKEND_FED */
    size_t first = (size_t)token * (size_t)rows->table->row_stride;
    for (int i = 0; i < rows->width; i++) {
        rows->out[(size_t)r * (size_t)rows->width + (size_t)i] =
            dtype_load_f32(rows->table->data, rows->table->dtype, first + (size_t)i);
    }
}

enum status cpu_table_create(struct table **out, struct backend *backend,
                             const struct weight_source *source, int width, struct error *err) {
    (void)width;
    (void)err;
    struct table *table = xcalloc(1, sizeof *table);
    table->head = backend->head;
    table->source = *source;
    *out = table;
    return STATUS_OK;
}

void cpu_table_free(struct table *table) {
    free(table);
}

size_t cpu_table_bytes(const struct table *table) {
    (void)table;
    return 0;
}

void cpu_embed(struct backend *backend, float *out, const struct table *table, int n_rows,
               int width) {
    struct rows rows = {
        .backend = backend,
        .out = out,
        .width = width,
        .table = &table->source,
        .tokens = backend->pass->tokens,
    };
    run_rows(backend, embed_row, &rows, n_rows, width);
}

void cpu_take_rows(struct backend *backend, float *out, const float *in, int n_rows, int width) {
    for (int i = 0; i < n_rows; i++) {
        memcpy(out + (size_t)i * (size_t)width,
               in + (size_t)backend->pass->logit_rows[i] * (size_t)width,
               (size_t)width * sizeof *out);
    }
}

static void rmsnorm_task(void *arg, int r) {
    const struct rows *rows = arg;
    size_t at = (size_t)r * (size_t)rows->width;
    rows->ops->rmsnorm_row(rows->out + at, rows->in + at, rows->weight, rows->eps, rows->width);
}

void cpu_rmsnorm(struct backend *backend, float *out, const float *in, const float *weight,
                     float eps, int n_rows, int width) {
    struct rows rows = {.ops = backend->ops, .out = out, .in = in, .weight = weight, .eps = eps,
                        .width = width};
    run_rows(backend, rmsnorm_task, &rows, n_rows, width);
}

static void swiglu_task(void *arg, int r) {
    const struct rows *rows = arg;
    const float *gate = rows->in + (size_t)r * 2 * (size_t)rows->width;
    rows->ops->swiglu_row(rows->out + (size_t)r * (size_t)rows->width, gate, gate + rows->width,
                          rows->width);
}

void cpu_swiglu(struct backend *backend, float *out, const float *gate_up, int n_rows,
                    int width) {
    struct rows rows = {.ops = backend->ops, .out = out, .in = gate_up, .width = width};
    run_rows(backend, swiglu_task, &rows, n_rows, width);
}

static void tree_task(void *arg, int r) {
    const struct rows *rows = arg;
    size_t at = (size_t)r * (size_t)rows->width;
    rows->ops->tree_sum(rows->out + at, rows->in + at, rows->root_stride, rows->n_roots, rows->bias,
                        rows->width);
}

void cpu_tree_sum(struct backend *backend, float *residual, const float *roots, int n_roots,
                      const float *bias, int n_rows, int width) {
    struct rows rows = {
        .ops = backend->ops,
        .out = residual,
        .in = roots,
        .bias = bias,
        .width = width,
        .n_roots = n_roots,
        .root_stride = (size_t)n_rows * (size_t)width,
    };
    run_rows(backend, tree_task, &rows, n_rows, width);
}

void cpu_tree_sum_norm(struct backend *backend, float *residual, float *normed, const float *roots,
                       int n_roots, const float *bias, const float *weight, float eps, int n_rows,
                       int width) {
    cpu_tree_sum(backend, residual, roots, n_roots, bias, n_rows, width);
    cpu_rmsnorm(backend, normed, residual, weight, eps, n_rows, width);
}
