/* What every product must keep, whatever its kernel: for test_linear.c and test_linear_amx.c. */
#pragma once
#include <stdio.h>
#include <string.h>

#include "kernels/backend.h"
#include "tests/reference/linear.h"
#include "tests/reference/random.h"
#include "tests/unit/test.h"

static const int linear_sizes_n[] = {1, 15, 17, 33, 100};
static const int linear_sizes_k[] = {1, 2, 3, 31, 33, 64, 100};
static const enum dtype linear_formats[] = {DTYPE_BF16, DTYPE_I8};
#define LINEAR_COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

static inline struct weight_source linear_source(const float *w, int n, int k) {
    return (struct weight_source){w, DTYPE_F32, k, n};
}

static inline struct weight *linear_pack(struct backend *backend, const float *w, int n, int k,
                                         enum dtype format) {
    struct weight_source source = linear_source(w, n, k);
    struct weight *weight = NULL;
    struct error err = {0};
    enum status status =
        backend_weight_create(&weight, backend, &source, 1, k, NULL, 1, format, &err);
    if (status != STATUS_OK) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    return weight;
}

static inline int linear_same(const float *a, const float *b, size_t n) {
    return memcmp(a, b, n * sizeof *a) == 0;
}

/* Against the reference, with bias and a stride wider than k. */
static inline void linear_check_values(struct backend *backend, enum dtype format, int n, int k,
                                       int n_rows, uint64_t seed) {
    struct test_random random = {seed};
    int stride = k + random_below(&random, 7);
    float *x = random_floats(&random, (size_t)(n_rows * stride), -2, 2);
    float *w = random_floats(&random, (size_t)(n * k), -1, 1);
    float *bias = random_floats(&random, (size_t)n, -1, 1);
    float *out = random_floats(&random, (size_t)(n_rows * n), 5, 6);
    float *plain = random_floats(&random, (size_t)(n_rows * n), 5, 6);
    struct weight *weight = linear_pack(backend, w, n, k, format);
    backend_linear(backend, out, x, stride, weight, bias, n_rows);
    backend_linear(backend, plain, x, stride, weight, NULL, n_rows);
    for (int i = 0; i < n_rows * n; i++) {
        const float *row = x + i / n * stride, *column = w + i % n * k;
        bool bf16 = format == DTYPE_BF16;
        struct reference_product exact = reference_dot(row, column, k, 0);
        struct reference_product product = reference_dot(row, column, k, bf16);
        double drift = bf16 ? reference_bf16_drift(exact.magnitude)
                            : reference_i8_drift(row, column, k);
        double bound = reference_f32_bound(k, product.magnitude) + (bf16 ? 0 : drift);
        cr_assert(fabs(plain[i] - product.sum) <= bound,
                  "seed %llu %s %s n %d k %d rows %d at %d: %.9g, expected %.9g within %.3g",
                  (unsigned long long)seed, backend_isa_name(backend), dtype_name(format), n, k,
                  n_rows, i, plain[i], product.sum, bound);
        cr_assert(fabs(plain[i] - exact.sum) <=
                      drift + 2 * reference_f32_bound(k, exact.magnitude),
                  "seed %llu: drift of %s n %d k %d", (unsigned long long)seed, dtype_name(format),
                  n, k);
        cr_assert(out[i] == plain[i] + bias[i % n], "seed %llu: bias", (unsigned long long)seed);
    }
    backend_weight_free(weight);
    free(x), free(w), free(bias), free(out), free(plain);
}

static inline void linear_check_all_values(struct backend *backend) {
    static const int rows[] = {1, 2, 5, 16, 17, 35};
    for (int f = 0; f < LINEAR_COUNT(linear_formats); f++) {
        for (int n = 0; n < LINEAR_COUNT(linear_sizes_n); n++) {
            for (int k = 0; k < LINEAR_COUNT(linear_sizes_k); k++) {
                linear_check_values(backend, linear_formats[f], linear_sizes_n[n],
                                    linear_sizes_k[k], rows[(n + k) % LINEAR_COUNT(rows)],
                                    (uint64_t)(1000 * f + 100 * n + k));
            }
        }
        linear_check_values(backend, linear_formats[f], 144, 1000, 33, 7);
    }
}

