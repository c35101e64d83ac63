#include "coordinator/planner.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/unit/test.h"
#include "worker/capacity.h"
#include "worker/rank.h"

static struct model_config llama(int hidden, int layers, int heads, int kv_heads, int intermediate,
                                 int vocab) {
    return (struct model_config){.family = MODEL_LLAMA, .hidden = hidden, .n_layers = layers,
                                 .n_heads = heads, .n_kv_heads = kv_heads, .head_dim = hidden / heads,
                                 .intermediate = intermediate, .vocab = vocab,
                                 .max_position = 8192, .rms_eps = 1e-5f};
}

struct pair {
    struct model_config target, draft;
    struct planner_input input;
    struct planner_result result;
};

/* A 1.2 G target with a draft of a tenth. */
static struct pair *pair_create(uint32_t n_ranks) {
    struct pair *p = calloc(1, sizeof *p);
    p->target = llama(2048, 16, 32, 8, 8192, 32000);
    p->draft = llama(1024, 8, 16, 8, 2816, 32000);
    p->input = (struct planner_input){
        .target = &p->target,
        .draft = &p->draft,
        .drafter = PLACEMENT_MODEL,
        .weights = DTYPE_BF16,
        .machine = planner_machine_default(),
        .limits = {.max_sequences = 16, .max_step_tokens = 256, .max_context = 2048,
                   .max_window = SPEC_MAX_WINDOW},
        .wish = {.mode = -1, .split = -1, .n_ranks = n_ranks},
    };
    return p;
}

static const struct planner_candidate *run(struct pair *p) {
    struct error err;
    enum status status = planner_run(&p->result, &p->input, &err);
    cr_assert_eq(status, STATUS_OK, "%s", err.text);
    return &p->result.candidates[0];
}

static int count(const struct pair *p, enum spec_mode mode) {
    int n = 0;
    for (uint32_t i = 0; i < p->result.n_candidates; i++) n += p->result.candidates[i].mode == mode;
    return n;
}

Test(planner, considers_every_placement_sorted_by_speed) {
    struct pair *p = pair_create(4);
    const struct planner_candidate *best = run(p);
    cr_assert_eq(count(p, SPEC_PLAIN), 3);      /* 1, 2, 4 */
    cr_assert_eq(count(p, SPEC_SD), 6 + 4);     /* shared D <= T <= 4; 1+1, 1+2, 2+1, 2+2 */
    cr_assert_eq(count(p, SPEC_PEARL), 4);
    cr_assert_eq(count(p, SPEC_EASYSPEC), 2 + 2 + 2); /* D 2: N 2; D 4: N 2, 4; disjoint D 2: N 2 */
    cr_assert_eq(count(p, SPEC_PEARL_LP), 2);
    for (uint32_t i = 1; i < p->result.n_candidates; i++) {
        const struct planner_candidate *a = &p->result.candidates[i - 1], *b = a + 1;
        cr_assert(a->choice.tokens_per_second >= b->choice.tokens_per_second);
        cr_assert(b->target_ranks + (b->split == PLACEMENT_DISJOINT ? b->draft_ranks : 0) <= 4);
    }
    cr_assert_neq(best->mode, SPEC_PLAIN);
    free(p);
}

Test(planner, plain_wins_when_nothing_is_accepted_and_keeps_the_draft_at_hand) {
    struct pair *p = pair_create(4);
    p->input.machine.acceptance = 0;
    const struct planner_candidate *best = run(p);
    cr_assert_eq(best->mode, SPEC_PLAIN);
    const struct planner_candidate *placed = planner_place(&p->result, -1);
    cr_assert_not_null(placed);
    cr_assert(placed->mode != SPEC_PLAIN && placed->split == PLACEMENT_SHARED);
    cr_assert_eq(placed->target_ranks, best->target_ranks);
    char words[400];
    planner_explain(&p->result, words, sizeof words);
    cr_assert(strstr(words, "plain 4 wins: 1.00 tokens a round") != NULL, "%s", words);
    free(p);
}

