/* Attention over the paged cache: values against double, and the bits that must not depend on how
 * the history was cut, on who shares the batch, on threads, or on what a block held before. */
#include <stdio.h>
#include <string.h>

#include "kernels/backend.h"
#include "tests/reference/isas.h"
#include "tests/reference/attention.h"
#include "tests/reference/pass.h"
#include "tests/reference/random.h"
#include "tests/unit/test.h"

enum { MAX_POSITIONS = 640, MAX_BLOCKS = 128, MAX_HEADS = 16 };

/* A backend with one layer's cache and a rope table that rotates nothing. */
struct fixture {
    struct backend *backend;
    struct kv_cache *cache;
    struct rope_table *rope;
    int n_heads, n_kv, head_dim, window;
    const int *kv_of_head;
};

static void must(enum status status, const struct error *err) {
    if (status == STATUS_OK) return;
    fprintf(stderr, "%s\n", err->text);
    abort();
}

static struct fixture open_fixture(enum backend_isa isa, int n_threads, int head_dim,
                                   const int *kv_of_head, int n_heads, int n_kv, int window) {
    struct fixture f = {NULL, NULL, NULL, n_heads, n_kv, head_dim, window, kv_of_head};
    struct backend_options options = {isa, n_threads, MAX_POSITIONS, 4096, 0};
    struct error err = {0};
    float still[128] = {0};
    must(backend_create(&f.backend, &options, &err), &err);
    must(backend_kv_create(&f.cache, f.backend, MAX_BLOCKS, n_kv, head_dim, &err), &err);
    must(backend_rope_create(&f.rope, f.backend, still, head_dim, MAX_POSITIONS, &err), &err);
    return f;
}

static void close_fixture(struct fixture *f) {
    backend_rope_free(f->rope);
    backend_kv_free(f->cache);
    backend_destroy(f->backend);
}

static int row_width(const struct fixture *f) {
    return (f->n_heads + 2 * f->n_kv) * f->head_dim;
}

static int out_width(const struct fixture *f) {
    return f->n_heads * f->head_dim;
}

static size_t out_floats(const struct fixture *f, int n) {
    return (size_t)(n * out_width(f));
}

static float *random_rows(const struct fixture *f, int n, float scale, uint64_t seed) {
    struct test_random random = {seed};
    return random_floats(&random, (size_t)(n * row_width(f)), -scale, scale);
}

/* Blocks first, first + step, ...: a table that is not the identity. */
static void fill_table(int32_t table[MAX_BLOCKS], int first, int step) {
    for (int i = 0; i < MAX_BLOCKS; i++) table[i] = (first + i * step) % MAX_BLOCKS;
}

static void run_batch(struct fixture *f, float *out, float *qkv,
                      const struct backend_segment *segments, int n_segments) {
    struct backend_pass pass;
    begin_pass(f->backend, &pass, segments, n_segments);
    backend_rope_kv_write(f->backend, qkv, f->cache, f->rope, NULL, NULL, 1e-6f, f->n_heads);
    backend_attention(f->backend, out, qkv, row_width(f), f->cache, f->kv_of_head, f->n_heads,
                      f->window);
}

/* out[n, n_heads * head_dim]: the history at positions 0..n-1, in chunks. */
static void feed(struct fixture *f, float *out, const float *qkv, int n, int chunk,
                 const int32_t *table) {
    float *rows = calloc((size_t)(n * row_width(f)), sizeof *rows);
    if (rows == NULL) abort();
    for (int done = 0; done < n; done += chunk) {
        int now = n - done < chunk ? n - done : chunk;
        memcpy(rows, qkv + done * row_width(f), (size_t)(now * row_width(f)) * sizeof *rows);
        struct backend_segment segment = {0, now, done, table};
        run_batch(f, out + done * out_width(f), rows, &segment, 1);
    }
    free(rows);
}

static int same(const float *a, const float *b, size_t n) {
    return memcmp(a, b, n * sizeof *a) == 0;
}

/* --- values ----------------------------------------------------------------------------------- */