/* Row r of a product of 100 rows, alone and among 1..33, 64, 100 rows, at other places and next to
 * other rows: the same bits. */
static inline void linear_check_row_invariance(struct backend *backend, enum dtype format, int n,
                                               int k, uint64_t seed) {
    enum { ROWS = 100 };
    struct test_random random = {seed};
    float *x = random_floats(&random, (size_t)(ROWS * k), -3, 3);
    float *w = random_floats(&random, (size_t)(n * k), -1, 1);
    float *expected = random_floats(&random, (size_t)(ROWS * n), 0, 0);
    float *shuffled = random_floats(&random, (size_t)(ROWS * k), 0, 0);
    float *out = random_floats(&random, (size_t)(ROWS * n), 0, 0);
    struct weight *weight = linear_pack(backend, w, n, k, format);
    backend_linear(backend, expected, x, k, weight, NULL, ROWS);
    for (int n_rows = 1; n_rows <= ROWS; n_rows = n_rows < 33 ? n_rows + 1 : n_rows == 33 ? 64
                                                              : n_rows == 64 ? ROWS : ROWS + 1) {
        int source[ROWS];
        for (int r = 0; r < n_rows; r++) {
            source[r] = random_below(&random, ROWS);
            memcpy(shuffled + r * k, x + source[r] * k, (size_t)k * sizeof *x);
        }
        memset(out, 0xff, (size_t)(ROWS * n) * sizeof *out);
        backend_linear(backend, out, shuffled, k, weight, NULL, n_rows);
        for (int r = 0; r < n_rows; r++) {
            cr_assert(linear_same(out + r * n, expected + source[r] * n, (size_t)n),
                      "seed %llu %s %s n %d k %d: row %d of %d differs from row %d of 100",
                      (unsigned long long)seed, backend_isa_name(backend), dtype_name(format), n,
                      k, r, n_rows, source[r]);
        }
    }
    backend_weight_free(weight);
    free(x), free(w), free(expected), free(shuffled), free(out);
}

/* --- the tree over leaves --------------------------------------------------------------------- */

/* Borders of 8 leaves over 0..k. */
enum linear_leaves { LINEAR_EVEN, LINEAR_UNEVEN, LINEAR_HOLES, LINEAR_HALF_EMPTY, LINEAR_KINDS };

static inline void linear_leaves(int border[BACKEND_MAX_LEAVES + 1], enum linear_leaves kind, int k,
                                 struct test_random *random) {
    border[0] = 0;
    border[BACKEND_MAX_LEAVES] = k;
    for (int l = 1; l < BACKEND_MAX_LEAVES; l++) {
        int even = (int)((long)k * l / BACKEND_MAX_LEAVES);
        int odd = border[l - 1] + random_below(random, k - border[l - 1] + 1) / 2;
        switch (kind) {
        case LINEAR_EVEN: border[l] = even; break;
        case LINEAR_UNEVEN: border[l] = odd; break;
        case LINEAR_HOLES: border[l] = l % 3 == 0 ? border[l - 1] : odd; break;
        default: border[l] = l < 5 ? 0 : odd; break; /* the first half of the ranks has nothing */
        }
    }
}

struct linear_tree_case {
    struct backend *backend;
    const float *x, *w;
    int n, k, n_rows;
    const int *border;
    enum dtype format;
};

/* Rank `rank` of `degree`: packs its leaves from its slice of W, multiplies its slice of x. */
static inline void linear_rank_root(float *root, const struct linear_tree_case *c, int rank,
                                    int degree) {
    int per_rank = BACKEND_MAX_LEAVES / degree, first = rank * per_rank;
    int begin = c->border[first], k = c->border[first + per_rank] - begin;
    int border[BACKEND_MAX_LEAVES + 1];
    for (int l = 0; l <= per_rank; l++) border[l] = c->border[first + l] - begin;
    float *slice = calloc((size_t)(c->n_rows * k) + 1, sizeof *slice);
    if (slice == NULL) abort();
    for (int r = 0; r < c->n_rows; r++) {
        memcpy(slice + r * k, c->x + r * c->k + begin, (size_t)k * sizeof *slice);
    }
    struct weight_source source = {c->w + begin, DTYPE_F32, c->k, c->n};
    struct weight *weight = NULL;
    struct error err = {0};
    enum status status = backend_weight_create(&weight, c->backend, &source, 1, k, border, per_rank,
                                               c->format, &err);
    if (status != STATUS_OK) abort();
    backend_linear_tree(c->backend, root, slice, weight, c->n_rows);
    backend_weight_free(weight);
    free(slice);
}

