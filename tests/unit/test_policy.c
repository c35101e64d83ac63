/* The policy against a simulated replica: its rounds are the engine's (worker/spec/round.h), its step
 * times those of a speed model, with noise and a cost of its own for every mode. */
#include "coordinator/policy.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/unit/test.h"
#include "worker/spec/policy.h"
#include "worker/spec/round.h"

enum { SEED = 77, MAX_SEQUENCES = 64 };
static const double SECOND_US = 1e6;
static const unsigned EVERY_MODE = (1u << SPEC_N_MODES) - 1;

struct replica_model {
    struct speed_model truth;
    double overhead[SPEC_N_MODES];  /* a round takes so many times what the model says */
    double noise;                   /* of a step's time */
    int n_sequences;
    uint64_t random;

    struct policy_setting in_force;
    int tails[MAX_SEQUENCES];
    double now_us, tokens, changed;
    double in_mode_us[SPEC_N_MODES];

    Tandem__V1__SpecStats spec;
    Tandem__V1__Policy said;
    float target_us[POLICY_BUCKETS], verify_us[POLICY_BUCKETS], verify_rows[POLICY_BUCKETS];
    float draft_us[POLICY_BUCKETS], fuzzy_us[POLICY_BUCKETS], calibrate_us[POLICY_BUCKETS];
};

