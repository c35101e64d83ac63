/* What proposes tokens. The target's leader tells a drafter, once a round, what has become of each
 * sequence and how many tokens it wants; the drafter answers with chains of tokens. It may always
 * make fewer than asked, and nothing it says can change a text: the target judges every token.
 *
 *     model_drafter.c    a draft model on an engine, exact or layer-parallel (EasySpec)
 *     ngram_drafter.c    prompt look-up, no model
 *     remote_drafter.c   stands for a drafter on other ranks, so that both sides compute at once (PEARL);
 *                        draft_service.c is its other end
 *
 * A round is start, then collect: once if everything is wanted at once, twice when the target
 * waits for the first few tokens of each sequence (`early`). Between the two the target may
 * compute.
 *
 * Owned and called by one thread. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/spec_mode.h"
#include "kernels/backend.h"
#include "worker/spec/round.h"

/* A sequence becomes known. Everything is copied. */
struct draft_begin {
    int slot; /* 0 .. max_sequences - 1, free */
    const int32_t *tokens; /* prompt, and output so far where drafting begins late */
    int n_prompt, n_tokens;
    struct sample_params sampling; /* `bias` is read; `banned` is filled in by the drafter */
    const int32_t *stop_ids;       /* end tokens: nothing is drafted behind one */
    int n_stop_ids;
    int min_tokens;                /* before so many output tokens, stop ids are banned */
};

/* What happened to a sequence since it was last told of, then what is wanted of it. Applying it:
 * the first `accepted` candidates become committed; if n_own > 0 or abandon, the other candidates
 * fall and the own tokens become committed; what is left is the tail. */
struct draft_job {
    int slot;
    int accepted;
    int n_own;
    const int32_t *own; /* corrections, bonuses, tokens of rounds without a draft */
    bool abandon;       /* the target has dropped its candidates (preemption) */
    struct round_plan plan; /* plan.make tokens are wanted behind a tail of plan.tail; the first
                               plan.wait of them early */
    int n_committed;    /* afterwards */
    uint64_t hash;      /* of the committed tokens: both sides compare (draft_history_hash) */
};

struct draft_order {
    uint32_t round;
    const int *ends; /* slots that become free, applied first */
    int n_ends;
    const struct draft_begin *begins; /* applied next */
    int n_begins;
    const struct draft_job *jobs; /* distinct slots */
    int n_jobs;
    int layer_width; /* of the steps behind the first; 1: exact */
    bool early;      /* collect is called for the awaited tokens first */
};

/* The answer to one job. */
struct draft_chain {
    int n; /* <= plan.make */
    int32_t tokens[SPEC_MAX_WINDOW];
    float q[SPEC_MAX_WINDOW]; /* probability that each was drawn with (sampling rule `rejection`) */
};

/* How a round went on the drafter's side. Times of passes; 0: none of that kind ran. */
struct draft_report {
    int64_t step_ns;      /* mean exact step of one row a sequence */
    int64_t fuzzy_ns;     /* mean layer-parallel step */
    int64_t calibrate_ns; /* exact pass over rows that were not exact */
    int64_t waited_ns;    /* since it had answered the round before */
    bool prefilling;      /* some known sequence's prompt is not computed yet: worth an order */
};

struct drafter;

struct drafter_ops {
    /* Applies the order and begins. ABORTED when the two sides' committed tokens differ: both
     * histories are logged, the replica must end. UNAVAILABLE when ranks are lost. */
    enum status (*start)(struct drafter *, const struct draft_order *, struct error *);
    /* Chains of the order's jobs, in their order. all false: at least the awaited tokens (only after an
     * order with `early`), and they are repeated by the call with all true. report: only with all. */
    enum status (*collect)(struct drafter *, struct draft_chain *chains, bool all,
                           struct draft_report *report, struct error *);
    /* Fills in, over zeros, the distribution [vocab] that candidate `index` (from 0, behind the committed tokens at the last
     * start) of a slot was drawn from. Sampling rule `rejection` only. */
    enum status (*distribution)(struct drafter *, float *q, int slot, int index, struct error *);
    /* No more orders follow. */
    enum status (*stop)(struct drafter *, struct error *);
    void (*destroy)(struct drafter *);
};

/* The head of every drafter; makers put their own fields behind it. */
struct drafter {
    const struct drafter_ops *ops;
};

static inline enum status drafter_start(struct drafter *drafter, const struct draft_order *order,
                                        struct error *err) {
    return drafter->ops->start(drafter, order, err);
}
static inline enum status drafter_collect(struct drafter *drafter, struct draft_chain *chains,
                                          bool all, struct draft_report *report,
                                          struct error *err) {
    return drafter->ops->collect(drafter, chains, all, report, err);
}
static inline enum status drafter_distribution(struct drafter *drafter, float *q, int slot,
                                               int index, struct error *err) {
    return drafter->ops->distribution(drafter, q, slot, index, err);
}
static inline enum status drafter_stop(struct drafter *drafter, struct error *err) {
    return drafter->ops->stop(drafter, err);
}
static inline void drafter_destroy(struct drafter *drafter) {
    if (drafter != NULL) drafter->ops->destroy(drafter);
}