Test(planner, overlap_wins_when_the_target_stops_scaling) {
    struct pair *p = pair_create(2);
    p->input.machine.collective_us = 2000;   /* tensor parallelism is out */
    p->input.machine.acceptance = 0.9;
    const struct planner_candidate *best = run(p);
    cr_assert_eq(best->mode, SPEC_PEARL);
    cr_assert(best->target_ranks == 1 && best->draft_ranks == 1);
    cr_assert(best->split == PLACEMENT_DISJOINT && best->choice.window > 1);
    char name[64], words[400];
    planner_name(best, name, sizeof name);
    cr_assert_str_eq(name, "pearl 1+1");
    planner_explain(&p->result, words, sizeof words);
    cr_assert(strstr(words, "pearl 1+1 wins: ") && strstr(words, " x plain on 1 rank ") &&
              strstr(words, "The runner-up, "), "%s", words);
    free(p);
}

Test(planner, wishes_are_kept) {
    struct pair *p = pair_create(4);
    p->input.wish.mode = SPEC_PEARL_LP;
    p->input.wish.draft_ranks = 2;
    p->input.wish.layer_width = 4;
    p->input.wish.window = 3;
    run(p);
    const struct planner_candidate *placed = planner_place(&p->result, SPEC_PEARL_LP);
    cr_assert(placed->mode == SPEC_PEARL_LP && placed->draft_ranks == 2);
    cr_assert(placed->layer_width == 4 && placed->choice.window == 3);
    cr_assert(count(p, SPEC_SD) == 0 && count(p, SPEC_PLAIN) == 3);
    p->input.wish.split = PLACEMENT_SHARED;
    cr_assert_eq(planner_run(&p->result, &p->input, NULL), STATUS_INVALID_ARGUMENT);
    p->input.wish.split = -1;

    struct error err;
    p->input.wish.target_ranks = 4;
    cr_assert_eq(planner_run(&p->result, &p->input, &err), STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "there is no placement for mode pearl+lp with 4 target ranks with 2 "
                               "draft ranks on 4 ranks"), "%s", err.text);
    free(p);
}

Test(planner, look_up_drafting_takes_no_rank) {
    struct pair *p = pair_create(2);
    p->input.drafter = PLACEMENT_NGRAM;
    p->input.draft = NULL;
    const struct planner_candidate *best = run(p);
    char name[64];
    planner_name(best, name, sizeof name);
    cr_assert_str_eq(name, "sd 2+ngram");
    cr_assert(count(p, SPEC_PEARL) == 0 && count(p, SPEC_SD) == 2);
    free(p);
}

/* What the worker says of the same rank, in the same memory. */
static bool worker_fits(const struct pair *p, const struct planner_candidate *c, uint32_t rank,
                        int64_t memory) {
    const struct planner_limits *limits = &p->input.limits;
    struct rank_plan plan = {
        .drafter = c->mode == SPEC_PLAIN ? RANK_NO_DRAFTER : RANK_MODEL_DRAFTER,
        .max_sequences = (int)limits->max_sequences,
        .max_step_tokens = (int)limits->max_step_tokens,
        .max_window = (int)limits->max_window,
        .target_degree = (int)c->target_ranks,
        .draft_degree = (int)c->draft_ranks,
        .shared = c->split == PLACEMENT_SHARED,
    };
    struct error err;
    struct shard target, draft;
    struct capacity capacity;
    int t = rank_plan_target_shard(&plan, (int)rank), d = rank_plan_draft_shard(&plan, (int)rank);
    struct capacity_request request = {
        .config = t >= 0 ? &p->target : &p->draft,
        .shard = t >= 0 ? &target : &draft,
        .weights = DTYPE_BF16,
        .max_sequences = plan.max_sequences,
        .max_step_tokens = plan.max_step_tokens,
        .max_context = (int)limits->max_context,
        .max_logit_rows = t >= 0 ? rank_plan_logit_rows(&plan) : plan.max_sequences,
        .memory_bytes = memory,
    };
    if (t >= 0) CHECK(shard_make(&target, &p->target, t, plan.target_degree, &err) == STATUS_OK);
    if (d >= 0) CHECK(shard_make(&draft, &p->draft, d, plan.draft_degree, &err) == STATUS_OK);
    if (t >= 0 && d >= 0) {
        int rows = capacity_rows(plan.max_step_tokens, plan.max_sequences);
        request.beside = footprint_of(&p->draft, &draft, DTYPE_BF16, rows, plan.max_sequences);
    }
    return capacity_compute(&capacity, &request, &err) == STATUS_OK;
}

