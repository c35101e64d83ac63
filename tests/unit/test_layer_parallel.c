/* Layer-parallel passes (EasySpec, speculation.md 3) and the layout in which a decoder layer's
 * attention lives whole on one rank: the bits of exact passes are those of the ordinary layout, the
 * bits of layer-parallel ones depend on neither layout nor number of ranks and are those of the
 * plain text, and an exact pass repairs whatever KV they left. The sources of make-model are
 * included: fixtures have two layers, and a group needs more. */
#include "bench/make_model_weights.c"

#include "tests/reference/plain_model.h"
#include "tests/reference/random.h"
#include "tests/reference/rank_group.h"
#include "tests/unit/checkpoint_files.h"
#include "tests/unit/test.h"

#define DRAFT TANDEM_SOURCE_DIR "/assets/models/llama-tale-draft"

enum { DEEP = 8, N_TOKENS = 40, MAX_KV = 512, MAX_VOCAB = 4096 };

static const char *const fixtures[] = {
    "llama-attention-bias", "llama-f32-sharded", "llama-linear-rope", "llama-tied-f16",
    "llama-untied-hd64",    "llama3-rope-hd128", "mistral-window8",   "qwen2-14-2-hd64",
    "qwen2-14-2-heads",     "qwen3-qk-norm",
};
enum { N_FIXTURES = sizeof fixtures / sizeof *fixtures };

/* A fixture's config with DEEP layers (six between the ends: a short last group of 4) and random
 * weights, no layer like another. */
static void make_deep(char *dir, const char *fixture) {
    struct model_config config;
    struct error err = {.text = ""};
    char patch[128];
    int64_t n_bytes;
    files_make(dir, fixture);
    snprintf(patch, sizeof patch, "{\"num_hidden_layers\": %d, \"layer_types\": null}", DEEP);
    files_patch_json(dir, "config.json", patch);
    CHECK(model_config_load(&config, dir, &err) == STATUS_OK);
    struct make_model_weights weights = {.dir = dir, .config = &config, .dtype = DTYPE_BF16,
                                         .seed = 11, .shard_bytes = 1 << 30,
                                         .scaled_from = DEEP, .scale = 1};
    CHECK(make_model_write_weights(&weights, &n_bytes, &err) == STATUS_OK);
}

static void fill_tokens(int32_t *tokens, int n, uint64_t seed, int vocab) {
    struct test_random random = {seed};
    for (int i = 0; i < n; i++) tokens[i] = random_below(&random, vocab);
}

static void open_group(struct rank_group *g, const char *dir, int degree, bool owner, int max_width,
                       enum dtype weights) {
    struct rank_group_options options = {dir,     degree,       owner, max_width,
                                         weights, BACKEND_AUTO, NULL};
    struct error err = {.text = ""};
    cr_assert_eq(rank_group_create(g, &options, &err), STATUS_OK, "%s: %s", dir, err.text);
}

static void feed(struct rank_group *g, float *out, const int32_t *tokens, int n, int first,
                 int width) {
    struct error err = {.text = ""};
    cr_assert_eq(rank_group_feed(g, out, tokens, n, first, width, &err), STATUS_OK, "%s", err.text);
}

/* What a model makes of N_TOKENS tokens: logits of every row, KV of every layer and position. */
struct trace {
    int n_layers, kv_width, vocab;
    float *logits, *k, *v;
};

static struct trace trace_make(const struct model_config *c) {
    struct trace t = {c->n_layers, c->n_kv_heads * c->head_dim, c->vocab, NULL, NULL, NULL};
    size_t kv = (size_t)(t.n_layers * N_TOKENS * t.kv_width);
    t.logits = xcalloc((size_t)(N_TOKENS * t.vocab), sizeof(float));
    t.k = xcalloc(kv, sizeof(float));
    t.v = xcalloc(kv, sizeof(float));
    return t;
}

static void trace_free(struct trace *t) {
    free(t->logits);
    free(t->k);
    free(t->v);
}