static void check_rows(const struct fixture *f, const float *out, const float *qkv, int n,
                       const char *what) {
    struct reference_history history = {qkv, f->n_heads, f->n_kv, f->head_dim};
    double expected[256];
    int step = n > 40 ? 41 : 1; /* some rows of a long history, the last always */
    for (int p = n - 1; p >= 0; p -= step) {
        for (int h = 0; h < f->n_heads; h++) {
            double bound =
                reference_attention(expected, &history, p, h, f->kv_of_head[h], f->window);
            const float *got = out + p * out_width(f) + h * f->head_dim;
            for (int d = 0; d < f->head_dim; d++) {
                cr_assert(fabs(got[d] - expected[d]) <= bound,
                          "%s %s: head_dim %d context %d window %d row %d head %d at %d: %.9g, "
                          "expected %.9g within %.3g",
                          what, backend_isa_name(f->backend), f->head_dim, n, f->window, p, h, d,
                          got[d], expected[d], bound);
            }
        }
    }
}

static void check_values(enum backend_isa isa, int head_dim, const int *kv_of_head, int n_heads,
                         int n_kv, int n, int window, float scale) {
    struct fixture f = open_fixture(isa, 1, head_dim, kv_of_head, n_heads, n_kv, window);
    float *qkv = random_rows(&f, n, scale, (uint64_t)(head_dim * 1000 + n));
    float *out = random_rows(&f, n, 9, 1);
    int32_t table[MAX_BLOCKS];
    fill_table(table, 3, 5);
    feed(&f, out, qkv, n, n, table);
    check_rows(&f, out, qkv, n, "values");
    free(qkv), free(out);
    close_fixture(&f);
}

static const int contexts[] = {1, 2, 15, 16, 17, 255, 256, 257, 600};
enum { N_CONTEXTS = sizeof contexts / sizeof *contexts };

#define EACH_ISA(isa)                                                                              \
    for (enum backend_isa isa = BACKEND_PORTABLE; isa < BACKEND_N_ISAS; isa++)                       \
        if (computes_here(isa))

Test(attention, agrees_with_double_at_every_head_dim_and_context) {
    static const int dims[] = {8, 32, 64, 80, 96, 128};
    static const int pair[] = {0, 0};
    EACH_ISA(isa) {
        for (int d = 0; d < 6; d++) {
            for (int c = 0; c < N_CONTEXTS; c++) {
                check_values(isa, dims[d], pair, 2, 1, contexts[c], 0, 1.5f);
            }
        }
    }
}

/* Large scores: few positions carry all the weight, and pieces differ by many powers. */
Test(attention, agrees_with_double_where_scores_are_sharp) {
    static const int pair[] = {0, 1};
    EACH_ISA(isa) {
        check_values(isa, 64, pair, 2, 2, 600, 0, 3.9f);
        check_values(isa, 128, pair, 2, 2, 300, 0, 3.9f);
    }
}

Test(attention, agrees_with_double_for_every_grouping) {
    static const int sizes[] = {1, 2, 3, 7, 8};
    EACH_ISA(isa) {
        for (int s = 0; s < 5; s++) {
            int kv_of_head[MAX_HEADS];
            for (int h = 0; h < 2 * sizes[s]; h++) kv_of_head[h] = h / sizes[s];
            check_values(isa, 32, kv_of_head, 2 * sizes[s], 2, 40, 0, 1);
            check_values(isa, 32, kv_of_head, 2 * sizes[s], 2, 270, 0, 1);
        }
    }
}

/* A rank may hold part of a group, and KV heads that none of its queries read. */
Test(attention, agrees_with_double_where_a_group_straddles_ranks) {
    static const int straddling[] = {0, 1, 1, 1, 2}, idle[] = {0, 0, 2}, late[] = {1, 1, 1};
    EACH_ISA(isa) {
        check_values(isa, 16, straddling, 5, 3, 37, 0, 1);
        check_values(isa, 16, idle, 3, 3, 37, 0, 1);
        check_values(isa, 80, late, 3, 2, 261, 0, 1);
    }
}

Test(attention, agrees_with_double_in_a_sliding_window) {
    static const int windows[] = {1, 2, 15, 16, 17, 100, 256, 257, 512, 600, 1000};
    static const int group[] = {0, 0, 0};
    EACH_ISA(isa) {
        for (int w = 0; w < 11; w++) {
            check_values(isa, 32, group, 3, 1, 600, windows[w], 1);
            check_values(isa, 32, group, 3, 1, 30, windows[w], 1);
        }
    }
}

/* --- bits ------------------------------------------------------------------------------------- */

