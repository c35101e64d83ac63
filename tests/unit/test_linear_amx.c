/* The AMX kernel on any processor: its text is compiled here over tiles in plain C, and takes the
 * place of the library's. */
#define TILE_EMULATION
#include "kernels/cpu/linear_amx.c"

#include "tests/unit/linear_checks.h"

/* A backend whose products are the AMX kernel's: the layout is chosen when a weight is packed, so
 * the instruction set may be set after creation. */
static struct backend *open_emulated(int n_threads) {
    struct backend_options options = {BACKEND_PORTABLE, n_threads, 128, 2048, 0};
    struct backend *backend = NULL;
    struct error err = {0};
    if (backend_create(&backend, &options, &err) != STATUS_OK) abort();
    backend->isa = BACKEND_AMX;
    return backend;
}

Test(linear_amx, agrees_with_double) {
    struct backend *backend = open_emulated(1);
    linear_check_all_values(backend);
    backend_destroy(backend);
}

Test(linear_amx, a_row_depends_on_itself_alone) {
    for (int n_threads = 1; n_threads <= 3; n_threads += 2) {
        struct backend *backend = open_emulated(n_threads);
        for (int f = 0; f < LINEAR_COUNT(linear_formats); f++) {
            linear_check_row_invariance(backend, linear_formats[f], 100, 100, 41);
            linear_check_row_invariance(backend, linear_formats[f], 33, 260, 42);
            linear_check_row_invariance(backend, linear_formats[f], 1, 3, 43);
        }
        backend_destroy(backend);
    }
}

Test(linear_amx, the_tree_is_the_same_at_every_degree) {
    struct backend *backend = open_emulated(2);
    linear_check_all_trees(backend);
    backend_destroy(backend);
}

Test(linear_amx, int8_is_exact_where_the_scale_is_one) {
    struct backend *backend = open_emulated(1);
    linear_check_i8(backend);
    backend_destroy(backend);
}

Test(linear_amx, zeros_give_zero) {
    struct backend *backend = open_emulated(1);
    linear_check_zeros(backend, DTYPE_BF16);
    linear_check_zeros(backend, DTYPE_I8);
    backend_destroy(backend);
}

Test(linear_amx, threads_do_not_change_bits) {
    enum { N = 150, K = 70, ROWS = 20 };
    struct test_random random = {44};
    float *x = random_floats(&random, ROWS * K, -1, 1);
    float *w = random_floats(&random, N * K, -1, 1);
    static float out[3][ROWS * N];
    for (int f = 0; f < LINEAR_COUNT(linear_formats); f++) {
        for (int t = 0; t < 3; t++) {
            struct backend *backend = open_emulated(t + 1);
            struct weight *weight = linear_pack(backend, w, N, K, linear_formats[f]);
            backend_linear(backend, out[t], x, K, weight, NULL, ROWS);
            backend_weight_free(weight);
            backend_destroy(backend);
        }
        cr_assert(linear_same(out[0], out[1], ROWS * N) && linear_same(out[0], out[2], ROWS * N),
                  "%s", dtype_name(linear_formats[f]));
    }
    free(x), free(w);
}