static void trace_read_kv(struct trace *t, const struct rank_group *g) {
    for (int i = 0; i < t->n_layers * N_TOKENS; i++) {
        bool read = rank_group_kv(g, i / N_TOKENS, i % N_TOKENS, t->k + i * t->kv_width,
                                  t->v + i * t->kv_width);
        cr_assert(read, "layer %d, position %d is nowhere, or in two versions", i / N_TOKENS,
                  i % N_TOKENS);
    }
}

/* An exact prefill of 17 rows, then passes of 1 to 4 rows of `width`. */
static struct trace trace_of(struct rank_group *g, int width) {
    struct trace t = trace_make(g->config);
    int32_t tokens[N_TOKENS];
    fill_tokens(tokens, N_TOKENS, 3, t.vocab);
    feed(g, t.logits, tokens, 17, 0, 1);
    for (int at = 17, n; at < N_TOKENS; at += n) {
        n = 1 + at % 4 < N_TOKENS - at ? 1 + at % 4 : N_TOKENS - at;
        feed(g, t.logits + at * t.vocab, tokens + at, n, at, width);
    }
    trace_read_kv(&t, g);
    return t;
}

static bool same_floats(const float *a, const float *b, int n) {
    return memcmp(a, b, (size_t)n * sizeof *a) == 0;
}

static bool same_kv(const struct trace *a, const struct trace *b) {
    int n = a->n_layers * N_TOKENS * a->kv_width;
    return same_floats(a->k, b->k, n) && same_floats(a->v, b->v, n);
}

static void check_same(const struct trace *a, const struct trace *b, const char *what, int degree,
                       bool owner, int width) {
    cr_assert(same_floats(a->logits, b->logits, N_TOKENS * a->vocab),
              "%s: other logits, %d ranks, layer owners %d, width %d", what, degree, owner, width);
    cr_assert(same_kv(a, b), "%s: other KV, %d ranks, layer owners %d, width %d", what, degree,
              owner, width);
}

/* --- layouts ---------------------------------------------------------------------------------- */

/* Exact passes: every layout and degree as the ordinary layout on one rank. */
static void check_exact(const char *dir, const char *what, enum dtype weights) {
    struct rank_group g;
    open_group(&g, dir, 1, false, 1, weights);
    struct trace reference = trace_of(&g, 0);
    rank_group_destroy(&g);
    for (int degree = 1; degree <= 8; degree *= 2) {
        open_group(&g, dir, degree, true, 1, weights);
        struct trace t = trace_of(&g, 1);
        check_same(&reference, &t, what, degree, true, 1);
        trace_free(&t);
        rank_group_destroy(&g);
    }
    trace_free(&reference);
}

Test(layer_parallel, exact_passes_of_owners_on_fixtures) {
    for (int i = 0; i < N_FIXTURES; i++) {
        char dir[4096];
        snprintf(dir, sizeof dir, FIXTURES "%s", fixtures[i]);
        check_exact(dir, fixtures[i], DTYPE_BF16);
    }
}

Test(layer_parallel, exact_passes_of_owners_on_deep_models) {
    for (int i = 0; i < N_FIXTURES; i++) {
        char dir[64];
        make_deep(dir, fixtures[i]);
        check_exact(dir, fixtures[i], i % 2 ? DTYPE_I8 : DTYPE_BF16);
        files_remove(dir);
    }
}

Test(layer_parallel, exact_passes_of_owners_on_the_draft) {
    check_exact(DRAFT, "draft bf16", DTYPE_BF16);
    check_exact(DRAFT, "draft int8", DTYPE_I8);
}

/* Layer-parallel passes: every layout and degree as the ordinary layout on one rank; and not as an
 * exact pass. */
