/* A group of threads around the engine: it comes up, says why it cannot, and goes away; and a step
 * told in one message or in two gives the same logits on every number of ranks. */
#include "tests/unit/test.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "tests/reference/random.h"
#include "worker/local_group.h"

#define MODEL TANDEM_SOURCE_DIR "/assets/models/llama-tale-target"

enum { MAX_ROWS = 700, N_BLOCKS = 50, VOCAB = 4096 };

static struct local_group_options options_of(int degree) {
    return (struct local_group_options){
        .model_dir = MODEL,
        .degree = degree,
        .n_threads = 1,
        .weights = DTYPE_BF16,
        .n_blocks = N_BLOCKS,
        .max_rows = MAX_ROWS,
        .max_logit_rows = 2,
        .max_sequences = 2,
    };
}

Test(local_group, says_why_it_cannot) {
    static const int degrees[] = {0, 3, 6, 9, -1};
    for (int i = 0; i < 5; i++) {
        struct local_group *group = NULL;
        struct error err = {0};
        struct local_group_options options = options_of(degrees[i]);
        cr_assert_eq(local_group_create(&group, &options, &err), STATUS_INVALID_ARGUMENT,
                     "degree %d: %s", degrees[i], err.text);
        cr_assert_null(group);
        cr_assert_not_null(strstr(err.text, "degree"), "%s", err.text);
    }
    struct local_group *group = NULL;
    struct error err = {0};
    struct local_group_options options = options_of(2);
    options.model_dir = TANDEM_SOURCE_DIR "/assets/models/nobody";
    cr_assert_neq(local_group_create(&group, &options, &err), STATUS_OK);
    cr_assert_not_null(strstr(err.text, "nobody"), "%s", err.text);
}

Test(local_group, comes_and_goes) {
    for (int degree = 1; degree <= 8; degree *= 2) {
        struct local_group *group;
        struct error err = {0};
        struct local_group_options options = options_of(degree);
        cr_assert_eq(local_group_create(&group, &options, &err), STATUS_OK, "%s", err.text);
        cr_assert_eq(local_group_config(group)->vocab, VOCAB);
        local_group_destroy(group);
    }
}

/* Logits after n_tokens of one sequence and after 3 of another. */
static enum status logits_of(struct local_group *group, float *out, int n_tokens,
                             struct error *err) {
    static int32_t tokens[MAX_ROWS], tables[2][N_BLOCKS];
    struct test_random random = {5};
    for (int i = 0; i < MAX_ROWS; i++) tokens[i] = random_below(&random, VOCAB);
    for (int i = 0; i < N_BLOCKS; i++) tables[0][i] = N_BLOCKS - 1 - i; /* the other has block 0 */
    struct backend_segment segments[2] = {{0, n_tokens, 0, tables[0]}, {n_tokens, 3, 0, tables[1]}};
    int32_t logit_rows[2] = {n_tokens - 1, n_tokens + 2};
    struct transformer_batch batch = {tokens, n_tokens + 3, segments, 2, logit_rows, 2, 0, false};
    float *logits;
    TRY(engine_forward(local_group_engine(group), ENGINE_TARGET, &batch, &logits, err));
    memcpy(out, logits, 2 * VOCAB * sizeof *out);
    return STATUS_OK;
}

Test(local_group, the_same_logits_on_every_number_of_ranks) {
    static const int lengths[] = {1, 10, 690};
    static float reference[3][2 * VOCAB], logits[2 * VOCAB];
    for (int degree = 1; degree <= 8; degree *= 2) {
        struct local_group *group;
        struct error err = {0};
        struct local_group_options options = options_of(degree);
        cr_assert_eq(local_group_create(&group, &options, &err), STATUS_OK, "%s", err.text);
        bool same[3] = {false};
        for (int i = 0; i < 3; i++) {
            if (logits_of(group, logits, lengths[i], &err) != STATUS_OK) break;
            if (degree == 1) memcpy(reference[i], logits, sizeof logits);
            same[i] = memcmp(reference[i], logits, sizeof logits) == 0;
        }
        local_group_destroy(group);
        for (int i = 0; i < 3; i++) {
            cr_assert(same[i], "degree %d, %d tokens: %s", degree, lengths[i], err.text);
        }
    }
    cr_assert(memcmp(reference[0], reference[1], sizeof logits) != 0, "logits of nothing");
}