static const int odd_group[] = {0, 0, 0, 1, 1};

static void check_chunks(enum backend_isa isa, int head_dim, int window, int n_threads) {
    enum { N = 600 };
    static const int chunks[] = {1, 7, 16, 100, 599};
    struct fixture f = open_fixture(isa, n_threads, head_dim, odd_group, 5, 2, window);
    float *qkv = random_rows(&f, N, 1.5f, 77), *expected = random_rows(&f, N, 0, 0);
    float *out = random_rows(&f, N, 0, 0);
    int32_t table[MAX_BLOCKS];
    fill_table(table, 0, 1);
    feed(&f, expected, qkv, N, N, table);
    for (int c = 0; c < 5; c++) {
        fill_table(table, 11 * c, 3);
        memset(out, 0xff, out_floats(&f, N) * sizeof *out);
        feed(&f, out, qkv, N, chunks[c], table);
        cr_assert(same(out, expected, out_floats(&f, N)), "%s head_dim %d window %d threads %d: %d",
                  backend_isa_name(f.backend), head_dim, window, n_threads, chunks[c]);
    }
    free(qkv), free(expected), free(out);
    close_fixture(&f);
}

Test(attention, chunks_do_not_change_bits) {
    EACH_ISA(isa) {
        check_chunks(isa, 64, 0, 1);
        check_chunks(isa, 64, 100, 1);
        check_chunks(isa, 32, 300, 1); /* rows of one pass begin in different pieces */
        check_chunks(isa, 80, 0, 2);
        check_chunks(isa, 8, 17, 3);
    }
}

Test(attention, threads_do_not_change_bits) {
    enum { N = 300 };
    EACH_ISA(isa) {
        float *out[3];
        size_t n = 0;
        for (int t = 0; t < 3; t++) {
            struct fixture f = open_fixture(isa, t + 1, 32, odd_group, 5, 2, 0);
            float *qkv = random_rows(&f, N, 1.5f, 78);
            int32_t table[MAX_BLOCKS];
            fill_table(table, 0, 1);
            out[t] = random_rows(&f, N, 0, 0);
            n = out_floats(&f, N);
            feed(&f, out[t], qkv, N, N, table);
            free(qkv);
            close_fixture(&f);
        }
        cr_assert(same(out[0], out[1], n) && same(out[0], out[2], n), "%s",
                  backend_isa_to_name(isa));
        for (int t = 0; t < 3; t++) free(out[t]);
    }
}

/* Three sequences at different places, their last rows in one batch, in every order of segments. */
static void check_neighbours(enum backend_isa isa, int window) {
    enum { SEQUENCES = 3, N = 300 };
    static const int history[SEQUENCES] = {300, 21, 130}, last[SEQUENCES] = {3, 1, 40};
    static const int orders[4][SEQUENCES] = {{0, 1, 2}, {2, 1, 0}, {1, 2, 0}, {0, 2, 1}};
    struct fixture f = open_fixture(isa, 2, 32, odd_group, 5, 2, window);
    float *qkv[SEQUENCES], *alone[SEQUENCES];
    int32_t table[SEQUENCES][MAX_BLOCKS];
    for (int s = 0; s < SEQUENCES; s++) {
        qkv[s] = random_rows(&f, N, 1.5f, (uint64_t)(80 + s));
        alone[s] = random_rows(&f, N, 0, 0);
        fill_table(table[s], 40 * s, 1);
        feed(&f, alone[s], qkv[s], history[s], history[s], table[s]);
    }
    float *rows = random_rows(&f, 64, 0, 0), *out = random_rows(&f, 64, 0, 0);
    for (int o = 0; o < 4; o++) {
        struct backend_segment segments[SEQUENCES];
        for (int i = 0, row = 0; i < SEQUENCES; i++) {
            int s = orders[o][i], first = history[s] - last[s];
            segments[i] = (struct backend_segment){row, last[s], first, table[s]};
            memcpy(rows + row * row_width(&f), qkv[s] + first * row_width(&f),
                   (size_t)(last[s] * row_width(&f)) * sizeof *rows);
            row += last[s];
        }
        run_batch(&f, out, rows, segments, SEQUENCES);
        for (int i = 0; i < SEQUENCES; i++) {
            int s = orders[o][i];
            cr_assert(same(out + segments[i].row * out_width(&f),
                           alone[s] + segments[i].position * out_width(&f),
                           out_floats(&f, last[s])),
                      "%s window %d order %d sequence %d", backend_isa_name(f.backend), window, o,
                      s);
        }
    }
    for (int s = 0; s < SEQUENCES; s++) free(qkv[s]), free(alone[s]);
    free(rows), free(out);
    close_fixture(&f);
}