static void check_widths(const char *dir, const char *what, enum dtype weights) {
    struct rank_group g;
    struct trace reference[5] = {{0}};
    open_group(&g, dir, 1, false, 4, weights);
    for (int width = 1; width <= 4; width++) reference[width] = trace_of(&g, width);
    rank_group_destroy(&g);
    for (int width = 2; width <= 4; width++) {
        for (int other = 1; other < width; other++) {
            const struct trace *a = &reference[width], *b = &reference[other];
            cr_assert_not(same_floats(a->logits, b->logits, N_TOKENS * a->vocab),
                          "%s: width %d has the logits of %d", what, width, other);
            cr_assert_not(same_kv(a, b), "%s: width %d has the KV of %d", what, width, other);
        }
    }
    for (int degree = 1; degree <= 4; degree *= 2) {
        for (int owner = 0; owner <= 1; owner++) {
            open_group(&g, dir, degree, owner, 4, weights);
            for (int width = 2; width <= 4; width++) {
                struct trace t = trace_of(&g, width);
                check_same(&reference[width], &t, what, degree, owner, width);
                trace_free(&t);
            }
            rank_group_destroy(&g);
        }
    }
    for (int width = 1; width <= 4; width++) trace_free(&reference[width]);
}

Test(layer_parallel, widths_on_deep_models) {
    for (int i = 0; i < N_FIXTURES; i++) {
        char dir[64];
        make_deep(dir, fixtures[i]);
        check_widths(dir, fixtures[i], i % 2 ? DTYPE_BF16 : DTYPE_I8);
        files_remove(dir);
    }
}

Test(layer_parallel, widths_on_the_draft) {
    check_widths(DRAFT, "draft bf16", DTYPE_BF16);
    check_widths(DRAFT, "draft int8", DTYPE_I8);
}

/* Models with no layers between the ends: nothing is parallel, and nothing breaks. */
Test(layer_parallel, one_and_two_layers_have_no_groups) {
    static const char *const shallow[] = {"qwen2-14-2-hd64", "mistral-window8"};
    for (int i = 0; i < 2; i++) {
        char dir[4096];
        struct rank_group g;
        snprintf(dir, sizeof dir, FIXTURES "%s", shallow[i]);
        for (int owner = 0; owner <= 1; owner++) {
            open_group(&g, dir, 2, owner, 4, DTYPE_BF16);
            struct trace exact = trace_of(&g, 1), parallel = trace_of(&g, 4);
            check_same(&exact, &parallel, shallow[i], 2, owner, 4);
            trace_free(&exact);
            trace_free(&parallel);
            rank_group_destroy(&g);
        }
    }
}

/* --- against the plain text ------------------------------------------------------------------- */

static void check_plain(const char *dir, const char *what, enum dtype weights) {
    struct rank_group g;
    struct plain_model plain;
    int32_t tokens[N_TOKENS];
    open_group(&g, dir, 2, true, 4, weights);
    for (int width = 1; width <= 4; width++) {
        plain_model_create(&plain, g.checkpoint, BACKEND_AUTO, weights, RANK_GROUP_BLOCKS);
        struct trace t = trace_of(&g, width), reference = trace_make(g.config);
        fill_tokens(tokens, N_TOKENS, 3, t.vocab);
        for (int i = 0; i < N_TOKENS; i++) {
            plain_model_step(&plain, tokens[i], i, i < 17 ? 1 : width,
                             reference.logits + i * t.vocab);
        }
        for (int i = 0; i < t.n_layers * N_TOKENS; i++) {
            plain_model_kv(&plain, i / N_TOKENS, i % N_TOKENS, reference.k + i * t.kv_width,
                           reference.v + i * t.kv_width);
        }
        check_same(&reference, &t, what, 2, true, width);
        trace_free(&t);
        trace_free(&reference);
        plain_model_destroy(&plain);
    }
    rank_group_destroy(&g);
}

Test(layer_parallel, groups_are_those_of_the_plain_text) {
    for (int i = 0; i < N_FIXTURES; i++) {
        char dir[64];
        make_deep(dir, fixtures[i]);
        check_plain(dir, fixtures[i], DTYPE_BF16);
        files_remove(dir);
    }
    check_plain(DRAFT, "draft bf16", DTYPE_BF16);
    check_plain(DRAFT, "draft int8", DTYPE_I8);
}

/* --- rows ------------------------------------------------------------------------------------- */

