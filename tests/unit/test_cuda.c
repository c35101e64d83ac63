/* The CUDA backend on the emulated device, in every scheduling order: a missing barrier or a race shows
 * in at least one of them (test_emulation.c plants some). What all backends have in common is tested
 * beside theirs (test_linear.c, test_ops.c, test_attention.c, test_logit_bits.c). */
#include "tests/reference/emulated.h"
#include "tests/reference/isas.h"
#include "tests/reference/pass.h"
#include "tests/unit/linear_checks.h"

enum { MAX_ROWS = 320, MAX_WIDTH = 512 };

static void in_every_order(void (*check)(struct backend *backend, uint64_t seed)) {
    if (!computes_here(BACKEND_EMULATED)) {
        cr_skip_test("the emulated device is not built here (x86-64, no thread sanitizer)");
    }
    for (int order = 0; order < EMULATION_ORDERS; order++) {
        emulated_set_order(order, (uint32_t)order + 1);
        struct backend *backend = open_backend(BACKEND_EMULATED, 1, MAX_ROWS, MAX_WIDTH);
        check(backend, (uint64_t)order * 1000 + 17);
        backend_destroy(backend);
    }
    emulated_set_order(0, 1);
}

/* --- products ------------------------------------------------------------------------------------ */

static void products(struct backend *backend, uint64_t seed) {
    linear_check_values(backend, DTYPE_BF16, 33, 300, 17, seed);
    linear_check_values(backend, DTYPE_I8, 49, 130, 35, seed + 1);
    linear_check_row_invariance(backend, DTYPE_BF16, 40, 200, seed + 2);
    linear_check_row_invariance(backend, DTYPE_F8, 40, 200, seed + 3);
    linear_check_row_invariance(backend, DTYPE_I8, 40, 200, seed + 4);
}

Test(cuda, products) {
    in_every_order(products);
}

static void trees(struct backend *backend, uint64_t seed) {
    (void)seed;
    linear_check_all_trees(backend);
}

Test(cuda, trees) {
    in_every_order(trees);
}

/* All values of e4m3, 0 to 448: 8 steps for each exponent. */
static double e4m3_nearest(double value) {
    double best = 0, magnitude = fabs(value);
    bool even = true;
    for (int code = 1; code < 127; code++) {
        int exponent = code / 8, mantissa = code % 8;
        double here = exponent == 0 ? ldexp(mantissa, -9) : ldexp(8 + mantissa, exponent - 10);
        double now = fabs(here - magnitude), before = fabs(best - magnitude);
        if (now < before || (now == before && !even)) {
            best = here;
            even = code % 2 == 0;
        }
    }
    return value < 0 ? -best : best;
}

/* Weights come back by products with unit vectors: each must be the e4m3 nearest to its quotient by the
 * row's scale. */
static void fp8_weights(struct backend *backend, uint64_t seed) {
    enum { N = 20, K = 70 };
    struct test_random random = {seed};
    float *w = random_floats(&random, N * K, -3, 3), x[K], out[N];
    for (int i = 0; i < N * K; i++) w[i] *= powf(2, (float)(i % 14) - 12); /* subnormals as well */
    struct weight *weight = linear_pack(backend, w, N, K, DTYPE_F8);
    cr_assert_eq(backend_weight_bytes(weight), (size_t)(32 * 96 + 32 * 4), "a byte a weight");
    for (int k = 0; k < K; k++) {
        memset(x, 0, sizeof x);
        x[k] = 1;
        backend_linear(backend, out, x, K, weight, NULL, 1);
        for (int n = 0; n < N; n++) {
            float largest = 0;
            for (int i = 0; i < K; i++) largest = fmaxf(largest, fabsf(w[n * K + i]));
            float scale = largest / 448.0f, inverse = 1.0f / scale;
            float expected = (float)e4m3_nearest((double)(w[n * K + k] * inverse)) * scale;
            cr_assert(out[n] == expected, "seed %llu: weight %d,%d is %.9g, expected %.9g",
                      (unsigned long long)seed, n, k, out[n], expected);
        }
    }
    backend_weight_free(weight);
    free(w);
}

Test(cuda, fp8_weights_are_the_nearest) {
    in_every_order(fp8_weights);
}

