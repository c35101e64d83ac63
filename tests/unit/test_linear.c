/* Products with packed weights on every instruction set that this processor has. */
#include "tests/reference/isas.h"
#include "tests/unit/linear_checks.h"

static void on_every_isa(void (*check)(struct backend *backend), int n_threads) {
    for (enum backend_isa isa = BACKEND_PORTABLE; isa < BACKEND_N_ISAS; isa++) {
        if (!computes_here(isa)) continue;
        struct backend *backend = open_backend(isa, n_threads, 128, 2048);
        check(backend);
        backend_destroy(backend);
    }
}

Test(linear, agrees_with_double) {
    on_every_isa(linear_check_all_values, 1);
}

Test(linear, agrees_with_double_on_two_threads) {
    on_every_isa(linear_check_all_values, 2);
}

static void row_invariance(struct backend *backend) {
    for (int f = 0; f < LINEAR_COUNT(linear_formats); f++) {
        linear_check_row_invariance(backend, linear_formats[f], 100, 100, 11);
        linear_check_row_invariance(backend, linear_formats[f], 33, 515, 12);
        linear_check_row_invariance(backend, linear_formats[f], 15, 31, 13);
        linear_check_row_invariance(backend, linear_formats[f], 1, 3, 14);
    }
}

Test(linear, a_row_depends_on_itself_alone) {
    on_every_isa(row_invariance, 1);
}

Test(linear, a_row_depends_on_itself_alone_on_three_threads) {
    on_every_isa(row_invariance, 3);
}

Test(linear, the_tree_is_the_same_at_every_degree) {
    on_every_isa(linear_check_all_trees, 1);
}

Test(linear, the_tree_is_the_same_at_every_degree_on_two_threads) {
    on_every_isa(linear_check_all_trees, 2);
}

static void threads_of(enum backend_isa isa, enum dtype format, int n, int k, int n_rows) {
    struct test_random random = {(uint64_t)(n * 1000 + k)};
    size_t size = (size_t)(n_rows * n);
    float *x = random_floats(&random, (size_t)(n_rows * k), -1, 1);
    float *w = random_floats(&random, (size_t)(n * k), -1, 1);
    float *out[3];
    for (int t = 0; t < 3; t++) {
        out[t] = random_floats(&random, size, 1, 2);
        struct backend *backend = open_backend(isa, t + 1, 128, 2048);
        struct weight *weight = linear_pack(backend, w, n, k, format);
        backend_linear(backend, out[t], x, k, weight, NULL, n_rows);
        backend_weight_free(weight);
        backend_destroy(backend);
    }
    cr_assert(linear_same(out[0], out[1], size) && linear_same(out[0], out[2], size),
              "%s %s n %d k %d rows %d", backend_isa_to_name(isa), dtype_name(format), n, k,
              n_rows);
    for (int t = 0; t < 3; t++) free(out[t]);
    free(x), free(w);
}

Test(linear, threads_do_not_change_bits) {
    for (enum backend_isa isa = BACKEND_PORTABLE; isa < BACKEND_N_ISAS; isa++) {
        if (!computes_here(isa)) continue;
        for (int f = 0; f < LINEAR_COUNT(linear_formats); f++) {
            for (int n = 0; n < LINEAR_COUNT(linear_sizes_n); n++) {
                threads_of(isa, linear_formats[f], linear_sizes_n[n], 100, 1 + 8 * n);
            }
            threads_of(isa, linear_formats[f], 300, 260, 20);
        }
    }
}

Test(linear, int8_is_exact_where_the_scale_is_one) {
    on_every_isa(linear_check_i8, 1);
}

static void zeros(struct backend *backend) {
    for (int f = 0; f < LINEAR_COUNT(linear_formats); f++) {
        linear_check_zeros(backend, linear_formats[f]);
    }
}

Test(linear, zeros_give_zero) {
    on_every_isa(zeros, 1);
}

/* --- checkpoint memory ------------------------------------------------------------------------ */

/* Values that f16 and bf16 both hold exactly: sign, four bits of mantissa, small exponents. */
static void fill_exact(float *w, int n, struct test_random *random) {
    for (int i = 0; i < n; i++) {
        float magnitude = (float)(16 + random_below(random, 16));
        float value = random_below(random, 2) ? magnitude : -magnitude;
        w[i] = ldexpf(value, -random_below(random, 8) - 4);
    }
}

/* The f16 of a value of fill_exact: a normal number with its low mantissa bits zero. */
static uint16_t exact_f16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits >> 16 & 0x8000u) | (((bits >> 23 & 0xffu) - 112u) << 10) |
                      (bits >> 13 & 0x3ffu));
}

/* Writes element i of a matrix of checkpoint memory that begins at an odd address. */
static void store_element(char *data, enum dtype dtype, size_t i, float value) {
    uint16_t half = dtype == DTYPE_F16 ? exact_f16(value) : bf16_from_f32(value);
    if (dtype == DTYPE_F32) memcpy(data + 4 * i, &value, 4);
    else memcpy(data + 2 * i, &half, 2);
}

