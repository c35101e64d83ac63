/* The one promise, seen at the logits: the bits of a row do not depend on how many rows share the
 * pass, on neighbours, on chunking, on threads, or on the tensor-parallel degree. */
#include "tests/reference/emulated.h"
#include "tests/reference/model_run.h"
#include "tests/unit/test.h"

enum { N_TOKENS = 70, VOCAB_MAX = 4096 };

static const char *const target_dir = TANDEM_SOURCE_DIR "/assets/models/llama-tale-target";
static const char *const draft_dir = TANDEM_SOURCE_DIR "/assets/models/llama-tale-draft";

/* The emulated device is slow: it gets the small model. */
static const char *dir_for(enum backend_isa isa) {
    return isa == BACKEND_EMULATED ? draft_dir : target_dir;
}

/* A processor without the instruction set tests nothing here, and must not count as a pass. */
static void skip_unless_available(enum backend_isa isa) {
    if (!backend_isa_available(isa)) {
        cr_skip_test("%s is not available on this processor", backend_isa_to_name(isa));
    }
}

struct setting {
    int degree;
    enum backend_isa isa;
    enum dtype weights;
    int n_threads;
};

static void fill_tokens(int32_t *tokens, int n, uint32_t seed) {
    for (int i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        tokens[i] = (int32_t)((seed >> 8) % 4088u);
    }
}

/* Logits of N_TOKENS fixed tokens fed in chunks of `chunk`, by a fresh model. Caller frees. */
static float *logits_of(struct setting s, int chunk) {
    struct error err;
    struct local_group *group;
    cr_assert(model_run_open(&group, dir_for(s.isa), s.degree, s.isa, s.weights, s.n_threads, 64, 128,
                             &err) == STATUS_OK,
              "%s", err.text);
    int32_t tokens[N_TOKENS];
    fill_tokens(tokens, N_TOKENS, 7);
    float *logits = xcalloc(N_TOKENS * (size_t)local_group_config(group)->vocab, sizeof *logits);
    cr_assert(model_run_feed(group, logits, tokens, N_TOKENS, 0, 3, chunk, &err) == STATUS_OK, "%s",
              err.text);
    local_group_destroy(group);
    return logits;
}

static void check_same(const float *a, const float *b, const char *what, int value) {
    size_t bytes = (size_t)N_TOKENS * VOCAB_MAX * sizeof *a;
    cr_assert(memcmp(a, b, bytes) == 0, "logits differ: %s %d", what, value);
}

static void check_chunks(enum backend_isa isa, enum dtype weights) {
    skip_unless_available(isa);
    float *reference = logits_of((struct setting){1, isa, weights, 1}, 1);
    const int chunks[] = {2, 5, 16, 17, 32, 33, N_TOKENS};
    for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
        float *logits = logits_of((struct setting){1, isa, weights, 1}, chunks[i]);
        check_same(reference, logits, "chunk", chunks[i]);
        free(logits);
    }
    float *logits = logits_of((struct setting){1, isa, weights, 2}, 9);
    check_same(reference, logits, "threads", 2);
    free(logits);
    free(reference);
}

Test(logit_bits, chunks_portable_bf16) { check_chunks(BACKEND_PORTABLE, DTYPE_BF16); }
Test(logit_bits, chunks_avx2_bf16) { check_chunks(BACKEND_AVX2, DTYPE_BF16); }
Test(logit_bits, chunks_avx512_bf16) { check_chunks(BACKEND_AVX512, DTYPE_BF16); }
Test(logit_bits, chunks_amx_bf16) { check_chunks(BACKEND_AMX, DTYPE_BF16); }
Test(logit_bits, chunks_avx2_int8) { check_chunks(BACKEND_AVX2, DTYPE_I8); }
Test(logit_bits, chunks_avx512_int8) { check_chunks(BACKEND_AVX512, DTYPE_I8); }
Test(logit_bits, chunks_amx_int8) { check_chunks(BACKEND_AMX, DTYPE_I8); }
Test(logit_bits, chunks_emulated_bf16) { check_chunks(BACKEND_EMULATED, DTYPE_BF16); }
Test(logit_bits, chunks_emulated_int8) { check_chunks(BACKEND_EMULATED, DTYPE_I8); }
Test(logit_bits, chunks_emulated_fp8) { check_chunks(BACKEND_EMULATED, DTYPE_F8); }

