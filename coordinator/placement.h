/* The plan: which rank of a replica plays which role with which shard. Pure.
 *
 * Today every rank is in the target group, whose tensor-parallel degree is the number of ranks. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/error.h"

enum { PLACEMENT_MAX_RANKS = 8 };

enum placement_role { PLACEMENT_TARGET };

struct placement_rank {
    enum placement_role role;
    uint32_t shard;   /* 0 .. degree - 1, within the rank's group */
    uint32_t degree;  /* of the rank's group */
};

struct placement {
    uint32_t n_ranks;
    uint32_t target_degree;
    struct placement_rank ranks[PLACEMENT_MAX_RANKS]; /* by rank */
};

const char *placement_role_name(enum placement_role role);

/* INVALID_ARGUMENT when target_ranks is not a tensor-parallel degree (1, 2, 4, 8). */
enum status placement_check_degree(uint32_t target_ranks, struct error *err);

/* FAILED_PRECONDITION, in words, when a replica of n_ranks does not fit what is asked for. */
enum status placement_plan(struct placement *out, uint32_t n_ranks, uint32_t target_ranks,
                           struct error *err);
