/* The row-wise ops on every instruction set: values, ragged widths, and rows that depend on
 * themselves alone. */
#include <stdio.h>
#include <string.h>

#include "common/dtype.h"
#include "kernels/backend.h"
#include "tests/reference/isas.h"
#include "tests/reference/ops.h"
#include "tests/reference/pass.h"
#include "tests/reference/random.h"
#include "tests/unit/test.h"

static const int widths[] = {1, 3, 15, 16, 17, 31, 100, 576, 2049};
enum { N_WIDTHS = sizeof widths / sizeof *widths };

static void on_every_isa(void (*check)(struct backend *backend)) {
    for (enum backend_isa isa = BACKEND_PORTABLE; isa < BACKEND_N_ISAS; isa++) {
        if (!computes_here(isa)) continue;
        for (int n_threads = 1; n_threads <= 3; n_threads++) {
            struct backend *backend = open_backend(isa, n_threads, 128, 4096);
            check(backend);
            backend_destroy(backend);
        }
    }
}

static int same(const float *a, const float *b, size_t n) {
    return memcmp(a, b, n * sizeof *a) == 0;
}

/* --- RMSNorm ---------------------------------------------------------------------------------- */

static void rmsnorm_of(struct backend *backend, int n_rows, int width, float spread) {
    struct test_random random = {(uint64_t)(width * 100 + n_rows)};
    size_t n = (size_t)(n_rows * width);
    float *in = random_floats(&random, n, -spread, spread), *out = random_floats(&random, n, 7, 8);
    float *weight = random_floats(&random, (size_t)width, -2, 2);
    float *alone = random_floats(&random, (size_t)width, 7, 8);
    double *expected = calloc((size_t)width, sizeof *expected);
    backend_rmsnorm(backend, out, in, weight, 1e-5f, n_rows, width);
    for (int r = 0; r < n_rows; r++) {
        const float *row = in + r * width;
        reference_rmsnorm(expected, row, weight, 1e-5f, width);
        /* A sum of squares in 16 lanes, and six roundings behind it. */
        for (int i = 0; i < width; i++) {
            double bound = fabs(expected[i]) * (width / 16 + 12) * 0x1p-24;
            cr_assert(fabs(out[r * width + i] - expected[i]) <= bound,
                      "%s rows %d width %d at %d, %d: %.9g, expected %.9g",
                      backend_isa_name(backend), n_rows, width, r, i, out[r * width + i],
                      expected[i]);
        }
        backend_rmsnorm(backend, alone, row, weight, 1e-5f, 1, width);
        cr_assert(same(alone, out + r * width, (size_t)width), "row %d of %d alone", r, n_rows);
    }
    backend_rmsnorm(backend, in, in, weight, 1e-5f, n_rows, width);
    cr_assert(same(in, out, n), "in place");
    free(in), free(out), free(weight), free(alone), free(expected);
}

static void rmsnorm(struct backend *backend) {
    for (int w = 0; w < N_WIDTHS; w++) {
        rmsnorm_of(backend, 1 + 3 * w, widths[w], 3);
        rmsnorm_of(backend, 2, widths[w], 1e-4f); /* where eps counts */
        rmsnorm_of(backend, 2, widths[w], 1e6f);
    }
}

Test(ops, rmsnorm) {
    on_every_isa(rmsnorm);
}

static void rmsnorm_zeros(struct backend *backend) {
    float zeros[17] = {0}, weight[17], out[17];
    for (int i = 0; i < 17; i++) weight[i] = 3;
    backend_rmsnorm(backend, out, zeros, weight, 1e-6f, 1, 17);
    for (int i = 0; i < 17; i++) cr_assert_eq(out[i], 0.0f);
}

Test(ops, rmsnorm_of_zeros_is_zero) {
    on_every_isa(rmsnorm_zeros);
}

/* --- SwiGLU ----------------------------------------------------------------------------------- */

