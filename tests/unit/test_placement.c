#include "coordinator/placement.h"

#include <string.h>

#include "tests/unit/test.h"

static const uint32_t degrees[] = {1, 2, 4, 8};
enum { N_DEGREES = sizeof degrees / sizeof *degrees };

static enum status make(struct placement *out, enum placement_drafter drafter, uint32_t target,
                        uint32_t draft, uint32_t n_ranks, struct error *err) {
    return placement_make(out, &(struct placement_wish){drafter, target, draft, n_ranks}, err);
}

/* Which modes run, as bits. */
static unsigned modes(const struct placement *placement) {
    unsigned bits = 0;
    for (enum spec_mode mode = SPEC_PLAIN; mode < SPEC_N_MODES; mode++) {
        bits |= (unsigned)placement_supports(placement, mode) << mode;
    }
    return bits;
}

Test(placement, a_target_alone_has_every_rank) {
    struct placement p;
    struct error err;
    for (uint32_t n = 0; n <= 9; n++) {
        bool fits = n == 1 || n == 2 || n == 4 || n == 8;
        enum status status = make(&p, PLACEMENT_NO_DRAFTER, n, 0, n, &err);
        cr_assert_eq(status, fits ? STATUS_OK : STATUS_INVALID_ARGUMENT);
        if (!fits) continue;
        cr_assert(p.split == PLACEMENT_ALONE && p.n_parts == n && p.draft_degree == 0);
        for (uint32_t rank = 0; rank < n; rank++) {
            const struct placement_part *part = placement_find(&p, rank, PLACEMENT_TARGET);
            cr_assert(part != NULL && part->shard == rank && part->degree == n);
            cr_assert_null(placement_find(&p, rank, PLACEMENT_DRAFT));
            cr_assert_str_eq(placement_rank_roles(&p, rank), "target");
        }
        cr_assert_eq(modes(&p), 1u << SPEC_PLAIN);
    }
}

Test(placement, disjoint_for_every_pair_of_degrees) {
    struct placement p;
    struct error err;
    for (int t = 0; t < N_DEGREES; t++) {
        for (int d = 0; d < N_DEGREES; d++) {
            uint32_t target = degrees[t], draft = degrees[d];
            cr_assert_eq(make(&p, PLACEMENT_MODEL, target, draft, target + draft, &err), STATUS_OK);
            cr_assert(p.split == PLACEMENT_DISJOINT && p.n_ranks == target + draft);
            cr_assert_eq(p.n_parts, target + draft);
            for (uint32_t rank = 0; rank < p.n_ranks; rank++) {
                bool is_target = rank < target;
                const struct placement_part *part =
                    placement_find(&p, rank, is_target ? PLACEMENT_TARGET : PLACEMENT_DRAFT);
                cr_assert_not_null(part);
                cr_assert_eq(part->shard, is_target ? rank : rank - target);
                cr_assert_eq(part->degree, is_target ? target : draft);
                cr_assert_str_eq(placement_rank_roles(&p, rank), is_target ? "target" : "draft");
            }
            cr_assert_eq(modes(&p), (1u << SPEC_N_MODES) - 1);
        }
    }
}

Test(placement, shared_where_the_draft_is_no_wider_than_the_target) {
    struct placement p;
    struct error err;
    for (int t = 0; t < N_DEGREES; t++) {
        for (int d = 0; d < N_DEGREES; d++) {
            uint32_t target = degrees[t], draft = degrees[d];
            enum status status = make(&p, PLACEMENT_MODEL, target, draft, target, &err);
            cr_assert_eq(status, draft <= target ? STATUS_OK : STATUS_INVALID_ARGUMENT);
            if (status != STATUS_OK) {
                cr_assert(strstr(err.text, "cannot share"), "%s", err.text);
                continue;
            }
            cr_assert(p.split == PLACEMENT_SHARED && p.n_parts == target + draft);
            for (uint32_t rank = 0; rank < target; rank++) {
                const struct placement_part *part = placement_find(&p, rank, PLACEMENT_DRAFT);
                cr_assert_eq(part != NULL, rank < draft);
                if (part != NULL) cr_assert(part->shard == rank && part->degree == draft);
                cr_assert_str_eq(placement_rank_roles(&p, rank),
                                 rank < draft ? "target+draft" : "target");
            }
            cr_assert_eq(modes(&p), 1u << SPEC_PLAIN | 1u << SPEC_SD | 1u << SPEC_EASYSPEC);
        }
    }
}