/* A row's bits in company: the sequence's last row in one pass with those of other sequences. */
Test(layer_parallel, rows_do_not_see_their_neighbours) {
    enum { N_OTHERS = 9 };
    struct rank_group g;
    int32_t tokens[RANK_GROUP_ROWS], blocks[2] = {RANK_GROUP_BLOCKS - 1, RANK_GROUP_BLOCKS - 2};
    open_group(&g, DRAFT, 2, true, 4, DTYPE_BF16);
    int vocab = g.config->vocab;
    float *alone = xcalloc((size_t)vocab, sizeof *alone);
    fill_tokens(tokens, RANK_GROUP_ROWS, 21, vocab);
    for (int width = 2; width <= 4; width++) {
        struct backend_segment segments[N_OTHERS + 1];
        int32_t other_block[N_OTHERS], mixed[RANK_GROUP_ROWS], mine = -1;
        float *logits;
        struct error err = {.text = ""};
        feed(&g, NULL, tokens, 20, 0, 1);
        feed(&g, alone, tokens + 20, 1, 20, width);
        int n_rows = 0;
        for (int i = 0; i <= N_OTHERS; i++) {
            bool own = i == 4;
            int n = own ? 1 : 1 + i % 4, other = i - (i > 4);
            if (!own) other_block[other] = other;
            segments[i] = (struct backend_segment){n_rows, n, own ? 20 : 0,
                                                   own ? blocks : &other_block[other]};
            for (int r = 0; r < n; r++) mixed[n_rows + r] = own ? tokens[20] : 5 + i * 7 + r;
            if (own) mine = n_rows;
            n_rows += n;
        }
        struct transformer_batch batch = {mixed, n_rows, segments, N_OTHERS + 1, &mine, 1, width,
                                          false};
        cr_assert_eq(rank_group_forward(&g, &batch, &logits, &err), STATUS_OK, "%s", err.text);
        cr_assert(same_floats(alone, logits, vocab), "width %d: other bits in company", width);
    }
    free(alone);
    rank_group_destroy(&g);
}

/* --- calibration ------------------------------------------------------------------------------ */

/* A sequence through rounds of layer-parallel drafting: some tokens hold, the rest fall, and
 * each ends with one exact pass over what held and one more. KV must be that of a sequence that
 * was never drafted. */
static void check_calibration(struct rank_group *g, struct rank_group *fresh, uint64_t seed) {
    struct test_random random = {seed};
    int vocab = g->config->vocab, n = 1 + random_below(&random, 20), n_fuzzy = 0;
    int32_t tokens[N_TOKENS + 8];
    fill_tokens(tokens, N_TOKENS + 8, random_u64(&random), vocab);
    feed(g, NULL, tokens, n, 0, 1);
    while (n < N_TOKENS) {
        int n_drafted = 1 + random_below(&random, 6), width = 1 + random_below(&random, 4);
        for (int i = 0; i < n_drafted; i++) feed(g, NULL, tokens + n + i, 1, n + i, width);
        n_fuzzy += width > 1;
        int n_new = 1 + random_below(&random, n_drafted + 1); /* what holds, and the target's own */
        if (n_new > N_TOKENS - n) n_new = N_TOKENS - n;
        for (int i = n_new - 1; i < 8; i++) tokens[n + i] = random_below(&random, vocab);
        feed(g, NULL, tokens + n, n_new, n, 1);
        n += n_new;
    }
    feed(fresh, NULL, tokens, N_TOKENS, 0, 1);
    struct trace repaired = trace_make(g->config), reference = trace_make(g->config);
    trace_read_kv(&repaired, g);
    trace_read_kv(&reference, fresh);
    bool same = same_kv(&repaired, &reference);
    trace_free(&repaired);
    trace_free(&reference);
    cr_assert(same, "seed %llu: KV is not exact after calibration", (unsigned long long)seed);
    cr_assert(n_fuzzy > 0 || N_TOKENS - n < 20, "seed %llu drafted nothing",
              (unsigned long long)seed);
}