static void swiglu_of(struct backend *backend, int n_rows, int width, float spread) {
    struct test_random random = {(uint64_t)(width * 100 + n_rows)};
    size_t n = (size_t)(n_rows * width);
    float *in = random_floats(&random, 2 * n, -spread, spread);
    float *out = random_floats(&random, n, 7, 8);
    float *alone = random_floats(&random, (size_t)width, 7, 8);
    backend_swiglu(backend, out, in, n_rows, width);
    for (int r = 0; r < n_rows; r++) {
        const float *gate = in + 2 * r * width, *up = gate + width;
        for (int i = 0; i < width; i++) {
            double expected = reference_swiglu(gate[i], up[i]);
            /* Relative; below a gate of -87 the result is any number next to 0. */
            double bound = 1e-6 * fabs(expected) + 1e-28;
            cr_assert(fabs(out[r * width + i] - expected) <= bound,
                      "%s width %d gate %.9g up %.9g: %.9g, expected %.9g",
                      backend_isa_name(backend), width, gate[i], up[i], out[r * width + i],
                      expected);
        }
        backend_swiglu(backend, alone, gate, 1, width);
        cr_assert(same(alone, out + r * width, (size_t)width), "row %d of %d alone", r, n_rows);
    }
    free(in), free(out), free(alone);
}

static void swiglu(struct backend *backend) {
    for (int w = 0; w < N_WIDTHS; w++) {
        swiglu_of(backend, 1 + 2 * w, widths[w], 4);
        swiglu_of(backend, 2, widths[w], 100);
        swiglu_of(backend, 2, widths[w], 1e4f);
    }
}

Test(ops, swiglu) {
    on_every_isa(swiglu);
}

/* --- the tree over ranks ---------------------------------------------------------------------- */

static void tree_of(struct backend *backend, int n_roots, int n_rows, int width, bool with_bias) {
    struct test_random random = {(uint64_t)(width * 100 + n_rows * 10 + n_roots)};
    int n = n_rows * width;
    float *roots = random_floats(&random, (size_t)(n_roots * n), -1, 1);
    float *before = random_floats(&random, (size_t)n, -5, 5);
    float *residual = random_floats(&random, (size_t)n, 0, 0);
    float *bias = random_floats(&random, (size_t)width, -1, 1);
    memcpy(residual, before, (size_t)n * sizeof *residual);
    backend_tree_sum(backend, residual, roots, n_roots, with_bias ? bias : NULL, n_rows, width);
    for (int i = 0; i < n; i++) {
        float sum = reference_tree(roots + i, n_roots, n);
        if (with_bias) sum += bias[i % width];
        cr_assert(residual[i] == before[i] + sum, "%s roots %d rows %d width %d at %d: %.9g",
                  backend_isa_name(backend), n_roots, n_rows, width, i, residual[i]);
    }
    free(roots), free(before), free(residual), free(bias);
}

static void tree(struct backend *backend) {
    for (int w = 0; w < N_WIDTHS; w++) {
        for (int n_roots = 1; n_roots <= BACKEND_MAX_LEAVES; n_roots *= 2) {
            tree_of(backend, n_roots, 1 + w, widths[w], false);
            tree_of(backend, n_roots, 9, widths[w], true);
        }
    }
}

Test(ops, tree_sum_adds_in_the_order_of_the_tree) {
    on_every_isa(tree);
}

/* --- embedding -------------------------------------------------------------------------------- */

/* Small integers and halves: every format holds them. */
static void embed(struct backend *backend) {
    enum { VOCAB = 37, WIDTH = 21, STRIDE = 23, ROWS = 20 };
    static const uint16_t f16[] = {0x0000, 0x3800, 0x3c00, 0x4000, 0xc200, 0xb800, 0x5640, 0x0001};
    static const float values[] = {0, 0.5f, 1, 2, -3, -0.5f, 100, 0x1p-24f};
    static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
    static char memory[4 * VOCAB * STRIDE + 1];
    int32_t tokens[ROWS];
    float out[ROWS * WIDTH];
    for (int r = 0; r < ROWS; r++) tokens[r] = r == 0 ? VOCAB - 1 : r * 7 % VOCAB;
    for (int d = 0; d < 3; d++) {
        for (int i = 0; i < VOCAB * STRIDE; i++) {
            int choice = (i * 5 + i / 3) % 8;
            uint16_t half = d == 1 ? f16[choice] : bf16_from_f32(values[choice]);
            if (d == 0) memcpy(memory + 1 + 4 * i, &values[choice], 4);
            else memcpy(memory + 1 + 2 * i, &half, 2);
        }
        struct weight_source source = {memory + 1, dtypes[d], STRIDE, VOCAB};
        struct backend_pass pass = {.tokens = tokens, .n_rows = ROWS};
        struct table *table;
        struct error err;
        cr_assert_eq(backend_table_create(&table, backend, &source, WIDTH, &err), STATUS_OK);
        backend_pass_begin(backend, &pass);
        backend_embed(backend, out, table, ROWS, WIDTH);
        backend_table_free(table);
        for (int i = 0; i < ROWS * WIDTH; i++) {
            int at = tokens[i / WIDTH] * STRIDE + i % WIDTH;
            float expected = values[(at * 5 + at / 3) % 8];
            cr_assert(out[i] == expected, "%s at %d: %.9g, expected %.9g", dtype_name(dtypes[d]), i,
                      out[i], expected);
        }
    }
}

