/* A drafter that knows the text beforehand and proposes each true token with probability
 * `accuracy`: what tests and benches hold the rounds against. At accuracy 0 it only ever proposes
 * garbage, at 1 the truth. It needs no model and can stand for a remote drafter as well. */
#pragma once
#include "worker/draft/drafter.h"

/* The whole text (prompt and output) of the request that begins: n tokens, borrowed while it
 * lives. Behind its end the oracle proposes nothing. */
typedef const int32_t *(*oracle_truth_fn)(void *user, const struct draft_begin *begin, int *n);

struct oracle_drafter_options {
    int max_sequences;
    int vocab;
    double accuracy;
    uint64_t seed;
    oracle_truth_fn truth;
    void *user;
};

struct drafter *oracle_drafter_create(const struct oracle_drafter_options *options);
