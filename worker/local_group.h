/* A whole replica inside one process: ranks are threads (comm_threads), the caller is rank 0. What
 * tests, benches and the virtual cluster run the real engine in. */
#pragma once
#include "worker/rank.h"

struct local_group;

struct local_group_options {
    const char *model_dir;
    int degree;    /* of the target: 1, 2, 4, 8 */
    enum backend_isa isa;
    int n_threads; /* compute threads of each rank */
    enum dtype weights;
    int n_blocks;
    int max_rows;
    int max_logit_rows; /* 0: what the plan's windows want */
    int max_sequences;
    int max_context; /* 0: the model's */
    bool pin_ranks;  /* rank i stays on processor i (modulo their number): for measuring */
    /* Drafting; all zero: none. */
    const char *draft_dir; /* a draft model */
    bool ngram;            /* or prompt look-up */
    bool shared;           /* the draft model on the target's ranks */
    int draft_degree;      /* 0: 1 */
    int max_window;        /* 0: SPEC_MAX_WINDOW */
    int max_layer_width;   /* 0: 1 */
    bool prefix_cache;     /* of the draft */
    enum sampling_rule rule;
    bool keeps_fuzzy;      /* no calibration, for measuring */
    model_drafter_replace_fn replace; /* see model_drafter.h; for measuring */
    void *replace_user;
    const char *trace_file; /* NULL: none; written by local_group_destroy */
};

/* On failure (of any rank, in its words) nothing is left. */
enum status local_group_create(struct local_group **out, const struct local_group_options *options,
                               struct error *err);
void local_group_destroy(struct local_group *group);

/* Rank 0's, borrowed. */
struct engine *local_group_engine(struct local_group *group);
struct backend *local_group_backend(struct local_group *group);
struct transformer *local_group_transformer(struct local_group *group);
struct transformer *local_group_draft(struct local_group *group); /* NULL: not on rank 0 */
const struct model_config *local_group_config(const struct local_group *group);
/* Everything a step loop needs of the group; drafter NULL without one. */
const struct rank_leadership *local_group_leadership(const struct local_group *group);
struct trace *local_group_trace(struct local_group *group);