static void sources(struct backend *backend) {
    enum { N = 33, K = 45, STRIDE = 50, ROWS = 5 };
    static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_F16, DTYPE_BF16};
    static float w[N * K], x[ROWS * K], expected[ROWS * N], out[ROWS * N];
    static char memory[3][4 * N * STRIDE + 1];
    struct test_random random = {21};
    fill_exact(w, N * K, &random);
    for (int i = 0; i < ROWS * K; i++) x[i] = random_f32(&random, -1, 1);
    for (int f = 0; f < LINEAR_COUNT(linear_formats); f++) {
        struct weight *weight = linear_pack(backend, w, N, K, linear_formats[f]);
        backend_linear(backend, expected, x, K, weight, NULL, ROWS);
        backend_weight_free(weight);
        struct weight_source stacked[3]; /* rows 0..10 as f32, 11..21 as f16, 22..32 as bf16 */
        for (int d = 0; d < 3; d++) {
            for (int r = 0; r < N; r++) {
                for (int c = 0; c < K; c++) {
                    store_element(memory[d] + 1, dtypes[d], (size_t)(r * STRIDE + c), w[r * K + c]);
                }
            }
            struct weight_source source = {memory[d] + 1, dtypes[d], STRIDE, N};
            stacked[d] = source;
            stacked[d].n_rows = N / 3;
            stacked[d].data = memory[d] + 1 + (size_t)(N / 3 * d * STRIDE) * dtype_bytes(dtypes[d]);
            struct error err = {0};
            enum status status = backend_weight_create(&weight, backend, &source, 1, K, NULL, 1,
                                                       linear_formats[f], &err);
            cr_assert_eq(status, STATUS_OK, "%s", err.text);
            backend_linear(backend, out, x, K, weight, NULL, ROWS);
            backend_weight_free(weight);
            cr_assert(linear_same(out, expected, ROWS * N), "%s source, %s", dtype_name(dtypes[d]),
                      dtype_name(linear_formats[f]));
        }
        struct error err = {0};
        enum status status = backend_weight_create(&weight, backend, stacked, 3, K, NULL, 1,
                                                   linear_formats[f], &err);
        cr_assert_eq(status, STATUS_OK, "%s", err.text);
        backend_linear(backend, out, x, K, weight, NULL, ROWS);
        backend_weight_free(weight);
        cr_assert(linear_same(out, expected, ROWS * N), "stacked, %s",
                  dtype_name(linear_formats[f]));
    }
}

Test(linear, every_source_and_any_alignment_gives_the_same_bits) {
    on_every_isa(sources, 1);
}

Test(linear, rows_of_the_output_are_written_and_nothing_else) {
    for (enum backend_isa isa = BACKEND_PORTABLE; isa < BACKEND_N_ISAS; isa++) {
        if (!computes_here(isa)) continue;
        enum { N = 19, K = 8, ROWS = 7 };
        struct backend *backend = open_backend(isa, 1, 128, 2048);
        struct test_random random = {31};
        float *w = random_floats(&random, N * K, -1, 1);
        float *x = random_floats(&random, ROWS * K, -1, 1);
        float out[N * ROWS + 32];
        for (int i = 0; i < N * ROWS + 32; i++) out[i] = 12345;
        struct weight *weight = linear_pack(backend, w, N, K, DTYPE_BF16);
        backend_linear(backend, out + 16, x, K, weight, NULL, 0);
        for (int i = 0; i < N * ROWS + 32; i++) cr_assert(out[i] == 12345);
        backend_linear(backend, out + 16, x, K, weight, NULL, ROWS);
        for (int i = 0; i < 16; i++) cr_assert(out[i] == 12345 && out[16 + N * ROWS + i] == 12345);
        for (int i = 0; i < N * ROWS; i++) cr_assert(out[16 + i] != 12345);
        cr_assert(backend_weight_bytes(weight) >= N * K * 2);
        backend_weight_free(weight);
        backend_destroy(backend);
        free(w), free(x);
    }
}

Test(linear, an_isa_that_is_not_here_is_refused) {
    for (enum backend_isa isa = BACKEND_PORTABLE; isa < BACKEND_N_ISAS; isa++) {
        struct backend_options options = {isa, 1, 1, 1, 0};
        struct backend *backend = NULL;
        struct error err = {0};
        enum status status = backend_create(&backend, &options, &err);
        enum status refusal = isa < BACKEND_CUDA ? STATUS_FAILED_PRECONDITION : STATUS_UNAVAILABLE;
        cr_assert_eq(status, backend_isa_available(isa) ? STATUS_OK : refusal);
        cr_assert_eq(backend_isa_parse(backend_isa_to_name(isa)), (int)isa);
        const char *named = isa == BACKEND_CUDA ? "CUDA" : backend_isa_to_name(isa);
        if (status != STATUS_OK) cr_assert(strstr(err.text, named) != NULL, "%s", err.text);
        backend_destroy(backend);
    }
    cr_assert_eq(backend_isa_parse("sse2"), -1);
    cr_assert(computes_here(backend_isa_best()));
}