Test(attention, other_sequences_in_the_batch_do_not_change_bits) {
    EACH_ISA(isa) {
        check_neighbours(isa, 0);
        check_neighbours(isa, 20);
    }
}

/* --- what may not be seen --------------------------------------------------------------------- */

/* A block that is given to another sequence still holds the old one's rows. */
static void check_stale(enum backend_isa isa, int n, int chunk, float garbage) {
    struct fixture f = open_fixture(isa, 1, 40, odd_group, 5, 2, 0);
    float *qkv = random_rows(&f, n, 1.5f, 90), *clean = random_rows(&f, n, 0, 0);
    float *dirt = random_rows(&f, MAX_POSITIONS, garbage, 91), *out = random_rows(&f, n, 0, 0);
    int32_t table[MAX_BLOCKS];
    fill_table(table, 0, 1);
    feed(&f, clean, qkv, n, chunk, table);
    struct backend_segment whole = {0, MAX_POSITIONS, 0, table};
    struct backend_pass pass;
    begin_pass(f.backend, &pass, &whole, 1);
    backend_rope_kv_write(f.backend, dirt, f.cache, f.rope, NULL, NULL, 1e-6f, f.n_heads);
    feed(&f, out, qkv, n, chunk, table);
    cr_assert(same(out, clean, out_floats(&f, n)), "%s context %d chunk %d garbage %g",
              backend_isa_name(f.backend), n, chunk, garbage);
    free(qkv), free(clean), free(dirt), free(out);
    close_fixture(&f);
}

Test(attention, what_a_block_held_before_does_not_matter) {
    EACH_ISA(isa) {
        for (int c = 0; c < N_CONTEXTS; c++) {
            check_stale(isa, contexts[c], contexts[c], 100);
            check_stale(isa, contexts[c], 50, 1e30f);
            check_stale(isa, contexts[c], 50, INFINITY);
            check_stale(isa, contexts[c], 50, NAN);
        }
    }
}

/* Of the positions that a row sees, the first and the last count; those next to them do not. */
static void check_borders(enum backend_isa isa, int n, int window) {
    static const int one[] = {0};
    struct fixture f = open_fixture(isa, 1, 16, one, 1, 1, window);
    int32_t table[MAX_BLOCKS];
    fill_table(table, 0, 1);
    float *qkv = random_rows(&f, n + 1, 0.5f, 95), *changed = random_rows(&f, n + 1, 0, 0);
    float *out = random_rows(&f, n + 1, 0, 0), *other = random_rows(&f, n + 1, 0, 0);
    feed(&f, out, qkv, n + 1, n + 1, table);
    int row = n - 1, first = window && row >= window ? row - window + 1 : 0;
    int positions[4] = {first - 1, first, row, row + 1};
    for (int i = 0; i < 4; i++) {
        if (positions[i] < 0) continue;
        memcpy(changed, qkv, (size_t)((n + 1) * row_width(&f)) * sizeof *qkv);
        float *values = changed + positions[i] * row_width(&f) + 2 * f.head_dim;
        for (int d = 0; d < f.head_dim; d++) values[d] += 3;
        feed(&f, other, changed, n + 1, n + 1, table);
        bool moved = !same(other + row * out_width(&f), out + row * out_width(&f), 16);
        cr_assert_eq(moved, i == 1 || i == 2, "%s context %d window %d: position %d",
                     backend_isa_name(f.backend), n, window, positions[i]);
    }
    free(qkv), free(changed), free(out), free(other);
    close_fixture(&f);
}

Test(attention, a_row_sees_exactly_its_window) {
    EACH_ISA(isa) {
        for (int c = 1; c < N_CONTEXTS; c++) {
            check_borders(isa, contexts[c], 0);
            check_borders(isa, contexts[c], 2);
            check_borders(isa, contexts[c], 16);
            check_borders(isa, contexts[c], 257);
        }
    }
}