Test(placement, look_up_drafting_needs_no_rank) {
    struct placement p;
    struct error err;
    cr_assert_eq(make(&p, PLACEMENT_NGRAM, 2, 0, 2, &err), STATUS_OK);
    cr_assert(p.split == PLACEMENT_ALONE && p.n_parts == 2);
    cr_assert_eq(modes(&p), 1u << SPEC_PLAIN | 1u << SPEC_SD);
    cr_assert_eq(placement_check_mode(&p, SPEC_PEARL, &err), STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "mode pearl needs a draft model, and the drafter is ngram"), "%s",
              err.text);
    cr_assert(strstr(err.text, "expected one of plain, sd"), "%s", err.text);
    cr_assert_eq(make(&p, PLACEMENT_NGRAM, 2, 1, 3, &err), STATUS_INVALID_ARGUMENT);
}

Test(placement, refuses_in_one_sentence_with_the_numbers) {
    struct placement p;
    struct error err;
    make(&p, PLACEMENT_MODEL, 3, 1, 4, &err);
    cr_assert_str_eq(err.text,
                     "--target-ranks is 3; expected a tensor-parallel degree: 1, 2, 4 or 8");
    make(&p, PLACEMENT_MODEL, 2, 3, 5, &err);
    cr_assert_str_eq(err.text,
                     "--draft-ranks is 3; expected a tensor-parallel degree: 1, 2, 4 or 8");
    make(&p, PLACEMENT_MODEL, 4, 2, 5, &err);
    cr_assert_str_eq(err.text, "--ranks is 5 with --target-ranks 4 and --draft-ranks 2; expected 4 "
                               "(shared) or 6 (disjoint)");
    make(&p, PLACEMENT_NO_DRAFTER, 2, 0, 3, &err);
    cr_assert_str_eq(err.text, "--ranks is 3 with --target-ranks 2; expected 2: without a draft model "
                               "every rank is the target's");
    cr_assert_eq(make(&p, PLACEMENT_MODEL, 2, 1, 2, &err), STATUS_OK);
    cr_assert_eq(placement_check_mode(&p, SPEC_SD, &err), STATUS_OK);
    placement_check_mode(&p, SPEC_PEARL_LP, &err);
    cr_assert_str_eq(err.text,
                     "mode pearl+lp needs a draft on ranks of its own, and it shares the target's; "
                     "with 2 target and 1 draft ranks of 2 in all, expected one of plain, sd, "
                     "easyspec");
    make(&p, PLACEMENT_NO_DRAFTER, 1, 0, 1, &err);
    placement_check_mode(&p, SPEC_SD, &err);
    cr_assert(strstr(err.text, "needs a drafter (--draft DIR or ngram)"), "%s", err.text);
    cr_assert(strstr(err.text, "in all, expected plain"), "%s", err.text);
}

Test(placement, a_replica_must_come_with_the_ranks_that_are_wished) {
    struct placement p;
    struct error err;
    struct placement_wish wish = {PLACEMENT_MODEL, 2, 1, 3};
    cr_assert_eq(placement_plan(&p, 3, &wish, &err), STATUS_OK);
    cr_assert_eq(p.split, PLACEMENT_DISJOINT);
    cr_assert_eq(placement_plan(&p, 2, &wish, &err), STATUS_FAILED_PRECONDITION);
    cr_assert(strstr(err.text, "--target-ranks 2 and --draft-ranks 1 (disjoint); start mpirun with "
                               "-n 3"), "%s", err.text);
    wish = (struct placement_wish){PLACEMENT_NO_DRAFTER, 3, 0, 3};
    cr_assert_eq(placement_plan(&p, 3, &wish, &err), STATUS_FAILED_PRECONDITION);
}