static double draw(struct replica_model *r) {
    r->random += UINT64_C(0x9e3779b97f4a7c15);
    uint64_t z = r->random;
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (double)((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
}

static void average(float *mean, double value, double weight) {
    *mean = *mean == 0 ? (float)value : *mean + (float)(weight * (value - (double)*mean));
}

static struct replica_model *replica_create(double acceptance, double target_us, double draft_us) {
    struct replica_model *r = calloc(1, sizeof *r);
    r->truth = (struct speed_model){.accept_exact = acceptance, .accept_fuzzy = acceptance * 0.95,
                                    .draft_us = draft_us, .fuzzy_us = draft_us * 0.8,
                                    .calibrate_us = draft_us * 1.3, .handoff_us = 20};
    for (int i = 1; i < SPEC_MAX_WINDOW + 2; i++) {
        r->truth.target_us[i] = target_us * (1 + 0.03 * (i - 1));
    }
    for (int mode = 0; mode < SPEC_N_MODES; mode++) r->overhead[mode] = 1;
    r->noise = 0.1;
    r->n_sequences = 1;
    r->random = SEED;
    r->in_force = (struct policy_setting){SPEC_PLAIN, 1, 1, 0};
    tandem__v1__spec_stats__init(&r->spec);
    tandem__v1__policy__init(&r->said);
    r->spec.policy = &r->said;
    r->spec.n_target_us = r->spec.n_verify_us = r->spec.n_verify_rows = POLICY_BUCKETS;
    r->spec.n_draft_us = r->spec.n_fuzzy_us = r->spec.n_calibrate_us = POLICY_BUCKETS;
    r->spec.target_us = r->target_us;
    r->spec.verify_us = r->verify_us;
    r->spec.verify_rows = r->verify_rows;
    r->spec.draft_us = r->draft_us;
    r->spec.fuzzy_us = r->fuzzy_us;
    r->spec.calibrate_us = r->calibrate_us;
    r->spec.handoff_us = 10;
    return r;
}

static void judge(struct replica_model *r, bool first, bool held) {
    bool fuzzy = spec_mode_layer_parallel(r->in_force.mode) && !first;
    average(fuzzy ? &r->spec.acceptance_fuzzy : &r->spec.acceptance, held ? 1 : 1e-6, 1.0 / 64);
}

/* One sequence's round: tokens it commits; *out: what was planned. */
static int round_of(struct replica_model *r, int *tail, bool any_tails, struct round_plan *out) {
    const struct policy_setting *s = &r->in_force;
    bool fuzzy = spec_mode_layer_parallel(s->mode);
    struct spec_policy policy = {s->mode, s->window, s->layer_width, s->delay};
    struct spec_wish wish = {-1, 0};
    struct round_plan plan =
        spec_policy_round(&policy, &wish, *tail, any_tails, SPEC_MAX_WINDOW, 1 << 20);
    int judged = round_judged(plan), held = 0;
    for (; held < judged; held++) {
        bool first = held == plan.tail;
        double a = fuzzy && !first ? r->truth.accept_fuzzy : r->truth.accept_exact;
        bool holds = draw(r) < a;
        judge(r, first, holds);
        if (!holds) break;
    }
    if (judged > 0) r->spec.drafts++;
    struct round_outcome outcome = round_settle(plan, held);
    *tail = outcome.tail;
    *out = plan;
    return outcome.committed;
}

/* The target waits for the first `wait` of `make` draft steps. */
static double round_us(struct replica_model *r, double rows, int make, int wait) {
    const struct speed_model *t = &r->truth;
    const struct policy_setting *s = &r->in_force;
    int whole = (int)rows;
    double part = rows - whole;
    double verify = t->target_us[whole] * (1 - part) + (part > 0 ? t->target_us[whole + 1] * part : 0);
    bool fuzzy = spec_mode_layer_parallel(s->mode);
    double first = fuzzy ? t->calibrate_us : t->draft_us, next = fuzzy ? t->fuzzy_us : t->draft_us;
    double draft = make == 0 ? 0 : first + (make - 1) * next + t->handoff_us;
    double before = wait == 0 ? 0 : first + (wait - 1) * next;
    double us = before + fmax(draft - before, verify);
    return us * r->overhead[s->mode] * (1 + r->noise * (draw(r) - 0.5));
}

static void report_times(struct replica_model *r, double rows) {
    int b = 0;
    while (1 << b < r->n_sequences) b++;
    const struct speed_model *t = &r->truth;
    double noise = 1 + r->noise * (draw(r) - 0.5);
    if (rows < 1.01) {
        average(&r->target_us[b], t->target_us[1] * noise, 0.125);
    } else {
        int whole = (int)rows;
        average(&r->verify_us[b], t->target_us[whole] * noise, 0.125);
        average(&r->verify_rows[b], whole, 0.125);
    }
    if (r->in_force.mode == SPEC_PLAIN) return;
    bool fuzzy = spec_mode_layer_parallel(r->in_force.mode);
    if (!fuzzy) average(&r->draft_us[b], t->draft_us * noise, 0.125);
    if (fuzzy) average(&r->fuzzy_us[b], t->fuzzy_us * noise, 0.125);
    if (fuzzy) average(&r->calibrate_us[b], t->calibrate_us * noise, 0.125);
}

/* One round of the whole batch, told to the policy; its answer is in force from the next but one on. */
static void step(struct replica_model *r, struct policy *policy) {
    int tokens = 0;
    double all_rows = 0;
    int make = 0, wait = 0;
    bool any_tails = false;
    for (int i = 0; i < r->n_sequences; i++) any_tails |= r->tails[i] > 0;
    for (int i = 0; i < r->n_sequences; i++) {
        struct round_plan plan;
        tokens += round_of(r, &r->tails[i], any_tails, &plan);
        all_rows += round_rows(plan);
        if (plan.make > make) make = plan.make;
        if (plan.wait > wait) wait = plan.wait;
    }
    double rows = all_rows / r->n_sequences, us = round_us(r, rows, make, wait);
    report_times(r, rows);
    r->now_us += us;
    r->tokens += tokens;
    r->in_mode_us[r->in_force.mode] += us;
    r->said.mode = (char *)spec_mode_name(r->in_force.mode);
    r->said.window = (uint32_t)r->in_force.window;
    r->said.delay = (uint32_t)r->in_force.delay;
    r->said.layer_width = (uint32_t)r->in_force.layer_width;
    struct policy_setting told = policy->current;
    r->changed += policy_observe(policy, &(struct policy_step){
                                             .spec = &r->spec, .step_us = (uint32_t)us,
                                             .n_sequences = (uint32_t)r->n_sequences,
                                             .n_tokens = (uint32_t)tokens});
    r->in_force = told;
}

static void run(struct replica_model *r, struct policy *policy, double seconds) {
    r->tokens = r->changed = 0;
    memset(r->in_mode_us, 0, sizeof r->in_mode_us);
    for (double until = r->now_us + seconds * SECOND_US; r->now_us < until;) step(r, policy);
}

/* The coordinator's guess before anything is measured: three times too fast, and a = 0.75. */
static struct speed_model prior_of(const struct speed_model *truth) {
    struct speed_model prior = *truth;
    for (int i = 1; i < SPEC_MAX_WINDOW + 2; i++) prior.target_us[i] /= 3;
    prior.draft_us /= 3;
    prior.fuzzy_us /= 3;
    prior.calibrate_us /= 3;
    prior.accept_exact = 0.75;
    prior.accept_fuzzy = 0.73;
    return prior;
}

static struct policy policy_for(const struct replica_model *r, unsigned modes, int mode) {
    struct policy policy;
    policy_init(&policy, &(struct policy_options){.wish = {.mode = mode, .delay = -1,
                                                           .layer_width = 2},
                                                  .modes = modes,
                                                  .max_window = SPEC_MAX_WINDOW,
                                                  .prior = prior_of(&r->truth)});
    return policy;
}

/* Tokens per second of the replica when it stays in a mode's best setting. */
static double alone(const struct replica_model *like, enum spec_mode mode) {
    double speed = speed_model_best(&like->truth, mode, 1, SPEC_MAX_WINDOW).tokens_per_second;
    return speed / like->overhead[mode] * like->n_sequences;
}

static enum spec_mode fastest(const struct replica_model *r) {
    enum spec_mode best = SPEC_PLAIN;
    for (enum spec_mode mode = SPEC_SD; mode < SPEC_N_MODES; mode++) {
        if (alone(r, mode) > alone(r, best)) best = mode;
    }
    return best;
}

Test(policy, a_good_draft_ends_in_the_best_mode) {
    static const struct {
        double acceptance, target_us, draft_us, pearl_overhead;
    } cases[] = {{.85, 4000, 600, 1}, {.8, 900, 150, 1}, {.9, 20000, 5000, 1}, {.85, 4000, 300, 1.6}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct replica_model *r =
            replica_create(cases[i].acceptance, cases[i].target_us, cases[i].draft_us);
        r->overhead[SPEC_PEARL] = r->overhead[SPEC_PEARL_LP] = cases[i].pearl_overhead;
        struct policy policy = policy_for(r, EVERY_MODE, -1);
        run(r, &policy, 3);
        run(r, &policy, 20);
        double best = alone(r, fastest(r));
        cr_assert(r->tokens / 20 > 0.93 * best, "case %zu, seed %d: %.1f tokens/s, %s alone makes %.1f",
                  i, SEED, r->tokens / 20, spec_mode_name(fastest(r)), best);
        cr_assert_neq(policy.settled.mode, SPEC_PLAIN);
        cr_assert(r->changed <= 14, "case %zu, seed %d: %.0f changes in 20 s", i, SEED, r->changed);
        free(r);
    }
}

Test(policy, a_useless_draft_settles_in_plain_within_two_seconds) {
    static const double target_us[] = {400, 4000, 40000};
    for (size_t i = 0; i < sizeof target_us / sizeof *target_us; i++) {
        for (int n = 1; n <= 8; n *= 8) {
            struct replica_model *r = replica_create(0.01, target_us[i], target_us[i] / 6);
            r->n_sequences = n;
            struct policy policy = policy_for(r, EVERY_MODE, -1);
            run(r, &policy, 2);
            cr_assert_eq(policy.phase, POLICY_SETTLED);
            cr_assert_eq(policy.settled.mode, SPEC_PLAIN, "seed %d: %s after 2 s", SEED,
                         spec_mode_name(policy.settled.mode));
            double tokens = r->tokens;
            run(r, &policy, 18);
            tokens += r->tokens;
            double share = tokens / 20 / alone(r, SPEC_PLAIN);
            cr_assert(share > 0.95, "seed %d, %.0f us, %d sequences: %.3f of plain", SEED,
                      target_us[i], n, share);
            double settled = r->tokens / 18 / alone(r, SPEC_PLAIN);
            cr_assert(settled > 0.98, "seed %d: probes cost %.3f", SEED, 1 - settled);
            free(r);
        }
    }
}

Test(policy, follows_the_acceptance) {
    struct replica_model *r = replica_create(0.85, 4000, 600);
    struct policy policy = policy_for(r, EVERY_MODE, -1);
    run(r, &policy, 5);
    cr_assert_neq(policy.settled.mode, SPEC_PLAIN);
    r->truth.accept_exact = r->truth.accept_fuzzy = 0.01;
    run(r, &policy, 3);
    cr_assert_eq(policy.settled.mode, SPEC_PLAIN, "%s after 3 s without acceptance",
                 spec_mode_name(policy.settled.mode));
    run(r, &policy, 10);
    r->truth.accept_exact = 0.9;
    r->truth.accept_fuzzy = 0.85;
    run(r, &policy, 30);
    cr_assert_neq(policy.settled.mode, SPEC_PLAIN, "plain 30 s after the acceptance came back");
    run(r, &policy, 10);
    double share = r->tokens / 10 / alone(r, fastest(r));
    cr_assert(share > 0.93, "%.3f of the best", share);
    free(r);
}

Test(policy, windows_follow_the_acceptance_within_a_mode) {
    struct replica_model *r = replica_create(0.95, 4000, 400);
    struct policy policy = policy_for(r, EVERY_MODE, SPEC_SD);
    run(r, &policy, 5);
    int wide = policy.current.window;
    r->truth.accept_exact = 0.4;
    run(r, &policy, 5);
    cr_assert(policy.current.window < wide - 2, "%d, then %d", wide, policy.current.window);
    cr_assert_eq(r->in_mode_us[SPEC_SD] > 4.9 * SECOND_US, true);
    free(r);
}

Test(policy, a_fixed_mode_never_changes) {
    for (enum spec_mode mode = SPEC_PLAIN; mode < SPEC_N_MODES; mode++) {
        struct replica_model *r = replica_create(0.01, 2000, 500);
        struct policy policy = policy_for(r, EVERY_MODE, mode);
        cr_assert_eq(policy.current.mode, mode);
        r->in_force = policy.current;
        run(r, &policy, 5);
        cr_assert(fabs(r->in_mode_us[mode] - (r->now_us)) < 1, "%s", spec_mode_name(mode));
        free(r);
    }
}

Test(policy, a_fixed_window_and_delay_stay) {
    struct replica_model *r = replica_create(0.6, 4000, 500);
    struct policy policy;
    policy_init(&policy, &(struct policy_options){.wish = {.mode = SPEC_PEARL, .window = 4,
                                                           .delay = 9, .layer_width = 1},
                                                  .modes = EVERY_MODE, .max_window = 16,
                                                  .prior = prior_of(&r->truth)});
    cr_assert(policy.current.window == 4 && policy.current.delay == 3);
    run(r, &policy, 5);
    cr_assert(policy.current.window == 4 && policy.current.delay == 3 && r->changed == 0);
    /* A wish that comes later. */
    policy_set_wish(&policy, &(struct policy_wish){.mode = SPEC_SD, .window = 2, .delay = -1,
                                                   .layer_width = 1});
    cr_assert(policy.current.mode == SPEC_SD && policy.current.window == 2);
    policy_set_wish(&policy, &(struct policy_wish){.mode = -1, .delay = -1, .layer_width = 1});
    run(r, &policy, 5);
    cr_assert_eq(policy.phase, POLICY_SETTLED);
    cr_assert(r->in_mode_us[SPEC_PEARL_LP] == 0, "layer width 1 leaves layer-parallel modes out");
    free(r);
}

Test(policy, only_what_the_placement_supports) {
    struct replica_model *r = replica_create(0.85, 4000, 600);
    struct policy policy = policy_for(r, 1u << SPEC_PLAIN | 1u << SPEC_SD, -1);
    run(r, &policy, 20);
    cr_assert_eq(policy.settled.mode, SPEC_SD);
    cr_assert(fabs(r->in_mode_us[SPEC_PLAIN] + r->in_mode_us[SPEC_SD] - r->now_us) < 1);
    struct policy_estimate sd = policy_estimate(&policy, SPEC_SD);
    cr_assert(fabs(sd.measured / alone(r, SPEC_SD) - 1) < 0.1, "%.1f", sd.measured);
    cr_assert(fabs(sd.expected / sd.measured - 1) < 0.1, "%.1f", sd.expected);
    free(r);
}

Test(policy, a_draft_that_pays_only_alone_is_dropped_in_large_batches) {
    struct replica_model *r = replica_create(0.7, 4000, 600);
    struct policy policy = policy_for(r, EVERY_MODE, -1);
    run(r, &policy, 5);
    cr_assert_neq(policy.settled.mode, SPEC_PLAIN);
    /* With many sequences the products are bound by arithmetic: rows cost what they are. */
    r->n_sequences = 64;
    for (int i = 1; i < SPEC_MAX_WINDOW + 2; i++) r->truth.target_us[i] = 20000.0 * i;
    r->truth.draft_us = r->truth.fuzzy_us = r->truth.calibrate_us = 20000;
    run(r, &policy, 20);
    cr_assert_eq(policy.settled.mode, SPEC_PLAIN, "%s with 64 sequences",
                 spec_mode_name(policy.settled.mode));
    free(r);
}

Test(policy, a_machine_that_becomes_slow_is_slow_for_all_modes) {
    struct replica_model *r = replica_create(0.85, 4000, 600);
    struct policy policy = policy_for(r, 1u << SPEC_PLAIN | 1u << SPEC_SD, -1);
    run(r, &policy, 5);
    cr_assert_eq(policy.settled.mode, SPEC_SD);
    for (int i = 1; i < SPEC_MAX_WINDOW + 2; i++) r->truth.target_us[i] *= 3;
    r->truth.draft_us *= 3;
    run(r, &policy, 2);
    double expected = policy_estimate(&policy, SPEC_PLAIN).expected, truth = alone(r, SPEC_PLAIN);
    cr_assert(fabs(expected / truth - 1) < 0.2, "plain: %.1f expected, %.1f true", expected, truth);
    run(r, &policy, 10);
    cr_assert_eq(policy.settled.mode, SPEC_SD);
    free(r);
}

Test(policy, without_steps_nothing_is_decided) {
    struct replica_model *r = replica_create(0.7, 4000, 600);
    struct policy policy = policy_for(r, EVERY_MODE, -1);
    struct policy_setting before = policy.current;
    struct policy_step idle = {.spec = &r->spec, .n_sequences = 0, .step_us = 100};
    struct policy_step prefill = {.spec = &r->spec, .n_sequences = 3, .step_us = 100000,
                                  .n_tokens = 1, .prefill = true};
    r->said.mode = "plain";
    for (int i = 0; i < 1000; i++) {
        cr_assert_not(policy_observe(&policy, &idle));
        cr_assert_not(policy_observe(&policy, &prefill));
    }
    cr_assert(policy.current.mode == before.mode && policy.phase == POLICY_EXPLORING);
    free(r);
}
