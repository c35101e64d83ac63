#include "coordinator/placement.h"

#include <inttypes.h>

const char *placement_role_name(enum placement_role role) {
    static const char *const names[] = {"target"};
    return names[role];
}

enum status placement_check_degree(uint32_t target_ranks, struct error *err) {
    if (target_ranks == 1 || target_ranks == 2 || target_ranks == 4 || target_ranks == 8) {
        return STATUS_OK;
    }
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "target-ranks is %" PRIu32 "; expected a tensor-parallel degree: 1, 2, 4 or 8",
                     target_ranks);
}

enum status placement_plan(struct placement *out, uint32_t n_ranks, uint32_t target_ranks,
                           struct error *err) {
    *out = (struct placement){0};
    if (placement_check_degree(target_ranks, err) != STATUS_OK) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "target-ranks %" PRIu32 " is not a tensor-parallel degree", target_ranks);
    }
    if (n_ranks != target_ranks) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "the replica has %" PRIu32 " rank%s, the coordinator was started with "
                         "--target-ranks %" PRIu32 "; start mpirun with -n %" PRIu32
                         " or the coordinator with --target-ranks to match",
                         n_ranks, n_ranks == 1 ? "" : "s", target_ranks, target_ranks);
    }
    out->n_ranks = n_ranks;
    out->target_degree = target_ranks;
    for (uint32_t rank = 0; rank < n_ranks; rank++) {
        out->ranks[rank] = (struct placement_rank){PLACEMENT_TARGET, rank, target_ranks};
    }
    return STATUS_OK;
}
