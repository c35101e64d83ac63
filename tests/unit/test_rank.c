/* One rank's part of a plan: topology, what is refused before weights are read, and what two models on
 * one rank need together. */
#include "tests/unit/test.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "tests/reference/isas.h"
#include "worker/rank.h"

#define TARGET TANDEM_SOURCE_DIR "/assets/models/llama-tale-target"
#define DRAFT TANDEM_SOURCE_DIR "/assets/models/llama-tale-draft"
#define SHORT TANDEM_SOURCE_DIR "/tests/fixtures/checkpoints/llama-untied-hd64"

enum { GIB = 1 << 30 };

static struct rank_plan plan_of(bool shared, int target_degree, int draft_degree) {
    struct rank_plan plan = {
        .weights = DTYPE_BF16,
        .drafter = draft_degree > 0 ? RANK_MODEL_DRAFTER : RANK_NO_DRAFTER,
        .shared = shared,
        .target_degree = target_degree,
        .draft_degree = draft_degree,
        .max_sequences = 4,
        .max_step_tokens = 64,
        .max_window = 8,
        .max_layer_width = 2,
    };
    strcpy(plan.model_dir, TARGET);
    strcpy(plan.draft_dir, DRAFT);
    return plan;
}

static enum status open_rank(struct rank **out, const struct rank_plan *plan, int rank,
                             int64_t memory_bytes, struct error *err) {
    struct rank_options options = {.plan = plan,
                                   .rank = rank,
                                   .isa = BACKEND_PORTABLE,
                                   .n_threads = 1,
                                   .memory_bytes = memory_bytes};
    return rank_open(out, &options, err);
}

Test(rank, topology) {
    struct rank_plan disjoint = plan_of(false, 2, 4), shared = plan_of(true, 4, 2);
    struct rank_plan alone = plan_of(false, 2, 0);
    cr_assert(rank_plan_n_ranks(&disjoint) == 6 && rank_plan_n_ranks(&shared) == 4 &&
              rank_plan_n_ranks(&alone) == 2);
    cr_assert(rank_plan_draft_leader(&disjoint) == 2 && rank_plan_draft_leader(&shared) == -1);
    for (int rank = 0; rank < 6; rank++) {
        cr_assert_eq(rank_plan_target_shard(&disjoint, rank), rank < 2 ? rank : -1);
        cr_assert_eq(rank_plan_draft_shard(&disjoint, rank), rank < 2 ? -1 : rank - 2);
        cr_assert_eq(rank_plan_target_shard(&shared, rank), rank < 4 ? rank : -1);
        cr_assert_eq(rank_plan_draft_shard(&shared, rank), rank < 2 ? rank : -1);
        cr_assert_eq(rank_plan_draft_shard(&alone, rank), -1);
    }
}

/* All of a group say the same, whoever else stands on their devices. */
Test(rank, shared_devices) {
    struct rank_plan disjoint = plan_of(false, 2, 2), shared = plan_of(true, 4, 2);
    static const struct {
        int devices[4];
        bool target, draft; /* of the disjoint plan */
    } cases[] = {
        {{0, 1, 2, 3}, false, false}, {{0, 1, 0, 1}, false, false}, {{0, 1, 0, 0}, false, true},
        {{0, 0, 2, 0}, true, false},  {{0, 0, 0, 0}, true, true},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (int rank = 0; rank < 4; rank++) {
            bool expected = rank < 2 ? cases[i].target : cases[i].draft;
            cr_assert_eq(rank_plan_shares_device(&disjoint, rank, cases[i].devices), expected,
                         "case %zu, rank %d", i, rank);
            cr_assert_eq(rank_plan_shares_device(&shared, rank, cases[i].devices), i > 0,
                         "case %zu, rank %d", i, rank);
        }
    }
}

Test(rank, logit_rows) {
    struct rank_plan plan = plan_of(false, 1, 0);
    cr_assert_eq(rank_plan_logit_rows(&plan), 4);
    plan = plan_of(false, 1, 1);
    cr_assert_eq(rank_plan_logit_rows(&plan), 36, "a whole window for each of four");
    plan.max_sequences = 1000;
    plan.max_step_tokens = 4096;
    cr_assert_eq(rank_plan_logit_rows(&plan), 1256);
    plan.max_step_tokens = 512;
    cr_assert_eq(rank_plan_logit_rows(&plan), 1016, "no more than rows of a step");
}