Test(planner, fits_where_the_workers_say_so) {
    enum { MIB = 1 << 20 };
    struct pair *p = pair_create(8);
    int fitting = 0, refused = 0;
    for (int64_t memory = (int64_t)300 * MIB; memory < (int64_t)4000 * MIB; memory += 150 * MIB) {
        struct error err;
        p->input.machine.memory_bytes = (uint64_t)memory;
        planner_run(&p->result, &p->input, &err);
        for (uint32_t i = 0; i < p->result.n_candidates; i++) {
            const struct planner_candidate *c = &p->result.candidates[i];
            uint32_t n = c->target_ranks + (c->split == PLACEMENT_DISJOINT ? c->draft_ranks : 0);
            bool all = true;
            for (uint32_t rank = 0; rank < n; rank++) all &= worker_fits(p, c, rank, memory);
            char name[64];
            planner_name(c, name, sizeof name);
            /* plain is served without the draft's logit rows: the planner counts them, on the safe
             * side. */
            bool agrees = c->mode == SPEC_PLAIN ? all || !c->fits : all == c->fits;
            cr_assert(agrees, "%s in %d MiB: the planner says %d, the worker %d (%s)", name,
                      (int)(memory / MIB), c->fits, all, c->reason);
            cr_assert_eq(c->fits, c->reason[0] == '\0');
            fitting += c->fits;
            refused += !c->fits;
        }
    }
    cr_assert(fitting > 100 && refused > 100, "%d, %d", fitting, refused);
    free(p);
}

Test(planner, nothing_fits_says_what_the_smallest_needs) {
    struct pair *p = pair_create(2);
    struct error err;
    p->input.machine.memory_bytes = 100 << 20;
    cr_assert_eq(planner_run(&p->result, &p->input, &err), STATUS_RESOURCE_EXHAUSTED);
    cr_assert(strstr(err.text, "placements fits; the smallest, ") != NULL, "%s", err.text);
    cr_assert(strstr(err.text, " has 100.0 MiB, of which 10.0 stay free, and needs ") != NULL, "%s",
              err.text);
    cr_assert_null(planner_place(&p->result, -1));
    free(p);
}

Test(planner, measured_links_replace_declared_ones) {
    struct planner_machine machine = {.collective_us = 5, .handoff_us = 10, .layer_us = 7};
    planner_use_links(&machine, &(struct planner_links){0}, 1000);
    cr_assert(machine.collective_us == 5 && machine.handoff_us == 10);
    planner_use_links(&machine, &(struct planner_links){.handoff_us = 3}, 1000);
    cr_assert(machine.collective_us == 5 && machine.handoff_us == 3);
    struct planner_links links = {.latency_us = 2, .gigabytes_per_second = 0.5};
    planner_use_links(&machine, &links, 1000);
    cr_assert(machine.collective_us == 10, "%g us", machine.collective_us); /* 4000 bytes: 8 us */
    cr_assert(machine.handoff_us == 3 && machine.layer_us == 7);
}

/* research/easyspec-pearl.md 1.9, the line of the 8 B drafter, in milliseconds. */
Test(planner, step_times_are_those_of_the_published_model) {
    struct pair *p = pair_create(16);
    p->draft = llama(4096, 32, 32, 8, 14336, 128256);
    p->target = p->draft;
    p->input.machine = (struct planner_machine){.bandwidth_gbs = 3840, .compute_gflops = 4e5,
                                                .collective_us = 10, .layer_us = 13};
    static const struct {
        uint32_t ranks, width;
        double draft_ms, fuzzy_ms;
    } rows[] = {{1, 1, 4.32, 4.32}, {2, 1, 3.02, 3.02}, {4, 1, 2.04, 2.04}, {8, 1, 1.55, 1.55},
                {2, 2, 0, 2.77}, {4, 4, 2.57, 1.67}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct planner_candidate c = {.mode = SPEC_PEARL_LP, .split = PLACEMENT_DISJOINT,
                                      .target_ranks = 8, .draft_ranks = rows[i].ranks,
                                      .layer_width = rows[i].width};
        struct speed_model model = planner_speed_model(&p->input, &c);
        double draft = model.draft_us / 1e3, fuzzy = model.fuzzy_us / 1e3;
        cr_assert(rows[i].draft_ms == 0 || fabs(draft / rows[i].draft_ms - 1) < 0.12,
                  "%u ranks, N %u: %.3f ms", rows[i].ranks, rows[i].width, draft);
        cr_assert(fabs(fuzzy / rows[i].fuzzy_ms - 1) < 0.12, "%u ranks, N %u: %.3f ms",
                  rows[i].ranks, rows[i].width, fuzzy);
    }
    free(p);
}