static inline void linear_tree_of_ranks(float *residual, const struct linear_tree_case *c,
                                        const float *bias, int degree) {
    size_t size = (size_t)(c->n_rows * c->n);
    float *roots = calloc(size * (size_t)degree, sizeof *roots);
    if (roots == NULL) abort();
    for (int rank = 0; rank < degree; rank++) {
        linear_rank_root(roots + (size_t)rank * size, c, rank, degree);
    }
    backend_tree_sum(c->backend, residual, roots, degree, bias, c->n_rows, c->n);
    free(roots);
}

/* The whole tree in double: the bound is the sum of the leaves' bounds. */
static inline void linear_check_tree_values(const struct linear_tree_case *c, const float *residual,
                                            const float *before, const float *bias, uint64_t seed) {
    for (int i = 0; i < c->n_rows * c->n; i++) {
        const float *row = c->x + i / c->n * c->k, *column = c->w + i % c->n * c->k;
        struct reference_product product =
            reference_dot(row, column, c->k, c->format == DTYPE_BF16);
        double extra = fabsf(before[i]) + fabsf(bias[i % c->n]);
        double bound = reference_f32_bound(c->k, product.magnitude + extra);
        for (int l = 0; l < BACKEND_MAX_LEAVES && c->format == DTYPE_I8; l++) {
            int at = c->border[l];
            bound += reference_i8_drift(row + at, column + at, c->border[l + 1] - at);
        }
        double expected = (double)before[i] + product.sum + bias[i % c->n];
        cr_assert(fabs(residual[i] - expected) <= bound,
                  "seed %llu: tree at %d: %.9g, expected %.9g within %.3g",
                  (unsigned long long)seed, i, residual[i], expected, bound);
    }
}

static inline void linear_check_tree(struct backend *backend, enum dtype format,
                                     enum linear_leaves kind, int n, int k, int n_rows,
                                     uint64_t seed) {
    struct test_random random = {seed};
    int border[BACKEND_MAX_LEAVES + 1];
    linear_leaves(border, kind, k, &random);
    size_t size = (size_t)(n_rows * n);
    float *x = random_floats(&random, (size_t)(n_rows * k), -2, 2);
    float *w = random_floats(&random, (size_t)(n * k), -1, 1);
    float *bias = random_floats(&random, (size_t)n, -1, 1);
    float *before = random_floats(&random, size, -4, 4);
    float *expected = random_floats(&random, size, 0, 0);
    float *out = random_floats(&random, size, 0, 0);
    struct linear_tree_case c = {backend, x, w, n, k, n_rows, border, format};
    memcpy(expected, before, size * sizeof *expected);
    linear_tree_of_ranks(expected, &c, bias, 1);
    linear_check_tree_values(&c, expected, before, bias, seed);
    for (int degree = 2; degree <= BACKEND_MAX_LEAVES; degree *= 2) {
        memcpy(out, before, size * sizeof *out);
        linear_tree_of_ranks(out, &c, bias, degree);
        cr_assert(linear_same(out, expected, size),
                  "seed %llu %s %s leaves %d n %d k %d: degree %d", (unsigned long long)seed,
                  backend_isa_name(backend), dtype_name(format), (int)kind, n, k, degree);
    }
    free(x), free(w), free(bias), free(before), free(expected), free(out);
}

static inline void linear_check_all_trees(struct backend *backend) {
    static const int ks[] = {1, 7, 64, 100, 515};
    static const int rows[] = {1, 3, 17};
    for (int f = 0; f < LINEAR_COUNT(linear_formats); f++) {
        for (int kind = 0; kind < LINEAR_KINDS; kind++) {
            for (int k = 0; k < LINEAR_COUNT(ks); k++) {
                linear_check_tree(backend, linear_formats[f], (enum linear_leaves)kind,
                                  linear_sizes_n[(kind + k) % 5], ks[k], rows[k % 3],
                                  (uint64_t)(5000 + 100 * f + 10 * kind + k));
            }
        }
    }
}

