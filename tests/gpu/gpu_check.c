/* Parity and bits of the CUDA backend where its memory is not the host's: on a GPU. Every op against the
 * CPU backend over shapes, formats and ragged edges, and against itself over rows, neighbours and
 * degrees; then whole models. Needs no test framework; run by tests/gpu/run.sh, and on the emulated
 * device by ctest, which tests this program.
 *
 *   gpu_check [--isa cuda|emulated] [--model DIR] [--quick] [--seed N] */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "tests/reference/model_run.h"
#include "tests/reference/random.h"

enum { MAX_ROWS = 256, MAX_WIDTH = 8192 };

struct lab {
    struct backend *device, *cpu;
    struct test_random random;
    enum backend_isa isa;
    const char *model;
    bool quick;
    int n_checks, n_failures;
};

static void note(struct lab *lab, bool holds, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static void note(struct lab *lab, bool holds, const char *format, ...) {
    lab->n_checks++;
    if (holds) return;
    va_list arguments;
    va_start(arguments, format);
    printf("  FAILED ");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
    lab->n_failures++;
}

/* --- memory ------------------------------------------------------------------------------------------ */

static float *put(struct backend *backend, const float *values, size_t n) {
    float *memory = backend_alloc(backend, n * sizeof *memory);
    CHECK(memory != NULL);
    backend_copy_in(backend, memory, values, n * sizeof *memory);
    return memory;
}

/* The values there, which are given back. */
static float *take(struct backend *backend, float *memory, size_t n) {
    struct error err;
    float *values = xcalloc(n, sizeof *values);
    if (backend_copy_out(backend, values, memory, n * sizeof *values, &err) != STATUS_OK) {
        fprintf(stderr, "gpu_check: %s\n", err.text);
        exit(1);
    }
    backend_free(backend, memory);
    return values;
}

static float *noise(struct lab *lab, size_t n, float spread) {
    return random_floats(&lab->random, n, -spread, spread);
}

/* The largest difference, relative to the largest magnitude of b. */
static double distance(const float *a, const float *b, size_t n) {
    double most = 1e-30, apart = 0;
    for (size_t i = 0; i < n; i++) {
        double magnitude = fabs((double)b[i]), difference = fabs((double)a[i] - (double)b[i]);
        if (magnitude > most) most = magnitude;
        if (!(difference <= apart)) apart = difference; /* NaN stays */
    }
    return apart / most;
}

static bool same_bits(const float *a, const float *b, size_t n) {
    return memcmp(a, b, n * sizeof *a) == 0;
}

/* --- products ------------------------------------------------------------------------------------------ */

static struct weight *pack(struct backend *backend, const float *w, int n, int k, int stride,
                           const int *leaves, int n_leaves, enum dtype format) {
    struct weight_source source = {w, DTYPE_F32, stride, n};
    struct weight *weight;
    struct error err;
    if (backend_weight_create(&weight, backend, &source, 1, k, leaves, n_leaves, format, &err) !=
        STATUS_OK) {
        fprintf(stderr, "gpu_check: %s\n", err.text);
        exit(1);
    }
    return weight;
}

static float *multiply(struct backend *backend, const struct weight *weight, const float *x, int n,
                       int k, int n_rows) {
    float *in = put(backend, x, (size_t)(n_rows * k));
    float *out = backend_alloc(backend, (size_t)(n_rows * n) * sizeof *out);
    backend_linear_tree(backend, out, in, weight, n_rows);
    float *values = take(backend, out, (size_t)(n_rows * n));
    backend_free(backend, in);
    return values;
}

/* fp8 has no CPU twin: its weights are bf16 values times a scale, which bf16 on the CPU comes near. */
static void check_product(struct lab *lab, enum dtype format, int n, int k, int n_rows) {
    float *w = noise(lab, (size_t)n * (size_t)k, 1), *x = noise(lab, (size_t)(n_rows * k), 2);
    int leaves[9];
    for (int i = 0; i <= 8; i++) leaves[i] = k / 8 * i;
    leaves[8] = k;
    struct weight *weight = pack(lab->device, w, n, k, k, leaves, 8, format);
    struct weight *cpu = pack(lab->cpu, w, n, k, k, leaves, 8,
                              format == DTYPE_F8 ? DTYPE_BF16 : format);
    float *ours = multiply(lab->device, weight, x, n, k, n_rows);
    float *theirs = multiply(lab->cpu, cpu, x, n, k, n_rows);
    double apart = distance(ours, theirs, (size_t)(n_rows * n));
    double bound = format == DTYPE_F8 ? 0.06 : 2e-5;
    note(lab, apart <= bound, "product %s n %d k %d rows %d: %.2g from the CPU, at most %.2g",
         dtype_name(format), n, k, n_rows, apart, bound);
    for (int row = 0; row < n_rows; row += 1 + n_rows / 4) {
        float *alone = multiply(lab->device, weight, x + row * k, n, k, 1);
        note(lab, same_bits(alone, ours + row * n, (size_t)n),
             "product %s n %d k %d: row %d of %d differs from itself alone", dtype_name(format), n, k,
             row, n_rows);
        free(alone);
    }
    backend_weight_free(weight);
    backend_weight_free(cpu);
    free(w), free(x), free(ours), free(theirs);
}

/* A row-parallel product on 1, 2, 4 and 8 ranks, each with its leaves: the finished trees agree. */
static void check_degrees(struct lab *lab, enum dtype format) {
    enum { N = 80, K = 1024, ROWS = 5 };
    float *w = noise(lab, N * K, 1), *x = noise(lab, ROWS * K, 1), *reference = NULL;
    for (int degree = 1; degree <= 8; degree *= 2) {
        float *roots = backend_alloc(lab->device, (size_t)(degree * ROWS * N) * sizeof *roots);
        int width = K / degree, n_leaves = 8 / degree, leaves[9];
        for (int i = 0; i <= n_leaves; i++) leaves[i] = width / n_leaves * i;
        for (int rank = 0; rank < degree; rank++) {
            struct weight *part =
                pack(lab->device, w + rank * width, N, width, K, leaves, n_leaves, format);
            float *slice = xcalloc(ROWS * (size_t)width, sizeof *slice);
            for (int r = 0; r < ROWS; r++) {
                memcpy(slice + r * width, x + r * K + rank * width, (size_t)width * sizeof *slice);
            }
            float *in = put(lab->device, slice, ROWS * (size_t)width);
            backend_linear_tree(lab->device, roots + rank * ROWS * N, in, part, ROWS);
            backend_free(lab->device, in);
            backend_weight_free(part);
            free(slice);
        }
        float *sum = backend_alloc(lab->device, ROWS * N * sizeof *sum);
        backend_tree_sum(lab->device, sum, roots, degree, NULL, ROWS, N);
        float *values = take(lab->device, sum, ROWS * N);
        backend_free(lab->device, roots);
        if (reference == NULL) {
            reference = values;
            continue;
        }
        note(lab, same_bits(values, reference, ROWS * N), "%s at degree %d differs from degree 1",
             dtype_name(format), degree);
        free(values);
    }
    free(w), free(x), free(reference);
}

static void check_products(struct lab *lab) {
    static const enum dtype formats[] = {DTYPE_BF16, DTYPE_I8, DTYPE_F8};
    static const int sizes[][2] = {{17, 40}, {100, 576}, {333, 1000}, {576, 2048}, {4096, 4096}};
    static const int rows[] = {1, 2, 7, 8, 9, 16, 17, 33, 64, 130};
    int n_sizes = lab->quick ? 3 : 5, n_rows = lab->quick ? 4 : 10;
    for (int f = 0; f < 3; f++) {
        for (int s = 0; s < n_sizes; s++) {
            for (int r = 0; r < n_rows; r++) {
                check_product(lab, formats[f], sizes[s][0], sizes[s][1],
                              rows[lab->quick ? 3 * r : r]);
            }
        }
        check_degrees(lab, formats[f]);
    }
}

/* --- row by row ---------------------------------------------------------------------------------------- */

/* One op on either backend: in (and more) to out. */
typedef void (*row_op_fn)(struct backend *backend, float *out, const float *in, const float *weight,
                          int n_rows, int width);

static void op_rmsnorm(struct backend *b, float *out, const float *in, const float *weight, int n_rows,
                       int width) {
    backend_rmsnorm(b, out, in, weight, 1e-5f, n_rows, width);
}
static void op_swiglu(struct backend *b, float *out, const float *in, const float *weight, int n_rows,
                      int width) {
    (void)weight;
    backend_swiglu(b, out, in, n_rows, width);
}
static void op_tree(struct backend *b, float *out, const float *in, const float *weight, int n_rows,
                    int width) {
    (void)weight;
    backend_zero(b, out, (size_t)(n_rows * width) * sizeof *out);
    backend_tree_sum(b, out, in, 2, NULL, n_rows, width);
}
static void op_tree_norm(struct backend *b, float *out, const float *in, const float *weight,
                         int n_rows, int width) {
    float *residual = backend_alloc(b, (size_t)(n_rows * width) * sizeof *residual);
    backend_tree_sum_norm(b, residual, out, in, 2, NULL, weight, 1e-5f, n_rows, width);
    backend_free(b, residual);
}

static float *run_row_op(struct backend *b, row_op_fn op, const float *in, const float *weight,
                         int n_rows, int width) {
    float *x = put(b, in, (size_t)(2 * n_rows * width)), *w = put(b, weight, (size_t)width);
    float *out = backend_alloc(b, (size_t)(n_rows * width) * sizeof *out);
    op(b, out, x, w, n_rows, width);
    float *values = take(b, out, (size_t)(n_rows * width));
    backend_free(b, x);
    backend_free(b, w);
    return values;
}

static void check_row_ops(struct lab *lab) {
    static const struct {
        const char *name;
        row_op_fn op;
    } ops[] = {{"rmsnorm", op_rmsnorm}, {"swiglu", op_swiglu}, {"tree sum", op_tree},
               {"tree sum and norm", op_tree_norm}};
    static const int widths[] = {1, 31, 576, 2049, 4096};
    for (int o = 0; o < 4; o++) {
        for (int i = 0; i < (lab->quick ? 3 : 5); i++) {
            int width = widths[i], n_rows = 1 + 13 * i;
            float *in = noise(lab, (size_t)(2 * n_rows * width), 3);
            float *weight = noise(lab, (size_t)width, 2);
            float *ours = run_row_op(lab->device, ops[o].op, in, weight, n_rows, width);
            float *theirs = run_row_op(lab->cpu, ops[o].op, in, weight, n_rows, width);
            double apart = distance(ours, theirs, (size_t)(n_rows * width));
            note(lab, apart < 1e-5, "%s, width %d, %d rows: %.2g from the CPU", ops[o].name, width,
                 n_rows, apart);
            free(in), free(weight), free(ours), free(theirs);
        }
    }
}

/* --- attention ------------------------------------------------------------------------------------------ */

struct heads {
    int n_heads, n_kv, dim, window;
};

static float *attend(struct backend *b, const struct heads *h, const float *qkv, int context,
                     int chunk) {
    int width = (h->n_heads + 2 * h->n_kv) * h->dim, out_width = h->n_heads * h->dim;
    int n_blocks = context / BACKEND_KV_BLOCK + 1, kv_of_head[64];
    int32_t *blocks = xcalloc((size_t)n_blocks, sizeof *blocks);
    float inv_freq[128];
    struct kv_cache *cache;
    struct rope_table *rope;
    struct error err;
    for (int i = 0; i < n_blocks; i++) blocks[i] = n_blocks - 1 - i;
    for (int i = 0; i < h->n_heads; i++) kv_of_head[i] = i * h->n_kv / h->n_heads;
    for (int i = 0; i < h->dim / 2; i++) inv_freq[i] = powf(10000, -2 * (float)i / (float)h->dim);
    CHECK(backend_kv_create(&cache, b, n_blocks, h->n_kv, h->dim, &err) == STATUS_OK);
    CHECK(backend_rope_create(&rope, b, inv_freq, h->dim, context, &err) == STATUS_OK);
    float *out = backend_alloc(b, (size_t)(context * out_width) * sizeof *out);
    float *rows = put(b, qkv, (size_t)(context * width));
    for (int done = 0; done < context; done += chunk) {
        int n = context - done < chunk ? context - done : chunk;
        struct backend_segment segment = {0, n, done, blocks};
        struct backend_pass pass = {.n_rows = n, .segments = &segment, .n_segments = 1};
        backend_pass_begin(b, &pass);
        backend_rope_kv_write(b, rows + done * width, cache, rope, NULL, NULL, 1e-6f, h->n_heads);
        backend_attention(b, out + done * out_width, rows + done * width, width, cache, kv_of_head,
                          h->n_heads, h->window);
    }
    float *values = take(b, out, (size_t)(context * out_width));
    backend_free(b, rows);
    backend_rope_free(rope);
    backend_kv_free(cache);
    free(blocks);
    return values;
}

static void check_attention(struct lab *lab) {
    static const struct heads shapes[] = {
        {32, 8, 128, 0}, {6, 2, 96, 0}, {4, 4, 64, 300}, {20, 1, 40, 0}, {8, 8, 256, 0}};
    static const int contexts[] = {70, 530, 2100};
    for (int s = 0; s < (lab->quick ? 3 : 5); s++) {
        const struct heads *h = &shapes[s];
        for (int c = 0; c < (lab->quick ? 2 : 3); c++) {
            int context = contexts[c], width = (h->n_heads + 2 * h->n_kv) * h->dim;
            float *qkv = noise(lab, (size_t)(context * width), 1.5f);
            size_t n = (size_t)(context * h->n_heads * h->dim);
            float *ours = attend(lab->device, h, qkv, context, MAX_ROWS);
            float *theirs = attend(lab->cpu, h, qkv, context, MAX_ROWS);
            double apart = distance(ours, theirs, n);
            note(lab, apart < 8e-3, "attention of %d/%d heads of %d, context %d: %.2g from the CPU",
                 h->n_heads, h->n_kv, h->dim, context, apart);
            static const int chunks[] = {1, 5, 64};
            for (int k = lab->quick ? 1 : 0; k < 3; k++) {
                float *again = attend(lab->device, h, qkv, context, chunks[k]);
                note(lab, same_bits(again, ours, n),
                     "attention of %d/%d heads of %d, context %d: chunk %d changes bits", h->n_heads,
                     h->n_kv, h->dim, context, chunks[k]);
                free(again);
            }
            free(qkv), free(ours), free(theirs);
        }
    }
}

/* --- sampling -------------------------------------------------------------------------------------------- */

static struct sample_result draw(struct backend *b, const float *logits, int vocab,
                                 const struct sample_draw *what) {
    struct sample_result result;
    struct error err;
    float *row = put(b, logits, (size_t)vocab);
    backend_sample_begin(b, row, vocab, vocab, what, 1);
    CHECK(backend_sample_end(b, &result, &err) == STATUS_OK);
    backend_free(b, row);
    return result;
}

static void check_sampling(struct lab *lab) {
    static const int vocabs[] = {7, 4096, 128256};
    int n_differ = 0, n_draws = lab->quick ? 60 : 300;
    for (int i = 0; i < n_draws; i++) {
        int vocab = vocabs[i % (lab->quick ? 2 : 3)];
        float *logits = noise(lab, (size_t)vocab, 9);
        int32_t history[20];
        for (int j = 0; j < 20; j++) history[j] = random_below(&lab->random, vocab);
        struct sample_params params = {
            .temperature = i % 5 == 0 ? 0 : random_f32(&lab->random, 0.2f, 1.5f),
            .top_p = i % 3 == 0 ? random_f32(&lab->random, 0.1f, 0.99f) : 1,
            .top_k = i % 4 == 1 ? 1 + random_below(&lab->random, 60) : 0,
            .min_p = i % 7 == 2 ? 0.05f : 0,
            .repetition_penalty = i % 2 ? 1 : 1.2f,
            .seed = (uint64_t)i,
            .n_logprobs = i % 6 - 1,
        };
        struct sample_draw what = {&params, history, 5, 20, 20 + i, -1, false};
        struct sample_result a = draw(lab->device, logits, vocab, &what);
        struct sample_result b = draw(lab->cpu, logits, vocab, &what);
        bool near = params.n_logprobs < 0 || fabsf(a.logprob - b.logprob) < 1e-3f;
        bool border = params.top_p < 1 && params.temperature > 0;
        n_differ += a.token != b.token && border; /* rounding may move top-p's border by an id */
        note(lab, (a.token == b.token && near) || border, "draw %d of %d: %d, the CPU drew %d", i,
             vocab, a.token, b.token);
        free(logits);
    }
    note(lab, n_differ <= n_draws / 50, "%d of %d draws with top-p differ", n_differ, n_draws);
}

/* --- whole models ---------------------------------------------------------------------------------------- */

enum { N_TOKENS = 64 };

/* Logits of every row; the memory is the backend's, so they are copied out pass by pass. */
static float *logits_of(struct lab *lab, enum backend_isa isa, enum dtype weights, int degree,
                        int chunk) {
    struct local_group *group;
    struct error err;
    if (model_run_open(&group, lab->model, degree, isa, weights, 1, 64, 64, &err) != STATUS_OK) {
        fprintf(stderr, "gpu_check: %s\n", err.text);
        exit(1);
    }
    size_t vocab = (size_t)local_group_config(group)->vocab;
    float *out = xcalloc(N_TOKENS * vocab, sizeof *out);
    int32_t tokens[N_TOKENS], rows[N_TOKENS], blocks[8];
    for (int i = 0; i < N_TOKENS; i++) tokens[i] = 3 + (i * 37) % 1000;
    for (int i = 0; i < N_TOKENS; i++) rows[i] = i;
    for (int i = 0; i < 8; i++) blocks[i] = i + 2;
    for (int done = 0; done < N_TOKENS; done += chunk) {
        int n = N_TOKENS - done < chunk ? N_TOKENS - done : chunk;
        struct backend_segment segment = {0, n, done, blocks};
        struct transformer_batch batch = {tokens + done, n, &segment, 1, rows, n, 0, false};
        float *logits;
        if (engine_forward(local_group_engine(group), ENGINE_TARGET, &batch, &logits, &err) !=
                STATUS_OK ||
            backend_copy_out(local_group_backend(group), out + (size_t)done * vocab, logits,
                             (size_t)n * vocab * sizeof *out, &err) != STATUS_OK) {
            fprintf(stderr, "gpu_check: %s\n", err.text);
            exit(1);
        }
    }
    local_group_destroy(group);
    return out;
}

static void check_model(struct lab *lab) {
    static const enum dtype formats[] = {DTYPE_BF16, DTYPE_I8, DTYPE_F8};
    static const int chunks[] = {1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 48, 63};
    if (lab->model == NULL) {
        printf("  no --model: whole models are left out\n");
        return;
    }
    struct error err;
    struct checkpoint *checkpoint;
    CHECK(checkpoint_open(&checkpoint, lab->model, &err) == STATUS_OK);
    size_t n = N_TOKENS * (size_t)checkpoint_config(checkpoint)->vocab;
    checkpoint_close(checkpoint);
    for (int f = 0; f < 3; f++) {
        float *whole = logits_of(lab, lab->isa, formats[f], 1, N_TOKENS);
        if (formats[f] != DTYPE_F8) {
            float *cpu = logits_of(lab, BACKEND_AUTO, formats[f], 1, N_TOKENS);
            double apart = distance(whole, cpu, n);
            note(lab, apart < 0.03, "%s logits: %.2g from the CPU", dtype_name(formats[f]), apart);
            free(cpu);
        }
        for (int c = 0; c < 13; c += lab->quick ? 6 : 1) {
            float *again = logits_of(lab, lab->isa, formats[f], 1, chunks[c]);
            note(lab, same_bits(whole, again, n), "%s logits: %d rows a pass change bits",
                 dtype_name(formats[f]), chunks[c]);
            free(again);
        }
        for (int degree = 2; degree <= (lab->quick ? 2 : 8); degree *= 2) {
            float *again = logits_of(lab, lab->isa, formats[f], degree, 24);
            note(lab, same_bits(whole, again, n), "%s logits: degree %d changes bits",
                 dtype_name(formats[f]), degree);
            free(again);
        }
        free(whole);
    }
}

/* --- the program ------------------------------------------------------------------------------------------ */

static struct backend *open_backend_of(enum backend_isa isa) {
    struct backend_options options = {isa, 1, MAX_ROWS, MAX_WIDTH, 0};
    struct backend *backend;
    struct error err;
    if (backend_create(&backend, &options, &err) == STATUS_OK) return backend;
    fprintf(stderr, "gpu_check: %s\n", err.text);
    exit(1);
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*check)(struct lab *lab);
    } parts[] = {{"products", check_products},   {"row by row", check_row_ops},
                 {"attention", check_attention}, {"sampling", check_sampling},
                 {"models", check_model}};
    struct lab lab = {.isa = BACKEND_CUDA};
    uint64_t seed = 1;
    for (int i = 1; i < argc; i++) {
        bool more = i + 1 < argc;
        if (strcmp(argv[i], "--quick") == 0) lab.quick = true;
        else if (strcmp(argv[i], "--isa") == 0 && more) lab.isa = (enum backend_isa)backend_isa_parse(argv[++i]);
        else if (strcmp(argv[i], "--model") == 0 && more) lab.model = argv[++i];
        else if (strcmp(argv[i], "--seed") == 0 && more) seed = strtoull(argv[++i], NULL, 10);
        else {
            fprintf(stderr, "usage: gpu_check [--isa cuda|emulated] [--model DIR] [--quick] [--seed N]\n");
            return 2;
        }
    }
    if (lab.isa != BACKEND_CUDA && lab.isa != BACKEND_EMULATED) {
        fprintf(stderr, "gpu_check: --isa is cuda or emulated\n");
        return 2;
    }
    lab.device = open_backend_of(lab.isa);
    lab.cpu = open_backend_of(BACKEND_AUTO);
    printf("%-12s %10s %10s %10s\n", backend_isa_name(lab.device), "checks", "failures", "seconds");
    int n_failures = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        int64_t start = clock_now_ns();
        lab.random = (struct test_random){seed};
        lab.n_checks = lab.n_failures = 0;
        parts[i].check(&lab);
        printf("%-12s %10d %10d %10.1f\n", parts[i].name, lab.n_checks, lab.n_failures,
               (double)(clock_now_ns() - start) / 1e9);
        n_failures += lab.n_failures;
    }
    backend_destroy(lab.device);
    backend_destroy(lab.cpu);
    printf("gpu_check: %d failures (seed %llu)\n", n_failures, (unsigned long long)seed);
    return n_failures != 0;
}