/* Sources that do not end at a panel's border, in pieces. */
static void stacked(struct backend *backend, uint64_t seed) {
    enum { K = 40 };
    struct test_random random = {seed};
    float *w = random_floats(&random, 60 * K, -1, 1), *x = random_floats(&random, K, -1, 1);
    struct weight_source parts[3] = {{w, DTYPE_F32, K, 21}, {w + 21 * K, DTYPE_F32, K, 5},
                                     {w + 26 * K, DTYPE_F32, K, 34}};
    struct weight *whole = linear_pack(backend, w, 60, K, DTYPE_BF16), *stack = NULL;
    struct error err;
    float a[60], b[60];
    cr_assert_eq(backend_weight_create(&stack, backend, parts, 3, K, NULL, 1, DTYPE_BF16, &err),
                 STATUS_OK);
    backend_linear(backend, a, x, K, whole, NULL, 1);
    backend_linear(backend, b, x, K, stack, NULL, 1);
    cr_assert_arr_eq(a, b, sizeof a);
    backend_weight_free(whole);
    backend_weight_free(stack);
    free(w), free(x);
}

Test(cuda, stacked_sources) {
    in_every_order(stacked);
}

/* Many rows are tiles of 128, with 64 outputs or 128; the same rows 50 at a time are another kernel's. With
 * leaves and without, whose K has fewer units than stripes, more, and ragged ends. */
static void check_tiles(struct backend *backend, enum dtype format, int n, int k, bool leaves,
                        uint64_t seed) {
    enum { ROWS = 131, FEW = 50 };
    static const int eight[9] = {0, 70, 70, 200, 333, 334, 700, 800, 900};
    struct test_random random = {seed};
    if (leaves) k = eight[8];
    float *w = random_floats(&random, (size_t)(n * k), -1, 1), *x = random_floats(&random, ROWS * k, -3, 3);
    float *many = random_floats(&random, ROWS * n, 0, 0), *few = random_floats(&random, ROWS * n, 0, 0);
    struct weight_source source = {w, DTYPE_F32, k, n};
    struct weight *weight = NULL;
    struct error err;
    cr_assert_eq(backend_weight_create(&weight, backend, &source, 1, k, leaves ? eight : NULL,
                                       leaves ? 8 : 1, format, &err), STATUS_OK, "%s", err.text);
    for (int row = 0; row < ROWS; row += FEW) {
        int n_rows = ROWS - row < FEW ? ROWS - row : FEW;
        if (leaves) backend_linear_tree(backend, few + row * n, x + row * k, weight, n_rows);
        else backend_linear(backend, few + row * n, x + row * k, k, weight, NULL, n_rows);
    }
    if (leaves) backend_linear_tree(backend, many, x, weight, ROWS);
    else backend_linear(backend, many, x, k, weight, NULL, ROWS);
    cr_assert(backend_wait(backend, &err) == STATUS_OK, "%s", err.text);
    for (int i = 0; i < ROWS * n; i++) {
        cr_assert(memcmp(&many[i], &few[i], sizeof *many) == 0,
                  "seed %llu, %s, n %d, k %d, %s: row %d, output %d is %.9g and %.9g",
                  (unsigned long long)seed, dtype_name(format), n, k, leaves ? "leaves" : "whole", i / n,
                  i % n, many[i], few[i]);
    }
    backend_weight_free(weight);
    free(w), free(x), free(many), free(few);
}

static void tiles(struct backend *backend, uint64_t seed) {
    static const enum dtype formats[] = {DTYPE_BF16, DTYPE_I8, DTYPE_F8};
    for (int f = 0; f < 3; f++) {
        check_tiles(backend, formats[f], 70, 100, false, seed);
        check_tiles(backend, formats[f], 520, 600, false, seed + 1);
        check_tiles(backend, formats[f], 130, 0, true, seed + 2);
    }
}

Test(cuda, tiles_of_many_rows) {
    in_every_order(tiles);
}

/* --- attention ------------------------------------------------------------------------------------- */

struct shape {
    int n_heads, n_kv, dim, context, window;
    const int *kv_of_head;
};

static const int pairs[] = {0, 0, 1, 1}, uneven[] = {0, 0, 0, 0, 0, 1, 1}, one[20] = {0};
static const struct shape shapes[] = {
    {4, 2, 64, 300, 0, pairs},
    {7, 2, 40, 90, 33, uneven},
    {20, 1, 32, 530, 300, one},
    {4, 2, 128, 20, 0, pairs},
};