Test(ops, embed_reads_every_format_at_any_address) {
    on_every_isa(embed);
}

/* --- rotation --------------------------------------------------------------------------------- */

struct rope_case {
    int head_dim, n_heads, n_kv;
    bool with_norm;
};

enum { ROPE_POSITIONS = 600, ROPE_BLOCKS = 80 };

static void check_rope_row(struct backend *backend, const struct rope_case *c, const float *before,
                           const float *after, const float *norms, const float *inv_freq,
                           int position) {
    double expected[256];
    int dim = c->head_dim;
    for (int h = 0; h < c->n_heads + c->n_kv; h++) {
        const float *norm = h < c->n_heads ? norms : norms + dim;
        reference_rope(expected, before + h * dim, c->with_norm ? norm : NULL, 1e-6f, inv_freq, dim,
                       position);
        for (int i = 0; i < dim; i++) {
            int pair = i % (dim / 2);
            double size = fabs(expected[pair]) + fabs(expected[pair + dim / 2]);
            /* The angle is an f32 product; norm and rotation are some roundings. */
            double bound = size * (2e-6 + (double)position * inv_freq[pair] * 0x1p-23);
            cr_assert(fabs(after[h * dim + i] - expected[i]) <= bound,
                      "%s head_dim %d norm %d position %d head %d at %d: %.9g, expected %.9g",
                      backend_isa_name(backend), dim, c->with_norm, position, h, i,
                      after[h * dim + i], expected[i]);
        }
    }
    int first_v = (c->n_heads + c->n_kv) * dim;
    cr_assert(same(after + first_v, before + first_v, (size_t)(c->n_kv * dim)), "v is left alone");
}

/* Three segments at far positions; each row also by itself. */
static void rope_of(struct backend *backend, const struct rope_case *c) {
    enum { ROWS = 24 };
    struct test_random random = {(uint64_t)(c->head_dim * 10 + c->with_norm)};
    int width = (c->n_heads + 2 * c->n_kv) * c->head_dim;
    float *before = random_floats(&random, (size_t)(ROWS * width), -3, 3);
    float *after = random_floats(&random, (size_t)(ROWS * width), 0, 0);
    float *alone = random_floats(&random, (size_t)width, 0, 0);
    float *norms = random_floats(&random, (size_t)(2 * c->head_dim), 0.5f, 2);
    float inv_freq[128];
    for (int i = 0; i < c->head_dim / 2; i++) {
        inv_freq[i] = powf(1e4f, -2.0f * (float)i / (float)c->head_dim);
    }
    int32_t table[ROPE_BLOCKS];
    for (int i = 0; i < ROPE_BLOCKS; i++) table[i] = (i * 7 + 3) % ROPE_BLOCKS;
    struct kv_cache *cache = NULL;
    struct rope_table *rope = NULL;
    struct error err = {0};
    cr_assert_eq(backend_kv_create(&cache, backend, ROPE_BLOCKS, c->n_kv, c->head_dim, &err),
                 STATUS_OK);
    cr_assert_eq(backend_rope_create(&rope, backend, inv_freq, c->head_dim, ROPE_POSITIONS, &err),
                 STATUS_OK);
    const float *q_norm = c->with_norm ? norms : NULL;
    const float *k_norm = c->with_norm ? norms + c->head_dim : NULL;
    struct backend_segment segments[3] = {
        {17, 7, 593, table}, {0, 1, 0, table}, {1, 16, 250, table}};
    memcpy(after, before, (size_t)(ROWS * width) * sizeof *after);
    struct backend_pass pass;
    begin_pass(backend, &pass, segments, 3);
    backend_rope_kv_write(backend, after, cache, rope, q_norm, k_norm, 1e-6f, c->n_heads);
    for (int s = 0; s < 3; s++) {
        for (int i = 0; i < segments[s].n_rows; i++) {
            int row = segments[s].row + i, position = segments[s].position + i;
            check_rope_row(backend, c, before + row * width, after + row * width, norms, inv_freq,
                           position);
            struct backend_segment one = {0, 1, position, table};
            memcpy(alone, before + row * width, (size_t)width * sizeof *alone);
            struct backend_pass pass_of_one;
            begin_pass(backend, &pass_of_one, &one, 1);
            backend_rope_kv_write(backend, alone, cache, rope, q_norm, k_norm, 1e-6f, c->n_heads);
            cr_assert(same(alone, after + row * width, (size_t)width), "row %d alone", row);
        }
    }
    backend_rope_free(rope);
    backend_kv_free(cache);
    free(before), free(after), free(alone), free(norms);
}