static void check_degrees(enum backend_isa isa, enum dtype weights) {
    skip_unless_available(isa);
    float *reference = logits_of((struct setting){1, isa, weights, 1}, 16);
    for (int degree = 2; degree <= 8; degree *= 2) {
        float *logits = logits_of((struct setting){degree, isa, weights, 1}, degree == 4 ? 1 : 24);
        check_same(reference, logits, "tensor-parallel degree", degree);
        free(logits);
    }
    free(reference);
}

Test(logit_bits, degrees_auto_bf16) { check_degrees(BACKEND_AUTO, DTYPE_BF16); }
Test(logit_bits, degrees_auto_int8) { check_degrees(BACKEND_AUTO, DTYPE_I8); }
Test(logit_bits, degrees_avx2_bf16) { check_degrees(BACKEND_AVX2, DTYPE_BF16); }
Test(logit_bits, degrees_portable_bf16) { check_degrees(BACKEND_PORTABLE, DTYPE_BF16); }
Test(logit_bits, degrees_emulated_bf16) { check_degrees(BACKEND_EMULATED, DTYPE_BF16); }
Test(logit_bits, degrees_emulated_int8) { check_degrees(BACKEND_EMULATED, DTYPE_I8); }
Test(logit_bits, degrees_emulated_fp8) { check_degrees(BACKEND_EMULATED, DTYPE_F8); }

/* One rank, for passes that are put together by hand: 160 blocks, 128 rows. */
static struct local_group *open_alone(enum backend_isa isa) {
    struct error err;
    struct local_group *group;
    cr_assert(model_run_open(&group, dir_for(isa), 1, isa, DTYPE_BF16, 1, 160, 128, &err) == STATUS_OK,
              "%s", err.text);
    return group;
}

/* A tree of candidates behind a prefix of 20, in one pass: a segment for each path, whose block tables share
 * the prefix's full block; the other is computed again in each. Every node's logits are those of its path
 * decoded alone. */
static void check_tree(enum backend_isa isa) {
    enum { PREFIX = 20, SHARED = 16, PATHS = 3, DEPTH = 3, ROWS = PREFIX - SHARED + DEPTH };
    static const int32_t paths[PATHS][DEPTH] = {{31, 41, 59}, {31, 26, 53}, {58, 97, 93}};
    skip_unless_available(isa);
    struct error err;
    struct local_group *group = open_alone(isa);
    size_t vocab = (size_t)local_group_config(group)->vocab;
    int32_t tokens[PATHS * ROWS], blocks[PATHS][2], logit_rows[PATHS * DEPTH], sequence[PREFIX + DEPTH];
    struct backend_segment segments[PATHS];
    float *alone = xcalloc(PATHS * (PREFIX + DEPTH) * vocab, sizeof *alone);
    fill_tokens(sequence, PREFIX, 5);
    for (int i = 0; i < PATHS; i++) {
        memcpy(sequence + PREFIX, paths[i], sizeof paths[i]);
        cr_assert(model_run_feed(group, alone + (size_t)i * (PREFIX + DEPTH) * vocab, sequence,
                                 PREFIX + DEPTH, 0, 0, 1, &err) == STATUS_OK);
        blocks[i][0] = 0;
        blocks[i][1] = 100 + i;
        segments[i] = (struct backend_segment){i * ROWS, ROWS, SHARED, blocks[i]};
        memcpy(tokens + i * ROWS, sequence + SHARED, sizeof *tokens * ROWS);
        for (int d = 0; d < DEPTH; d++) logit_rows[i * DEPTH + d] = i * ROWS + PREFIX - SHARED + d;
    }
    struct transformer_batch batch = {tokens, PATHS * ROWS, segments, PATHS, logit_rows, PATHS * DEPTH,
                                      0, false};
    float *logits;
    cr_assert(engine_forward(local_group_engine(group), ENGINE_TARGET, &batch, &logits, &err) ==
                  STATUS_OK, "%s", err.text);
    for (int i = 0; i < PATHS * DEPTH; i++) {
        const float *own = alone + (size_t)(i / DEPTH * (PREFIX + DEPTH) + PREFIX + i % DEPTH) * vocab;
        cr_assert(memcmp(own, logits + (size_t)i * vocab, vocab * sizeof *own) == 0,
                  "path %d, node %d", i / DEPTH, i % DEPTH);
    }
    free(alone);
    local_group_destroy(group);
}