/* out[context, n_heads * dim]: the rows of qkv in passes of `chunk`. */
static void attend(struct backend *backend, const struct shape *s, float *out, const float *qkv,
                   int chunk) {
    int width = (s->n_heads + 2 * s->n_kv) * s->dim, out_width = s->n_heads * s->dim;
    struct kv_cache *cache = NULL;
    struct rope_table *rope = NULL;
    struct error err;
    float inv_freq[64];
    int32_t blocks[40];
    for (int i = 0; i < s->dim / 2; i++) inv_freq[i] = powf(10000, -(float)i / 16);
    for (int i = 0; i < 40; i++) blocks[i] = (i * 7 + 3) % 40;
    cr_assert_eq(backend_kv_create(&cache, backend, 40, s->n_kv, s->dim, &err), STATUS_OK);
    cr_assert_eq(backend_rope_create(&rope, backend, inv_freq, s->dim, 640, &err), STATUS_OK);
    float *rows = xcalloc((size_t)(chunk * width), sizeof *rows);
    for (int done = 0; done < s->context; done += chunk) {
        int n = s->context - done < chunk ? s->context - done : chunk;
        struct backend_segment segment = {0, n, done, blocks};
        struct backend_pass pass;
        memcpy(rows, qkv + done * width, (size_t)(n * width) * sizeof *rows);
        begin_pass(backend, &pass, &segment, 1);
        backend_rope_kv_write(backend, rows, cache, rope, NULL, NULL, 1e-6f, s->n_heads);
        backend_attention(backend, out + done * out_width, rows, width, cache, s->kv_of_head,
                          s->n_heads, s->window);
    }
    free(rows);
    backend_rope_free(rope);
    backend_kv_free(cache);
}

/* Near what the CPU computes; and the same bits whether a pass has many rows (its tiles walk their
 * pieces) or few (pieces side by side, combined by a second kernel). */
static void attention_of(struct backend *backend, const struct shape *s, uint64_t seed) {
    struct backend *cpu = open_backend(BACKEND_PORTABLE, 1, MAX_ROWS, MAX_WIDTH);
    struct test_random random = {seed};
    size_t n = (size_t)(s->context * s->n_heads * s->dim);
    int width = (s->n_heads + 2 * s->n_kv) * s->dim;
    float *qkv = random_floats(&random, (size_t)(s->context * width), -1.5f, 1.5f);
    float *whole = xcalloc(n, sizeof *whole), *some = xcalloc(n, sizeof *some);
    float *expected = xcalloc(n, sizeof *expected);
    attend(cpu, s, expected, qkv, s->context > MAX_ROWS ? MAX_ROWS : s->context);
    attend(backend, s, whole, qkv, s->context > MAX_ROWS ? MAX_ROWS : s->context);
    attend(backend, s, some, qkv, 29);
    cr_assert(memcmp(whole, some, n * sizeof *whole) == 0,
              "seed %llu, context %d: the bits depend on how many rows a pass has",
              (unsigned long long)seed, s->context);
    for (size_t i = 0; i < n; i++) {
        /* Weights are rounded to bf16 on both, with maxima that may differ by a last bit. */
        cr_assert(fabsf(whole[i] - expected[i]) < 6e-3f,
                  "seed %llu, context %d at %zu: %.7g, the CPU has %.7g", (unsigned long long)seed,
                  s->context, i, whole[i], expected[i]);
    }
    free(qkv), free(whole), free(some), free(expected);
    backend_destroy(cpu);
}

static void attentions(struct backend *backend, uint64_t seed) {
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        attention_of(backend, &shapes[i], seed + i);
    }
}

Test(cuda, attention) {
    in_every_order(attentions);
}

/* --- row by row -------------------------------------------------------------------------------------- */

/* One op alone, or fused with the next: the same bits; and a product reads what it would read without
 * the op before it. */
