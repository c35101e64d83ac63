/* A lot of mixed requests and ways to run them: what every part of the lossless suite shares. The
 * text of a request is whatever it draws alone, one at a time, in mode plain on one rank; every
 * other way must bring the same tokens and the same bits of log-probability. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "worker/local_group.h"
#include "worker/scheduler.h"
#include "worker/step_loop.h"

enum { LOT_REQUESTS = 16, LOT_MAX_PROMPT = 192, LOT_MAX_OUTPUT = 48, LOT_MAX_TEXT = 240 };
enum { LOT_CONTEXT = 192 };

struct lot {
    int32_t prompts[LOT_REQUESTS][LOT_MAX_PROMPT];
    int32_t stop_ids[LOT_REQUESTS];
    struct step_request requests[LOT_REQUESTS]; /* keys from 1 */
};

/* temperature < 0: mixed (0, 0.7, 1) with all kinds of filters, penalties and ends; else the same
 * for all, without filters. */
struct lot *lot_create(uint64_t seed, float temperature);

/* Noise prompts that leave 1 to 16 tokens of the context, and ask for more. */
struct lot *lot_near_limit(uint64_t seed);

struct lot_outcome {
    int32_t tokens[LOT_MAX_OUTPUT];
    float logprobs[LOT_MAX_OUTPUT];
    int n_tokens, n_logprobs;
    uint32_t reason;
    int n_ends;
    uint32_t drafts, drafted, accepted;
};

struct lot_outcomes {
    struct lot_outcome of[LOT_REQUESTS];
    uint64_t drafts, draft_tokens, accepted, rollbacks, discarded;
    uint64_t pre_verify_hits, continuations, preemptions, hit_tokens;
    int n_steps;
};

/* How to run it. Zero means plain, alone, on one rank. */
struct way {
    enum backend_isa isa; /* AUTO: the processor's best */
    enum spec_mode mode;
    int window, layer_width, delay;
    int target_degree, draft_degree; /* 0: 1 */
    bool shared;
    bool ngram;
    int batch; /* requests that run at once; 0: 1 */
    int max_sequences; /* of the loop, where more wait; 0: all */
    int max_step_tokens, n_blocks; /* 0: plenty */
    bool prefix_cache;
    bool mixed_wishes; /* requests ask for modes and windows of their own */
    enum sampling_rule rule;
    struct drafter *drafter; /* used instead of the group's where not NULL; borrowed */
    struct spec_policy (*policy_at)(int step, const struct way *way); /* NULL: the same always */
};

/* Words for a way, in `out`. */
const char *way_name(char *out, size_t size, const struct way *way);

/* A group for the way's topology, kept by the caller over several ways of the same topology. */
enum status way_open(struct local_group **out, const struct way *way, struct error *err);
enum status way_run(struct local_group *group, const struct way *way, const struct lot *lot,
                    struct lot_outcomes *out, struct error *err);

/* The same with one request cancelled after some steps. */
struct lot_cancel {
    uint64_t key;
    int after_steps;
};
enum status way_run_cancelling(struct local_group *group, const struct way *way,
                               const struct lot *lot, struct lot_outcomes *out,
                               const struct lot_cancel *cancel, struct error *err);

/* NULL where both brought the same; else what differs, of which request. */
const char *lot_compare(const struct lot_outcomes *a, const struct lot_outcomes *b, int *request);