/* --- int8 ------------------------------------------------------------------------------------- */

/* Integers of -127..127 with a 127 in every row have a scale of 1: the product is exact. */
static inline void linear_check_i8_exact(struct backend *backend, int n, int k, int n_rows,
                                         uint64_t seed) {
    struct test_random random = {seed};
    float *x = random_floats(&random, (size_t)(n_rows * k), 0, 0);
    float *w = random_floats(&random, (size_t)(n * k), 0, 0);
    float *out = random_floats(&random, (size_t)(n_rows * n), 0, 0);
    for (int i = 0; i < n_rows * k; i++) x[i] = (float)(random_below(&random, 255) - 127);
    for (int i = 0; i < n * k; i++) w[i] = (float)(random_below(&random, 255) - 127);
    for (int r = 0; r < n_rows; r++) x[r * k + random_below(&random, k)] = r % 2 ? 127 : -127;
    for (int o = 0; o < n; o++) w[o * k + random_below(&random, k)] = o % 2 ? 127 : -127;
    struct weight *weight = linear_pack(backend, w, n, k, DTYPE_I8);
    backend_linear(backend, out, x, k, weight, NULL, n_rows);
    for (int i = 0; i < n_rows * n; i++) {
        double sum = reference_dot(x + i / n * k, w + i % n * k, k, 0).sum;
        cr_assert(out[i] == (float)sum, "seed %llu %s n %d k %d at %d: %.9g, expected %.9g",
                  (unsigned long long)seed, backend_isa_name(backend), n, k, i, out[i], sum);
    }
    backend_weight_free(weight);
    free(x), free(w), free(out);
}

/* The largest magnitudes everywhere: no sum may saturate on its way. */
static inline void linear_check_i8_extremes(struct backend *backend, int sign) {
    enum { N = 17, K = 1000, ROWS = 3 };
    static float x[ROWS * K], w[N * K], out[ROWS * N];
    for (int i = 0; i < ROWS * K; i++) x[i] = 127;
    for (int i = 0; i < N * K; i++) w[i] = (float)(127 * sign);
    struct weight *weight = linear_pack(backend, w, N, K, DTYPE_I8);
    backend_linear(backend, out, x, K, weight, NULL, ROWS);
    for (int i = 0; i < ROWS * N; i++) {
        cr_assert(out[i] == (float)(127 * 127 * K * sign), "%s at %d: %.9g",
                  backend_isa_name(backend), i, out[i]);
    }
    backend_weight_free(weight);
}

/* Rows and outputs of zeros have a scale of 0: they give +0, no NaN. */
static inline void linear_check_zeros(struct backend *backend, enum dtype format) {
    enum { N = 20, K = 37 };
    static float zeros[N * K], ones[N * K], out[2 * N];
    for (int i = 0; i < N * K; i++) ones[i] = 1;
    for (int c = 0; c < K; c++) ones[c] = 0; /* row 0 of x, output 0 of w */
    struct weight *weight = linear_pack(backend, ones, N, K, format);
    backend_linear(backend, out, ones, K, weight, NULL, 2);
    for (int i = 0; i < 2 * N; i++) {
        float expected = i / N == 0 || i % N == 0 ? 0.0f : (float)K;
        cr_assert(linear_same(&out[i], &expected, 1) || fabsf(out[i] - expected) < 1e-4f * expected,
                  "%s %s at %d: %.9g", backend_isa_name(backend), dtype_name(format), i, out[i]);
    }
    backend_weight_free(weight);
    weight = linear_pack(backend, zeros, N, K, format);
    backend_linear(backend, out, ones, K, weight, NULL, 2);
    for (int i = 0; i < 2 * N; i++) cr_assert(out[i] == 0);
    backend_weight_free(weight);
}

static inline void linear_check_i8(struct backend *backend) {
    for (int n = 0; n < LINEAR_COUNT(linear_sizes_n); n++) {
        for (int k = 0; k < LINEAR_COUNT(linear_sizes_k); k++) {
            linear_check_i8_exact(backend, linear_sizes_n[n], linear_sizes_k[k], 1 + 6 * n,
                                  (uint64_t)(9000 + 10 * n + k));
        }
    }
    linear_check_i8_extremes(backend, 1);
    linear_check_i8_extremes(backend, -1);
}