static void fused(struct backend *backend, uint64_t seed) {
    enum { ROWS = 11, WIDTH = 200, N = 50 };
    struct test_random random = {seed};
    float *residual = random_floats(&random, ROWS * WIDTH, -1, 1);
    float *roots = random_floats(&random, 4 * ROWS * WIDTH, -1, 1);
    float *weight = random_floats(&random, WIDTH, -1, 1), *w = random_floats(&random, N * WIDTH, -1, 1);
    float a[ROWS * WIDTH], b[ROWS * WIDTH], normed[ROWS * WIDTH], fused_norm[ROWS * WIDTH];
    float out[ROWS * N], expected[ROWS * N];
    memcpy(a, residual, sizeof a);
    memcpy(b, residual, sizeof b);
    /* First of all: products bring the room for what ops before them pack. */
    struct weight *product = linear_pack(backend, w, N, WIDTH, DTYPE_BF16);
    backend_tree_sum(backend, a, roots, 4, NULL, ROWS, WIDTH);
    backend_rmsnorm(backend, normed, a, weight, 1e-5f, ROWS, WIDTH);
    backend_tree_sum_norm(backend, b, fused_norm, roots, 4, NULL, weight, 1e-5f, ROWS, WIDTH);
    cr_assert_arr_eq(a, b, sizeof a);
    cr_assert_arr_eq(normed, fused_norm, sizeof normed);
    backend_linear(backend, out, fused_norm, WIDTH, product, NULL, ROWS); /* as the norm packed it */
    backend_linear(backend, expected, normed, WIDTH, product, NULL, ROWS);
    cr_assert_arr_eq(out, expected, sizeof out);
    backend_weight_free(product);
    free(residual), free(roots), free(weight), free(w);
}

Test(cuda, fused_ops_give_the_bits_of_single_ones) {
    in_every_order(fused);
}

/* --- graphs ------------------------------------------------------------------------------------------- */

static void record(struct backend *backend, const struct weight *weight, float *memory) {
    struct backend_pass pass = {.n_rows = 3};
    backend_pass_begin(backend, &pass);
    cr_assert(!backend_replay(backend, 1));
    backend_record_begin(backend, 1);
    backend_linear(backend, memory, memory + 8 * 16, 32, weight, NULL, 8);
    backend_record_end(backend);
    backend_pass_begin(backend, &pass);
    cr_assert(backend_replay(backend, 1));
}

/* A graph holds addresses: it goes when any memory of the backend does. */
static void graphs(struct backend *backend, uint64_t seed) {
    struct test_random random = {seed};
    float *w = random_floats(&random, 16 * 512, -1, 1);
    float *memory = backend_alloc(backend, (8 * 16 + 8 * 32) * sizeof *memory);
    struct weight *small = linear_pack(backend, w, 16, 32, DTYPE_BF16);
    record(backend, small, memory);
    struct weight *large = linear_pack(backend, w, 16, 512, DTYPE_BF16); /* moves the scratch */
    record(backend, small, memory);
    backend_weight_free(large);
    record(backend, small, memory);
    backend_free(backend, backend_alloc(backend, 64));
    record(backend, small, memory);
    backend_weight_free(small);
    backend_free(backend, memory);
    free(w);
}

Test(cuda, graphs_go_with_the_memory_they_use) {
    in_every_order(graphs);
}

/* --- devices ------------------------------------------------------------------------------------------ */

Test(cuda, devices_are_counted_without_being_touched) {
    if (!computes_here(BACKEND_EMULATED)) cr_skip_test("the emulated device is not built here");
    struct backend_device device;
    struct error err;
    cr_assert_eq(backend_device_probe(&device, BACKEND_EMULATED, -1, &err), STATUS_OK);
    cr_assert(device.n_devices == 1 && device.major == 0 && device.memory_bytes == 0);
    cr_assert_eq(backend_device_probe(&device, BACKEND_EMULATED, 0, &err), STATUS_OK);
    cr_assert(device.n_devices == 1 && device.major == 8 && device.memory_bytes > 0);
    cr_assert_eq(backend_device_probe(&device, BACKEND_EMULATED, 1, &err), STATUS_INVALID_ARGUMENT);
}

/* --- sampling ------------------------------------------------------------------------------------------ */

enum { VOCAB_MAX = 3000 };

struct case_of_draw {
    struct sample_params params;
    struct sample_bias bias[3];
    int32_t banned[2], history[24];
    struct sample_draw draw;
};