/* What target and draft need on one rank is the sum of both, with KV for each block twice. */
Test(rank, shared_memory_is_one_budget) {
    struct rank_plan both = plan_of(true, 1, 1), target = plan_of(false, 1, 0);
    struct rank_plan apart = plan_of(false, 1, 1);
    struct rank *ranks[3];
    struct error err;
    cr_assert_eq(open_rank(&ranks[0], &both, 0, GIB, &err), STATUS_OK, "%s", err.text);
    cr_assert_eq(open_rank(&ranks[1], &target, 0, GIB, &err), STATUS_OK, "%s", err.text);
    cr_assert_eq(open_rank(&ranks[2], &apart, 1, GIB, &err), STATUS_OK, "%s", err.text);
    const struct capacity *sum = rank_capacity(ranks[0]), *one = rank_capacity(ranks[1]),
                          *draft = rank_capacity(ranks[2]);
    cr_assert_str_eq(rank_role(ranks[0]), "target 0/1, draft 0/1");
    cr_assert_str_eq(rank_role(ranks[2]), "draft 0/1");
    cr_assert_eq(sum->weights_bytes, one->weights_bytes + draft->weights_bytes);
    int64_t of_sum = sum->kv_bytes / sum->n_blocks, of_one = one->kv_bytes / one->n_blocks,
            of_draft = draft->kv_bytes / draft->n_blocks;
    cr_assert_eq(of_sum, of_one + of_draft);
    /* Enough for the target and one sequence, not for the draft besides. */
    enum { RESERVE_SHARE = 10, CONTEXT_BLOCKS = 64 };
    int64_t need = one->weights_bytes + one->scratch_bytes + CONTEXT_BLOCKS * of_one;
    int64_t memory = need + need / (RESERVE_SHARE - 1) + 4096;
    struct rank *rank;
    cr_assert_eq(open_rank(&rank, &target, 0, memory, &err), STATUS_OK, "%s", err.text);
    rank_close(rank);
    cr_assert_eq(open_rank(&rank, &both, 0, memory, &err), STATUS_RESOURCE_EXHAUSTED);
    cr_assert_not_null(strstr(err.text, "does not fit"), "%s", err.text);
    for (int i = 0; i < 3; i++) rank_close(ranks[i]);
}

Test(rank, refusals) {
    struct rank_plan plan = plan_of(false, 1, 1);
    struct rank *rank;
    struct error err;
    strcpy(plan.draft_dir, SHORT);
    cr_assert_eq(open_rank(&rank, &plan, 0, GIB, &err), STATUS_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(err.text, "context"), "%s", err.text);
    cr_assert_not_null(strstr(err.text, "1024"), "%s", err.text);
    plan = plan_of(false, 1, 1);
    plan.draft_fingerprint = 12345;
    cr_assert_eq(open_rank(&rank, &plan, 0, GIB, &err), STATUS_FAILED_PRECONDITION);
    cr_assert_not_null(strstr(err.text, "fingerprint"), "%s", err.text);
    plan = plan_of(false, 1, 1);
    strcpy(plan.draft_dir, "/nowhere");
    cr_assert_neq(open_rank(&rank, &plan, 1, GIB, &err), STATUS_OK);
    cr_assert_not_null(strstr(err.text, "/nowhere"), "%s", err.text);
}

/* --- a rank that cannot load --------------------------------------------------------------------- */

struct loader {
    const struct rank_plan *plan;
    struct comm *group;
    int rank, device;
    enum status status;
    struct error err;
    pthread_t thread;
};

static void *load_on_device(void *arg) {
    struct loader *l = arg;
    struct rank *rank = NULL;
    struct rank_options options = {.plan = l->plan,
                                   .rank = l->rank,
                                   .isa = BACKEND_EMULATED,
                                   .device = l->device,
                                   .shares_device = true,
                                   .one_process = true,
                                   .n_threads = 1,
                                   .memory_bytes = GIB};
    struct rank_loading loading = {.comms = {.target = l->group}, .n_blocks = 8};
    l->status = rank_open(&rank, &options, &l->err);
    if (l->status == STATUS_OK) l->status = rank_load(rank, &loading, &l->err);
    rank_close(rank);
    return NULL;
}

/* The others hear of it, in its words, instead of waiting for it in their group. */
Test(rank, one_that_cannot_load_ends_its_groups, .timeout = 20) {
    if (!computes_here(BACKEND_EMULATED)) {
        cr_skip_test("the emulated device is not built here (x86-64, no thread sanitizer)");
    }
    struct rank_plan plan = plan_of(false, 2, 0);
    struct comm *groups[2];
    struct loader loaders[2];
    struct error err;
    cr_assert_eq(comm_threads_create(groups, 2, &err), STATUS_OK);
    for (int i = 0; i < 2; i++) {
        loaders[i] = (struct loader){.plan = &plan, .group = groups[i], .rank = i, .device = 7 * i};
        cr_assert_eq(pthread_create(&loaders[i].thread, NULL, load_on_device, &loaders[i]), 0);
    }
    for (int i = 0; i < 2; i++) pthread_join(loaders[i].thread, NULL);
    cr_assert_eq(loaders[1].status, STATUS_INVALID_ARGUMENT, "%s", loaders[1].err.text);
    cr_assert_eq(loaders[0].status, STATUS_ABORTED, "%s", loaders[0].err.text);
    cr_assert(strstr(loaders[0].err.text, "CUDA device 7") != NULL, "%s", loaders[0].err.text);
    for (int i = 0; i < 2; i++) comm_destroy(groups[i]);
}