Test(logit_bits, trees_auto) { check_tree(BACKEND_AUTO); }
Test(logit_bits, trees_avx2) { check_tree(BACKEND_AVX2); }
Test(logit_bits, trees_emulated) { check_tree(BACKEND_EMULATED); }

/* Ranks of devices replay their passes from graphs, exchanges and all. */
Test(logit_bits, degrees_replay_graphs) {
    skip_unless_available(BACKEND_EMULATED);
    for (int degree = 2; degree <= 4; degree *= 2) {
        uint64_t before = emulated_replays();
        free(logits_of((struct setting){degree, BACKEND_EMULATED, DTYPE_BF16, 1}, 1));
        /* 70 passes of one row and fewer than 8 shapes; a graph is many launches. */
        uint64_t passes = (uint64_t)(N_TOKENS - 8) * (uint64_t)degree;
        cr_assert(emulated_replays() - before > passes, "degree %d: %llu launches were replayed", degree,
                  (unsigned long long)(emulated_replays() - before));
    }
}

/* One sequence decoded alone, then in the company of 1..31 others that decode and prefill. */
static void check_neighbours(enum backend_isa isa) {
    skip_unless_available(isa);
    struct error err;
    struct local_group *group = open_alone(isa);
    size_t vocab = (size_t)local_group_config(group)->vocab;
    int32_t prompt[20], next = 77;
    fill_tokens(prompt, 20, 99);
    cr_assert(model_run_feed(group, NULL, prompt, 20, 0, 0, 20, &err) == STATUS_OK);
    float *alone = xcalloc(vocab, sizeof *alone);
    cr_assert(model_run_feed(group, alone, &next, 1, 20, 0, 1, &err) == STATUS_OK);

    for (int n_others = 1; n_others <= 31; n_others += 5) {
        int32_t tokens[128], blocks[32][4], mine_blocks[2] = {0, 1};
        struct backend_segment segments[32];
        int row = 0, n_segments = 0, my_row = -1;
        for (int i = 0; i <= n_others; i++) {
            bool mine = i == n_others / 2;
            int n = mine ? 1 : 1 + i % 4;
            for (int b = 0; b < 4; b++) blocks[i][b] = 4 + 4 * i + b;
            segments[n_segments++] = (struct backend_segment){
                row, n, mine ? 20 : 0, mine ? mine_blocks : blocks[i]};
            if (mine) my_row = row;
            fill_tokens(tokens + row, n, (uint32_t)(1000 + i));
            if (mine) tokens[row] = next;
            row += n;
        }
        struct transformer_batch batch = {tokens, row, segments, n_segments, &my_row, 1, 0, false};
        float *logits;
        cr_assert(engine_forward(local_group_engine(group), ENGINE_TARGET, &batch, &logits, &err) == STATUS_OK, "%s", err.text);
        cr_assert(memcmp(alone, logits, vocab * sizeof *alone) == 0, "%d neighbours", n_others);
    }
    free(alone);
    local_group_destroy(group);
}

Test(logit_bits, neighbours_auto) { check_neighbours(BACKEND_AUTO); }
Test(logit_bits, neighbours_avx2) { check_neighbours(BACKEND_AVX2); }
Test(logit_bits, neighbours_emulated) { check_neighbours(BACKEND_EMULATED); }
