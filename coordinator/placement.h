/* The plan: which rank of a replica plays which roles with which shards. Pure.
 *
 * Target ranks are 0 .. T-1. A draft model stands on ranks of its own, T .. T+D-1 (disjoint: both can
 * compute at the same time), or on the first D of the target's (shared, D <= T). A drafter without a
 * model (n-gram look-up) lives with the target's leader and needs no rank. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/error.h"
#include "common/spec_mode.h"

enum { PLACEMENT_MAX_RANKS = 16, PLACEMENT_MAX_DEGREE = 8 };

enum placement_role { PLACEMENT_TARGET, PLACEMENT_DRAFT };
enum placement_drafter { PLACEMENT_NO_DRAFTER, PLACEMENT_MODEL, PLACEMENT_NGRAM };
enum placement_split { PLACEMENT_ALONE, PLACEMENT_SHARED, PLACEMENT_DISJOINT };

/* What is asked of every replica. */
struct placement_wish {
    enum placement_drafter drafter;
    uint32_t target_ranks, draft_ranks;  /* 1, 2, 4, 8; draft_ranks only of a draft model */
    uint32_t n_ranks;                    /* the target's (shared, alone) or the sum (disjoint) */
};

/* One role of one rank. */
struct placement_part {
    uint32_t rank;
    enum placement_role role;
    uint32_t shard;   /* 0 .. degree - 1, within the role's group */
    uint32_t degree;  /* of that group */
};

struct placement {
    enum placement_drafter drafter;
    enum placement_split split;          /* ALONE: no draft model */
    uint32_t n_ranks, target_degree;
    uint32_t draft_degree;               /* 0: no draft model */
    uint32_t n_parts;
    struct placement_part parts[2 * PLACEMENT_MAX_RANKS]; /* the target's by rank, then the draft's */
};

const char *placement_role_name(enum placement_role role);
const char *placement_drafter_name(enum placement_drafter drafter); /* "", "model", "ngram" */
const char *placement_split_name(enum placement_split split);

/* INVALID_ARGUMENT when `ranks` is not a tensor-parallel degree (1, 2, 4, 8); option names it. */
enum status placement_check_degree(const char *option, uint32_t ranks, struct error *err);

/* INVALID_ARGUMENT, in one sentence with the numbers, when the wish cannot be placed at all. */
enum status placement_make(struct placement *out, const struct placement_wish *wish,
                           struct error *err);

/* The same for a replica that came with n_ranks: FAILED_PRECONDITION when it is not what is wished. */
enum status placement_plan(struct placement *out, uint32_t n_ranks,
                           const struct placement_wish *wish, struct error *err);

/* Whether the ranks can run the mode: overlapped ones need a draft with ranks of its own,
 * layer-parallel ones a draft model, sd any drafter. */
bool placement_supports(const struct placement *placement, enum spec_mode mode);

/* INVALID_ARGUMENT saying why the mode cannot run here and which can. */
enum status placement_check_mode(const struct placement *placement, enum spec_mode mode,
                                 struct error *err);

/* The part of a rank in a role; NULL: it has none. */
const struct placement_part *placement_find(const struct placement *placement, uint32_t rank,
                                            enum placement_role role);

/* "target", "draft" or "target+draft". */
const char *placement_rank_roles(const struct placement *placement, uint32_t rank);
