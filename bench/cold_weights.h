/* Weights of one shape, made so often that no cache holds them: a pass goes through all copies. */
#pragma once
#include "kernels/backend.h"

enum { COLD_MAX_COPIES = 64, COLD_N_ROWS = 5 };

/* What is measured from 1 row on. */
extern const int cold_rows[COLD_N_ROWS];

/* A product: n outputs from k inputs, the inputs in n_leaves equal leaves (1: a plain product). */
struct cold_shape {
    const char *name;
    int n, k, n_leaves;
};

struct cold_weights {
    const struct cold_shape *shape;
    struct backend *backend;
    struct weight *copies[COLD_MAX_COPIES];
    int n_copies;
    size_t bytes; /* of all copies */
};

/* Copies until they have `bytes`, at most COLD_MAX_COPIES; borrows backend and shape. Fails as
 * backend_weight_create does, with nothing to free. */
enum status cold_weights_make(struct cold_weights *out, struct backend *backend,
                              const struct cold_shape *shape, enum dtype format, size_t bytes,
                              struct error *err);
void cold_weights_free(struct cold_weights *weights);

/* The first n_copies times rows in[n_rows, k] to out[n_rows, n]; enqueued on a device. */
void cold_weights_multiply(const struct cold_weights *weights, float *out, const float *in, int n_rows,
                           int n_copies);
