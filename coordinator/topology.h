/* What every replica shall be: from options and checkpoints to a placement, the policy to begin with
 * and the planner's table. Made once at start, immutable afterwards; any thread may read it.
 *
 * Ranks. What is given is kept. Without --ranks, the mode says whether the draft has ranks of its own
 * (auto, pearl, pearl+lp) or shares the target's (plain, sd, easyspec), and a group not given has one
 * rank. With --ranks, the planner chooses what is not given. */
#pragma once
#include <stdio.h>

#include "coordinator/planner.h"
#include "coordinator/policy.h"
#include "model/config.h"
#include "model/tokenizer.h"

struct coordinator_options;
struct coordinator_model;

struct topology {
    struct placement_wish wish;
    struct placement placement;
    char draft_dir[4096];          /* of drafter MODEL, absolute; else "" */
    struct model_config target, draft;
    uint64_t draft_fingerprint;
    uint32_t max_layer_width;      /* 1: the draft is laid out for tensor parallelism only */
    struct policy_options policy;  /* of every replica */
    struct planner_input input;
    struct planner_result result;
    const struct planner_candidate *placed;  /* in result; NULL: plain without a drafter */
    char why[512];                 /* the planner's reason */
};

/* Refuses, in one sentence with numbers: drafts of another vocabulary or a shorter context, ranks and
 * degrees that do not work, modes that they cannot run, what does not fit (where the memory is
 * declared), options that have no meaning without a drafter. */
enum status topology_make(struct topology *out, const struct coordinator_options *options,
                          const struct coordinator_model *model, struct error *err);

/* The comparison behind the first refusal: INVALID_ARGUMENT names the first id that differs. */
enum status topology_check_tokenizers(const struct tokenizer *target, const char *target_dir,
                                      const struct tokenizer *draft, const char *draft_dir,
                                      struct error *err);

/* The candidates as a table, why the first won, and what will be served. */
void topology_print(const struct topology *topology, FILE *out);
