/* Drafters without a model, and orders as bytes. */
#include "tests/unit/test.h"

#include <stdlib.h>
#include <string.h>

#include "worker/draft/draft_wire.h"
#include "worker/draft/history.h"
#include "worker/draft/ngram_drafter.h"

/* The definition, word for word: the longest suffix of NGRAM_MAX down to NGRAM_MIN tokens that
 * stands somewhere before, at its latest place. */
static int find_slowly(const int32_t *tokens, int n) {
    for (int length = NGRAM_MAX; length >= NGRAM_MIN; length--) {
        for (int end = n - 1; end >= length; end--) {
            if (memcmp(tokens + end - length, tokens + n - length,
                       (size_t)length * sizeof *tokens) == 0) {
                return end;
            }
        }
    }
    return -1;
}

Test(ngram, finds_the_latest_longest) {
    uint32_t x = 7;
    int n_found = 0;
    for (int trial = 0; trial < 20000; trial++) {
        int32_t tokens[24];
        uint32_t seed = x;
        int n = 1 + trial % 24;
        for (int i = 0; i < n; i++) {
            x = x * 1664525u + 1013904223u;
            tokens[i] = (int32_t)(x >> 28) % 3;
        }
        int found = ngram_find(tokens, n);
        cr_assert_eq(found, find_slowly(tokens, n), "seed %u, %d tokens: %d", seed, n, found);
        n_found += found >= 0;
    }
    cr_assert(n_found > 5000 && n_found < 20000);
}

Test(ngram, proposes_what_followed_and_obeys_verdicts) {
    struct drafter *drafter = ngram_drafter_create(2);
    int32_t prompt[] = {1, 2, 3, 4, 9, 9, 2, 3}, own[] = {7};
    uint64_t hash = 0;
    for (int i = 0; i < 8; i++) hash = draft_history_hash(hash, prompt[i]);
    int32_t stop = 9;
    struct draft_begin begin = {.slot = 1, .tokens = prompt, .n_prompt = 8, .n_tokens = 8,
                                .stop_ids = &stop, .n_stop_ids = 1};
    struct draft_job job = {.slot = 1, .plan = {0, 4, 4}, .n_committed = 8, .hash = hash};
    struct draft_order order = {.begins = &begin, .n_begins = 1, .jobs = &job, .n_jobs = 1};
    struct draft_chain chain;
    struct error err;
    cr_assert_eq(drafter_start(drafter, &order, &err), STATUS_OK);
    cr_assert_eq(drafter_collect(drafter, &chain, true, NULL, &err), STATUS_OK);
    cr_assert(chain.n == 2 && chain.tokens[0] == 4 && chain.tokens[1] == 9,
              "nothing behind the end token 9: %d tokens", chain.n);
    /* 4 held, then 7 came instead of 9: "4 7" was never seen. */
    hash = draft_history_hash(draft_history_hash(hash, 4), 7);
    job = (struct draft_job){.slot = 1, .accepted = 1, .n_own = 1, .own = own, .plan = {0, 4, 4},
                             .n_committed = 10, .hash = hash};
    order.n_begins = 0;
    cr_assert_eq(drafter_start(drafter, &order, &err), STATUS_OK);
    cr_assert_eq(drafter_collect(drafter, &chain, true, NULL, &err), STATUS_OK);
    cr_assert_eq(chain.n, 0);
    job.accepted = 0;
    job.hash++;
    cr_assert_eq(drafter_start(drafter, &order, &err), STATUS_ABORTED);
    drafter_destroy(drafter);
}

/* Committed ids that a draft model does not have are kept as id 0, and hashed as what they are. */
Test(history, longer_vocabularies) {
    struct draft_history *history = draft_history_create(1, 100);
    int32_t tokens[] = {5, 250, 7};
    struct draft_begin begin = {.slot = 0, .tokens = tokens, .n_prompt = 3, .n_tokens = 3};
    struct draft_sequence *sequence = draft_history_begin(history, &begin);
    uint64_t hash = 0;
    for (int i = 0; i < 3; i++) hash = draft_history_hash(hash, tokens[i]);
    cr_assert_eq(sequence->tokens[1], 0);
    cr_assert_eq(sequence->hash, hash);
    draft_history_destroy(history);
}

/* An order goes through the bytes unchanged, also when it is longer than the first part. */
Test(draft_wire, orders_travel_whole) {
    enum { N_TOKENS = 3000, N_JOBS = 40 };
    int32_t *tokens = calloc(N_TOKENS, sizeof *tokens);
    for (int i = 0; i < N_TOKENS; i++) tokens[i] = i * 3;
    struct sample_bias bias[] = {{4, 1.5f}, {9, -2}};
    int32_t stops[] = {2, 11, 12};
    int ends[] = {3, 1};
    struct draft_begin begin = {.slot = 1, .tokens = tokens, .n_prompt = 10, .n_tokens = N_TOKENS,
                                .sampling = {.temperature = 0.7f, .seed = 99, .bias = bias, .n_bias = 2},
                                .stop_ids = stops, .n_stop_ids = 3, .min_tokens = 6};
    struct draft_job jobs[N_JOBS];
    for (int i = 0; i < N_JOBS; i++) {
        jobs[i] = (struct draft_job){.slot = i, .accepted = i % 4, .n_own = i % 3, .own = tokens + i,
                                     .plan = {i % 5, 4, 0}, .n_committed = 100 + i,
                                     .hash = (uint64_t)i << 40};
    }
    struct draft_order order = {7, ends, 2, &begin, 1, jobs, N_JOBS, 2, true}, seen;
    struct draft_wire wire = {0};
    struct draft_wire_arrays arrays = {0};
    draft_wire_put_order(&wire, &order);
    wire.at = 16; /* behind the head */
    draft_wire_get_order(&wire, &seen, &arrays);
    cr_assert(seen.round == 7 && seen.n_ends == 2 && seen.ends[1] == 1 && seen.early);
    cr_assert(seen.n_begins == 1 && seen.begins[0].min_tokens == 6 && seen.layer_width == 2);
    cr_assert_arr_eq(seen.begins[0].tokens, tokens, N_TOKENS * sizeof *tokens);
    cr_assert(seen.begins[0].sampling.bias[1].bias == -2 && seen.begins[0].stop_ids[2] == 12);
    for (int i = 0; i < N_JOBS; i++) {
        const struct draft_job *job = &seen.jobs[i];
        cr_assert(job->slot == i && job->accepted == i % 4 && job->hash == (uint64_t)i << 40);
        cr_assert(job->n_own == i % 3 && (job->n_own == 0 || job->own[0] == tokens[i]));
        cr_assert(job->plan.tail == i % 5 && job->n_committed == 100 + i);
    }
    draft_wire_arrays_free(&arrays);
    draft_wire_free(&wire);
    free(tokens);
}