static void random_case(struct case_of_draw *c, struct test_random *random, int vocab) {
    static const float temperatures[] = {0, 0.3f, 0.7f, 1, 1.6f};
    memset(c, 0, sizeof *c);
    c->params = (struct sample_params){
        .temperature = temperatures[random_below(random, 5)],
        .top_p = random_below(random, 2) ? 1 : random_f32(random, 0.05f, 0.99f),
        .top_k = random_below(random, 2) ? 0 : 1 + random_below(random, vocab + 3),
        .min_p = random_below(random, 3) ? 0 : random_f32(random, 0.001f, 0.5f),
        .repetition_penalty = random_below(random, 2) ? 1 : 1.3f,
        .presence_penalty = random_below(random, 2) ? 0 : 0.4f,
        .frequency_penalty = random_below(random, 2) ? 0 : 0.2f,
        .seed = (uint64_t)random_below(random, 1 << 30),
        .bias = c->bias,
        .n_bias = random_below(random, 4),
        .banned = c->banned,
        .n_banned = random_below(random, 3),
        .n_logprobs = random_below(random, 22) - 1,
    };
    for (int i = 0; i < 3; i++) {
        c->bias[i] = (struct sample_bias){random_below(random, vocab < 4 ? vocab : 4),
                                          random_f32(random, -2, 2)};
    }
    for (int i = 0; i < 2; i++) c->banned[i] = random_below(random, vocab);
    for (int i = 0; i < 24; i++) c->history[i] = random_below(random, vocab);
    c->draw = (struct sample_draw){&c->params, c->history, 9, 24, random_below(random, 5000), -1, false};
}

static void random_logits(float *logits, struct test_random *random, int vocab) {
    int kind = random_below(random, 6);
    for (int v = 0; v < vocab; v++) {
        logits[v] = kind == 0 ? (float)random_below(random, 3) : random_f32(random, -8, 8);
        if (kind == 1 && random_below(random, 4) == 0) logits[v] = -INFINITY;
        if (kind == 2 && random_below(random, 4) == 0) logits[v] = NAN;
    }
    if (kind == 3) logits[random_below(random, vocab)] = INFINITY;
    if (kind == 4) logits[0] = -0.0f;
}

/* Draws with the CPU's noise: the same token, but where rounding moves a border of top-p by one id. */
static void compare_draws(struct backend *backend, struct backend *cpu, int vocab, uint64_t seed,
                          int *n_differ) {
    struct test_random random = {seed};
    struct case_of_draw c;
    float raw[VOCAB_MAX], a[VOCAB_MAX], b[VOCAB_MAX];
    struct sample_result ours, theirs;
    struct error err;
    random_case(&c, &random, vocab);
    random_logits(raw, &random, vocab);
    memcpy(a, raw, sizeof *raw * (size_t)vocab);
    memcpy(b, raw, sizeof *raw * (size_t)vocab);
    backend_sample_begin(backend, a, vocab, vocab, &c.draw, 1);
    cr_assert_eq(backend_sample_end(backend, &ours, &err), STATUS_OK, "%s", err.text);
    backend_sample_begin(cpu, b, vocab, vocab, &c.draw, 1);
    cr_assert_eq(backend_sample_end(cpu, &theirs, &err), STATUS_OK);
    cr_assert(ours.made && ours.n_top == theirs.n_top, "seed %llu", (unsigned long long)seed);
    if (ours.token != theirs.token) {
        cr_assert(c.params.top_p < 1 && c.params.temperature > 0,
                  "seed %llu, vocabulary %d: %d, the CPU drew %d", (unsigned long long)seed, vocab,
                  ours.token, theirs.token);
        (*n_differ)++;
        return;
    }
    if (c.params.n_logprobs < 0) return;
    float spread = fabsf(ours.logprob - theirs.logprob);
    cr_assert(!(spread > 2e-4f), "seed %llu: log-probability %g, the CPU has %g",
              (unsigned long long)seed, ours.logprob, theirs.logprob);
    for (int i = 0; i < ours.n_top; i++) {
        bool close = !(fabsf(ours.top_logprob[i] - theirs.top_logprob[i]) > 2e-4f);
        cr_assert(close, "seed %llu: top %d", (unsigned long long)seed, i);
    }
}

static void draws(struct backend *backend, uint64_t seed) {
    static const int vocabs[] = {1, 2, 7, 257, 1000, VOCAB_MAX};
    struct backend *cpu = open_backend(BACKEND_PORTABLE, 1, MAX_ROWS, MAX_WIDTH);
    int n_differ = 0;
    for (int i = 0; i < 120; i++) {
        compare_draws(backend, cpu, vocabs[i % 6], seed * 1000 + (uint64_t)i, &n_differ);
    }
    cr_assert(n_differ <= 1, "seed %llu: %d of 120 draws differ from the CPU's",
              (unsigned long long)seed, n_differ);
    backend_destroy(cpu);
}

Test(cuda, draws_are_the_cpus) {
    in_every_order(draws);
}