static void check_calibrations(const char *dir, int n_histories) {
    struct rank_group g, fresh;
    open_group(&fresh, dir, 1, false, 1, DTYPE_BF16);
    for (int degree = 1; degree <= 4; degree *= 2) {
        for (int owner = 0; owner <= 1; owner++) {
            open_group(&g, dir, degree, owner, 4, DTYPE_BF16);
            for (int i = 0; i < n_histories; i++) {
                check_calibration(&g, &fresh, (uint64_t)(1000 * degree + 100 * owner + i));
            }
            rank_group_destroy(&g);
        }
    }
    rank_group_destroy(&fresh);
}

Test(layer_parallel, calibration_repairs_any_history) {
    char dir[64];
    check_calibrations(DRAFT, 5);
    make_deep(dir, "qwen3-qk-norm");
    check_calibrations(dir, 10);
    files_remove(dir);
    make_deep(dir, "mistral-window8");
    check_calibrations(dir, 10);
    files_remove(dir);
}

/* Without the exact pass the KV is not exact: what the test above compares can differ. */
Test(layer_parallel, drafts_leave_inexact_kv) {
    struct rank_group g;
    int32_t tokens[N_TOKENS];
    float k[2][MAX_KV], v[2][MAX_KV];
    open_group(&g, DRAFT, 2, true, 4, DTYPE_BF16);
    fill_tokens(tokens, N_TOKENS, 5, g.config->vocab);
    size_t width = (size_t)(g.config->n_kv_heads * g.config->head_dim) * sizeof(float);
    feed(&g, NULL, tokens, 17, 0, 1);
    for (int layer = 0; layer < g.config->n_layers; layer++) {
        feed(&g, NULL, tokens + 17, 1, 17, 4);
        cr_assert(rank_group_kv(&g, layer, 17, k[0], v[0]));
        feed(&g, NULL, tokens + 17, 1, 17, 1);
        cr_assert(rank_group_kv(&g, layer, 17, k[1], v[1]));
        /* Layer 0 runs alone; layer 1 heads the first group: its input is not stale. */
        bool same = memcmp(k[0], k[1], width) == 0 && memcmp(v[0], v[1], width) == 0;
        cr_assert_eq(same, layer <= 1, "layer %d", layer);
    }
    rank_group_destroy(&g);
}

/* --- memory ----------------------------------------------------------------------------------- */

/* The footprint packs weights as tiles need them, which is never less than other kernels do. */
static void check_memory(const char *dir, const char *what, enum dtype weights) {
    for (int degree = 1; degree <= 8; degree *= 2) {
        for (int owner = 0; owner <= 1; owner++) {
            struct rank_group g;
            open_group(&g, dir, degree, owner, 4, weights);
            for (int rank = 0; rank < degree; rank++) {
                struct shard shard;
                struct error err;
                CHECK(shard_make(&shard, g.config, rank, degree, &err) == STATUS_OK);
                struct footprint said = footprint_of_draft(
                    g.config, &shard, weights, RANK_GROUP_ROWS, RANK_GROUP_ROWS, owner, 4);
                struct transformer_memory real = transformer_memory(g.ranks[rank]);
                cr_assert(real.weights_bytes <= said.weights_bytes,
                          "%s: rank %d of %d, owner %d: weights %zu, said %zu", what, rank, degree,
                          owner, real.weights_bytes, said.weights_bytes);
                size_t said_kv = said.kv_bytes_per_block * RANK_GROUP_BLOCKS;
                cr_assert_eq(real.kv_bytes, said_kv, "%s: rank %d of %d, owner %d: KV %zu not %zu",
                             what, rank, degree, owner, real.kv_bytes, said_kv);
                size_t padding = real.scratch_bytes - said.scratch_bytes; /* a line a buffer */
                cr_assert(padding <= 16 * 64, "%s: rank %d of %d, owner %d: %zu bytes more", what,
                          rank, degree, owner, padding);
            }
            rank_group_destroy(&g);
        }
    }
}

Test(layer_parallel, memory_is_what_the_footprint_says) {
    check_memory(DRAFT, "draft", DTYPE_BF16);
    for (int i = 0; i < N_FIXTURES; i++) {
        char dir[64];
        make_deep(dir, fixtures[i]);
        check_memory(dir, fixtures[i], i % 2 ? DTYPE_I8 : DTYPE_BF16);
        files_remove(dir);
    }
}
