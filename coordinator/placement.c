#include "coordinator/placement.h"

#include <inttypes.h>
#include <stdio.h>

const char *placement_role_name(enum placement_role role) {
    static const char *const names[] = {"target", "draft"};
    return names[role];
}

const char *placement_drafter_name(enum placement_drafter drafter) {
    static const char *const names[] = {"", "model", "ngram"};
    return names[drafter];
}

const char *placement_split_name(enum placement_split split) {
    static const char *const names[] = {"alone", "shared", "disjoint"};
    return names[split];
}

enum status placement_check_degree(const char *option, uint32_t ranks, struct error *err) {
    if (ranks == 1 || ranks == 2 || ranks == 4 || ranks == 8) return STATUS_OK;
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "%s is %" PRIu32 "; expected a tensor-parallel degree: 1, 2, 4 or 8", option,
                     ranks);
}

static enum status check_sum(const struct placement_wish *wish, struct error *err) {
    uint32_t target = wish->target_ranks, draft = wish->draft_ranks, n = wish->n_ranks;
    if (wish->drafter != PLACEMENT_MODEL) {
        if (n == target) return STATUS_OK;
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "--ranks is %" PRIu32 " with --target-ranks %" PRIu32
                         "; expected %" PRIu32 ": without a draft model every rank is the target's",
                         n, target, target);
    }
    if (n == target + draft) return STATUS_OK;
    if (n == target && draft <= target) return STATUS_OK;
    if (n == target) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "a draft on %" PRIu32 " ranks cannot share the target's %" PRIu32
                         "; expected --draft-ranks of at most %" PRIu32 ", or --ranks %" PRIu32
                         " for ranks of its own",
                         draft, target, target, target + draft);
    }
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "--ranks is %" PRIu32 " with --target-ranks %" PRIu32 " and --draft-ranks %"
                     PRIu32 "; expected %" PRIu32 " (shared) or %" PRIu32 " (disjoint)",
                     n, target, draft, target, target + draft);
}

static void add_group(struct placement *out, enum placement_role role, uint32_t first,
                      uint32_t degree) {
    for (uint32_t shard = 0; shard < degree; shard++) {
        out->parts[out->n_parts++] = (struct placement_part){first + shard, role, shard, degree};
    }
}

enum status placement_make(struct placement *out, const struct placement_wish *wish,
                           struct error *err) {
    *out = (struct placement){0};
    TRY(placement_check_degree("--target-ranks", wish->target_ranks, err));
    bool model = wish->drafter == PLACEMENT_MODEL;
    if (model) TRY(placement_check_degree("--draft-ranks", wish->draft_ranks, err));
    if (!model && wish->draft_ranks != 0) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "--draft-ranks is %" PRIu32 " without a draft model; expected --draft DIR",
                         wish->draft_ranks);
    }
    TRY(check_sum(wish, err));
    *out = (struct placement){
        .drafter = wish->drafter,
        .n_ranks = wish->n_ranks,
        .target_degree = wish->target_ranks,
        .draft_degree = model ? wish->draft_ranks : 0,
    };
    add_group(out, PLACEMENT_TARGET, 0, wish->target_ranks);
    if (!model) return STATUS_OK;
    out->split = wish->n_ranks == wish->target_ranks ? PLACEMENT_SHARED : PLACEMENT_DISJOINT;
    add_group(out, PLACEMENT_DRAFT, out->split == PLACEMENT_SHARED ? 0 : wish->target_ranks,
              wish->draft_ranks);
    return STATUS_OK;
}

enum status placement_plan(struct placement *out, uint32_t n_ranks,
                           const struct placement_wish *wish, struct error *err) {
    if (placement_make(out, wish, err) != STATUS_OK) {
        err->status = STATUS_FAILED_PRECONDITION;
        return err->status;
    }
    if (n_ranks == wish->n_ranks) return STATUS_OK;
    char draft[64] = "";
    if (wish->drafter == PLACEMENT_MODEL) {
        snprintf(draft, sizeof draft, " and --draft-ranks %" PRIu32 " (%s)", wish->draft_ranks,
                 placement_split_name(out->split));
    }
    *out = (struct placement){0};
    return error_set(err, STATUS_FAILED_PRECONDITION,
                     "the replica has %" PRIu32 " rank%s, the coordinator was started with "
                     "--target-ranks %" PRIu32 "%s; start mpirun with -n %" PRIu32
                     " or the coordinator with options to match",
                     n_ranks, n_ranks == 1 ? "" : "s", wish->target_ranks, draft, wish->n_ranks);
}

bool placement_supports(const struct placement *placement, enum spec_mode mode) {
    if (mode == SPEC_PLAIN) return true;
    if (mode == SPEC_SD) return placement->drafter != PLACEMENT_NO_DRAFTER;
    if (placement->drafter != PLACEMENT_MODEL) return false;
    return !spec_mode_overlapped(mode) || placement->split == PLACEMENT_DISJOINT;
}

enum status placement_check_mode(const struct placement *placement, enum spec_mode mode,
                                 struct error *err) {
    if (placement_supports(placement, mode)) return STATUS_OK;
    char can[64] = "";
    int n = 0;
    for (enum spec_mode other = SPEC_PLAIN; other < SPEC_N_MODES; other++) {
        if (!placement_supports(placement, other)) continue;
        n += snprintf(can + n, sizeof can - (size_t)n, "%s%s", n > 0 ? ", " : "",
                      spec_mode_name(other));
    }
    const char *why = placement->drafter == PLACEMENT_NO_DRAFTER ? "a drafter (--draft DIR or ngram)"
                      : placement->drafter == PLACEMENT_NGRAM
                          ? "a draft model, and the drafter is ngram"
                          : "a draft on ranks of its own, and it shares the target's";
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "mode %s needs %s; with %" PRIu32 " target and %" PRIu32
                     " draft ranks of %" PRIu32 " in all, expected %s%s",
                     spec_mode_name(mode), why, placement->target_degree, placement->draft_degree,
                     placement->n_ranks, n > (int)sizeof "plain" ? "one of " : "", can);
}

const struct placement_part *placement_find(const struct placement *placement, uint32_t rank,
                                            enum placement_role role) {
    for (uint32_t i = 0; i < placement->n_parts; i++) {
        const struct placement_part *part = &placement->parts[i];
        if (part->rank == rank && part->role == role) return part;
    }
    return NULL;
}

const char *placement_rank_roles(const struct placement *placement, uint32_t rank) {
    bool target = placement_find(placement, rank, PLACEMENT_TARGET) != NULL;
    bool draft = placement_find(placement, rank, PLACEMENT_DRAFT) != NULL;
    return target ? draft ? "target+draft" : "target" : draft ? "draft" : "none";
}