/* Chains end where a token is not its candidate; what is made is what a draw alone would make. */
static void walks(struct backend *backend, uint64_t seed) {
    enum { N = 24, VOCAB = 50 };
    struct test_random random = {seed};
    struct case_of_draw cases[N];
    struct sample_draw together[N];
    struct sample_result alone[N], results[N];
    float logits[N * VOCAB], copy[N * VOCAB];
    struct error err;
    for (int i = 0; i < N; i++) {
        random_case(&cases[i], &random, VOCAB);
        for (int v = 0; v < VOCAB; v++) logits[i * VOCAB + v] = random_f32(&random, -5, 5);
    }
    memcpy(copy, logits, sizeof copy);
    for (int i = 0; i < N; i++) {
        backend_sample_begin(backend, copy + i * VOCAB, VOCAB, VOCAB, &cases[i].draw, 1);
        cr_assert_eq(backend_sample_end(backend, &alone[i], &err), STATUS_OK);
        together[i] = cases[i].draw;
        together[i].continues = i % 6 != 0;
        together[i].candidate = random_below(&random, 3) ? alone[i].token : VOCAB + 1;
    }
    backend_sample_begin(backend, logits, VOCAB, VOCAB, together, N);
    cr_assert_eq(backend_sample_end(backend, results, &err), STATUS_OK);
    bool goes_on = false;
    for (int i = 0; i < N; i++) {
        bool made = i % 6 == 0 || goes_on;
        cr_assert_eq(results[i].made, made, "seed %llu: draw %d", (unsigned long long)seed, i);
        if (made) {
            cr_assert(results[i].token == alone[i].token && results[i].n_top == alone[i].n_top &&
                          memcmp(&results[i].logprob, &alone[i].logprob, sizeof(float)) == 0,
                      "seed %llu: draw %d in company", (unsigned long long)seed, i);
        }
        goes_on = made && alone[i].token == together[i].candidate;
    }
    int32_t fed[2 * BACKEND_MAX_FED];
    cr_assert_eq(backend_fed_tokens(backend, fed, 2, &err), STATUS_OK);
    cr_assert_eq(fed[0], alone[N - 1].token);
    for (int i = 0; i < N; i++) cr_assert_eq(fed[BACKEND_MAX_FED + i], alone[i].token);
}

Test(cuda, chains_and_fed_tokens) {
    in_every_order(walks);
}

static void distributions(struct backend *backend, uint64_t seed) {
    enum { VOCAB = 300 };
    struct backend *cpu = open_backend(BACKEND_PORTABLE, 1, MAX_ROWS, MAX_WIDTH);
    struct test_random random = {seed};
    float logits[VOCAB], before[VOCAB], p[VOCAB], q[VOCAB];
    struct error err;
    for (int trial = 0; trial < 20; trial++) {
        struct case_of_draw c;
        double sum = 0;
        random_case(&c, &random, VOCAB);
        c.params.top_p = 1; /* its border may move by one id */
        for (int v = 0; v < VOCAB; v++) logits[v] = random_f32(&random, -6, 6);
        memcpy(before, logits, sizeof before);
        cr_assert_eq(backend_distribution(backend, p, logits, VOCAB, &c.draw, &err), STATUS_OK);
        cr_assert_arr_eq(logits, before, sizeof logits, "the logits stay");
        cr_assert_eq(backend_distribution(cpu, q, logits, VOCAB, &c.draw, &err), STATUS_OK);
        for (int v = 0; v < VOCAB; v++) {
            sum += (double)p[v];
            cr_assert(fabsf(p[v] - q[v]) < 1e-6f, "seed %llu, trial %d: %d has %g, %g on the CPU",
                      (unsigned long long)seed, trial, v, p[v], q[v]);
        }
        cr_assert(fabs(sum - 1) < 1e-5);
        struct sample_result a, b;
        cr_assert_eq(backend_logprobs(backend, &a, logits, VOCAB, 5, 7, &err), STATUS_OK);
        cr_assert_eq(backend_logprobs(cpu, &b, logits, VOCAB, 5, 7, &err), STATUS_OK);
        cr_assert(a.token == 7 && a.n_top == 5 && fabsf(a.logprob - b.logprob) < 1e-4f);
        cr_assert_arr_eq(a.top_token, b.top_token, 5 * sizeof *a.top_token);
    }
    backend_destroy(cpu);
}

Test(cuda, distributions_are_the_cpus) {
    in_every_order(distributions);
}