static void rope(struct backend *backend) {
    static const struct rope_case cases[] = {{8, 2, 1, false},  {8, 2, 1, true}, {32, 3, 2, true},
                                             {64, 4, 2, false}, {80, 5, 1, true}, {96, 1, 1, true},
                                             {128, 2, 2, true}, {128, 7, 1, false}};
    for (int i = 0; i < 8; i++) rope_of(backend, &cases[i]);
}

Test(ops, rope_norms_and_rotates_q_and_k) {
    on_every_isa(rope);
}

/* What was written is what attention reads: a row that sees itself alone gets its v, in bf16. */
static void written_values(struct backend *backend) {
    enum { DIM = 24, KV = 3 };
    float still[DIM / 2] = {0}, qkv[3 * KV * DIM], out[KV * DIM];
    struct kv_cache *cache = NULL;
    struct rope_table *rope = NULL;
    struct error err = {0};
    cr_assert_eq(backend_kv_create(&cache, backend, 4, KV, DIM, &err), STATUS_OK);
    cr_assert_eq(backend_rope_create(&rope, backend, still, DIM, 40, &err), STATUS_OK);
    int32_t table[3] = {2, 0, 3};
    int kv_of_head[KV] = {0, 1, 2};
    for (int position = 0; position < 40; position++) {
        struct test_random random = {(uint64_t)position};
        for (int i = 0; i < 3 * KV * DIM; i++) qkv[i] = random_f32(&random, -1, 1);
        struct backend_segment segment = {0, 1, position, table};
        struct backend_pass pass;
        begin_pass(backend, &pass, &segment, 1);
        backend_rope_kv_write(backend, qkv, cache, rope, NULL, NULL, 1e-6f, KV);
        backend_attention(backend, out, qkv, 3 * KV * DIM, cache, kv_of_head, KV, 1);
        for (int i = 0; i < KV * DIM; i++) {
            float expected = bf16_to_f32(bf16_from_f32(qkv[2 * KV * DIM + i]));
            cr_assert(out[i] == expected, "position %d at %d: %.9g, expected %.9g", position, i,
                      out[i], expected);
        }
    }
    backend_rope_free(rope);
    backend_kv_free(cache);
}

Test(ops, kv_write_rounds_to_bf16_and_nothing_else) {
    on_every_isa(written_values);
}

Test(ops, kv_block_bytes_hold_k_and_v) {
    cr_assert_eq(backend_kv_block_bytes(1, 64), (size_t)(2 * 16 * 64 * 2));
    cr_assert_eq(backend_kv_block_bytes(3, 80), (size_t)(3 * 2 * 16 * 96 * 2), "as on a device");
    cr_assert(backend_kv_block_bytes(2, 8) >= (size_t)(2 * 2 * 16 * 8 * 2));
}

Test(ops, memory_is_zeroed_and_aligned) {
    struct backend *backend = open_backend(BACKEND_PORTABLE, 1, 128, 4096);
    for (size_t bytes = 0; bytes < 300; bytes += 37) {
        char *memory = backend_alloc(backend, bytes);
        cr_assert_not_null(memory);
        cr_assert_eq((uintptr_t)memory % 64, 0u);
        for (size_t i = 0; i < bytes; i++) cr_assert_eq(memory[i], 0);
        memset(memory, 1, bytes);
        backend_free(backend, memory);
    }
    backend_destroy(backend);
}
