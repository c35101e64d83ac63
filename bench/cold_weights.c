#include "bench/cold_weights.h"

#include <stdlib.h>

const int cold_rows[COLD_N_ROWS] = {1, 2, 4, 8, 16};

enum status cold_weights_make(struct cold_weights *out, struct backend *backend,
                              const struct cold_shape *shape, enum dtype format, size_t bytes,
                              struct error *err) {
    size_t n = (size_t)shape->n * (size_t)shape->k;
    uint16_t *values = xmalloc(n * sizeof *values);
    for (size_t i = 0; i < n; i++) values[i] = bf16_from_f32((float)(i * 2654435761u % 2001) / 1000 - 1);
    struct weight_source source = {values, DTYPE_BF16, shape->k, shape->n};
    int leaves[BACKEND_MAX_LEAVES + 1];
    for (int i = 0; i <= shape->n_leaves; i++) leaves[i] = shape->k / shape->n_leaves * i;
    enum status status = STATUS_OK;
    *out = (struct cold_weights){.shape = shape, .backend = backend};
    while (status == STATUS_OK && out->n_copies < COLD_MAX_COPIES && out->bytes < bytes) {
        struct weight **copy = &out->copies[out->n_copies];
        status = backend_weight_create(copy, backend, &source, 1, shape->k,
                                       shape->n_leaves > 1 ? leaves : NULL, shape->n_leaves, format, err);
        if (status == STATUS_OK) out->bytes += backend_weight_bytes(out->copies[out->n_copies++]);
    }
    free(values);
    if (status != STATUS_OK) cold_weights_free(out);
    return status;
}

void cold_weights_free(struct cold_weights *weights) {
    for (int i = 0; i < weights->n_copies; i++) backend_weight_free(weights->copies[i]);
    weights->n_copies = 0;
}

void cold_weights_multiply(const struct cold_weights *weights, float *out, const float *in, int n_rows,
                           int n_copies) {
    const struct cold_shape *shape = weights->shape;
    for (int i = 0; i < n_copies; i++) {
        if (shape->n_leaves > 1) {
            backend_linear_tree(weights->backend, out, in, weights->copies[i], n_rows);
        } else {
            backend_linear(weights->backend, out, in, shape->k, weights->copies[i], NULL, n_rows);
        }
    }
}
