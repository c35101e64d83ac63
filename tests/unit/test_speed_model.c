/* Expected values: research/easyspec-pearl.md 4.6, and closed forms written out here. */
#include "coordinator/speed_model.h"

#include <math.h>
#include <stdint.h>

#include "tests/unit/test.h"
#include "worker/spec/policy.h"
#include "worker/spec/round.h"

/* A target step takes c draft steps, whatever its rows; nothing else costs. */
static struct speed_model flat(double a, double c) {
    struct speed_model model = {.accept_exact = a, .accept_fuzzy = a, .draft_us = 1e6 / c,
                                .fuzzy_us = 1e6 / c, .calibrate_us = 1e6 / c};
    for (int r = 0; r < SPEC_MAX_WINDOW + 2; r++) model.target_us[r] = 1e6;
    return model;
}

static bool near(double value, double expected, double tolerance) {
    return fabs(value - expected) <= tolerance;
}

Test(speed_model, pearl_is_the_closed_form_of_the_chain) {
    for (int g = 1; g <= SPEC_MAX_WINDOW; g++) {
        for (double a = 0.05; a < 0.99; a += 0.1) {
            struct speed_model model = flat(a, 5);
            double expected = (1 - pow(a, g)) / ((1 - a) * (1 + a - pow(a, g)));
            double got = speed_model_round(&model, SPEC_PEARL, g, 0).tokens;
            cr_assert(near(got, expected, 1e-9), "a %.2f, g %d: %.6f, not %.6f", a, g, got, expected);
        }
    }
}

Test(speed_model, serial_modes_are_the_geometric_series) {
    struct speed_model model = flat(0.8, 8);
    model.accept_fuzzy = 0.7;
    double tokens = speed_model_round(&model, SPEC_SD, 4, 0).tokens;
    cr_assert(near(tokens, (1 - pow(0.8, 5)) / 0.2, 1e-9), "%.6f", tokens);
    tokens = speed_model_round(&model, SPEC_EASYSPEC, 4, 0).tokens;
    cr_assert(near(tokens, 1 + 0.8 * (1 + 0.7 + 0.49 + 0.343), 1e-9), "%.6f", tokens);
}

Test(speed_model, the_combined_chain_is_the_one_of_the_research_notes) {
    struct speed_model model = flat(0.8, 8);
    model.accept_fuzzy = 0.74;
    double tokens = speed_model_round(&model, SPEC_PEARL_LP, 8, 0).tokens;
    cr_assert(near(tokens, 2.175, 0.004), "%.4f", tokens);
    double s = 0.8 * pow(0.74, 7), e_q = (1 - pow(0.74, 8)) / 0.26;
    cr_assert(near(tokens, ((1 - s) + 0.8 * e_q) / (1.8 - s), 1e-9));
}

Test(speed_model, times_are_those_of_the_table) {
    struct speed_model model = flat(0.5, 4);
    model.draft_us = 100;
    model.fuzzy_us = 60;
    model.calibrate_us = 150;
    model.handoff_us = 7;
    for (int r = 1; r < SPEC_MAX_WINDOW + 2; r++) model.target_us[r] = 400 + 10 * (r - 1);
    cr_assert(near(speed_model_round(&model, SPEC_PLAIN, 0, 0).us, 400, 0));
    cr_assert(near(speed_model_round(&model, SPEC_SD, 3, 0).us, 300 + 430 + 7, 1e-9));
    cr_assert(near(speed_model_round(&model, SPEC_EASYSPEC, 3, 0).us, 150 + 120 + 430 + 7, 1e-9));
    /* The draft hides behind the target, or the target behind the draft. */
    double us = speed_model_round(&model, SPEC_PEARL, 8, 0).us;
    cr_assert(near(us, 800 + 7, 1e-9), "%.3f", us);
    us = speed_model_round(&model, SPEC_PEARL_LP, 8, 0).us;
    cr_assert(near(us, 150 + 7 * 60 + 7, 1e-9), "%.3f", us);
    us = speed_model_round(&model, SPEC_PEARL, 2, 0).us;
    double post = 0.5 / (1 - 0.25);   /* POST rounds of a cycle */
    cr_assert(near(us, (400 + post * 410) / (1 + post) + 7, 1e-9), "%.3f", us);
}

Test(speed_model, best_windows_give_the_published_table) {
    static const struct {
        double c, a, sd, pearl, delayed;
    } rows[] = {{3, .7, 1.31, 1.61, 1.61}, {3, .9, 1.76, 2.31, 2.31}, {5, .7, 1.58, 1.81, 1.86},
                {5, .8, 1.87, 2.28, 2.32}, {8, .6, 1.58, 1.55, 1.70}, {8, .8, 2.27, 2.55, 2.68},
                {8, .9, 3.07, 3.88, 3.96}, {12, .7, 2.08, 1.95, 2.23}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct speed_model model = flat(rows[i].a, rows[i].c);
        double sd = speed_model_best(&model, SPEC_SD, 1, SPEC_MAX_WINDOW).tokens_per_second;
        cr_assert(near(sd, rows[i].sd, 0.006), "row %zu: sd %.4f", i, sd);
        int g = (int)rows[i].c;
        double pearl = speed_model_choose(&model, SPEC_PEARL, g, 0).tokens_per_second;
        cr_assert(near(pearl, rows[i].pearl, 0.006), "row %zu: pearl %.4f", i, pearl);
        /* The notes let the draft make `delay` tokens more while it is waited for. A window of one
         * size, as in the engine, reaches this within 3.5 %, and never less than PEARL. */
        double best = speed_model_best(&model, SPEC_PEARL, 1, SPEC_MAX_WINDOW).tokens_per_second;
        cr_assert(best >= pearl && best > rows[i].delayed * 0.965 && best < rows[i].delayed + 0.006,
                  "row %zu: delayed %.4f", i, best);
    }
}

Test(speed_model, delay_pays_when_the_first_token_often_fails) {
    struct speed_model model = flat(0.6, 8);
    struct speed_choice best = speed_model_best(&model, SPEC_PEARL, 8, 8);
    cr_assert_eq(best.window, 8);
    cr_assert_eq(best.delay, 2);
    model = flat(0.9, 3);
    cr_assert_eq(speed_model_best(&model, SPEC_PEARL, 3, 3).delay, 0);
}

Test(speed_model, limits) {
    struct speed_model never = flat(0, 5), always = flat(1, 5);
    for (int g = 1; g <= SPEC_MAX_WINDOW; g++) {
        cr_assert(near(speed_model_round(&never, SPEC_PEARL, g, 0).tokens, 1, 1e-12));
        cr_assert(near(speed_model_round(&never, SPEC_SD, g, 0).tokens, 1, 1e-12));
        cr_assert(near(speed_model_round(&never, SPEC_PEARL_LP, g, 0).tokens, 1, 1e-12));
        cr_assert(near(speed_model_round(&always, SPEC_PEARL, g, 0).tokens, g, 1e-3));
        cr_assert(near(speed_model_round(&always, SPEC_SD, g, 0).tokens, g + 1, 1e-6));
        cr_assert(near(speed_model_round(&always, SPEC_EASYSPEC, g, 0).tokens, g + 1, 1e-6));
    }
    struct speed_choice plain = speed_model_best(&never, SPEC_PLAIN, 1, SPEC_MAX_WINDOW);
    cr_assert(plain.window == 0 && plain.delay == 0 && near(plain.tokens_per_second, 1, 1e-12));
    /* A window as large as the target's step is long: more only costs. */
    cr_assert_eq(speed_model_best(&always, SPEC_PEARL, 1, SPEC_MAX_WINDOW).window, 5);
    struct speed_model nothing_measured = {0};
    cr_assert(speed_model_best(&nothing_measured, SPEC_SD, 1, 4).tokens_per_second == 0);
}

/* ---- against the state machine that the engine runs ------------------------------------------- */

enum { SEED = 20250311, ROUNDS = 400000 };

/* Uniform in [0, 1), from a counter: the same in every run. */
static double draw(uint64_t *state) {
    *state += UINT64_C(0x9e3779b97f4a7c15);
    uint64_t z = *state;
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return (double)((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
}

/* How many of the judged candidates hold: the first of a block with a_first, others with a_next. A
 * tail holds no first; without one, the judged tokens begin with the first, else they end with it. */
static int hold(struct round_plan plan, double a_first, double a_next, uint64_t *state) {
    int judged = round_judged(plan);
    for (int i = 0; i < judged; i++) {
        bool first = i == plan.tail;
        if (draw(state) >= (first ? a_first : a_next)) return i;
    }
    return judged;
}

/* Tokens and time of an average round, by running it. */
static struct speed_round simulate(const struct speed_model *model, enum spec_mode mode, int window,
                                   int delay) {
    bool fuzzy = spec_mode_layer_parallel(mode);
    double first_us = fuzzy ? model->calibrate_us : model->draft_us;
    double next_us = fuzzy ? model->fuzzy_us : model->draft_us;
    double tokens = 0, us = 0;
    uint64_t state = SEED;
    int tail = 0;
    for (int i = 0; i < ROUNDS; i++) {
        struct spec_policy policy = {mode, window, 1, delay};
        struct spec_wish wish = {-1, 0};
        struct round_plan plan =
            spec_policy_round(&policy, &wish, tail, tail > 0, SPEC_MAX_WINDOW, 1 << 20);
        int held = hold(plan, model->accept_exact, fuzzy ? model->accept_fuzzy : model->accept_exact,
                        &state);
        struct round_outcome outcome = round_settle(plan, held);
        double draft = first_us + (plan.make - 1) * next_us;
        double before = plan.wait > 0 ? first_us + (plan.wait - 1) * next_us : 0;
        double verify = model->target_us[round_rows(plan)];
        us += before + (draft - before > verify ? draft - before : verify) + model->handoff_us;
        tokens += outcome.committed;
        tail = outcome.tail;
    }
    return (struct speed_round){tokens / ROUNDS, us / ROUNDS};
}

Test(speed_model, agrees_with_the_engines_rounds) {
    static const struct {
        double exact, fuzzy;
        int window, delay;
    } cases[] = {{.8, .74, 8, 0}, {.8, .8, 5, 0}, {.6, .6, 8, 2}, {.9, .85, 4, 1}, {.7, .7, 12, 3},
                 {.5, .3, 3, 2}, {.95, .9, 16, 4}, {.7, .6, 1, 0}, {.4, .4, 2, 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct speed_model model = flat(cases[i].exact, 6);
        model.accept_fuzzy = cases[i].fuzzy;
        model.calibrate_us *= 1.5;
        model.handoff_us = 20000;
        for (int r = 1; r < SPEC_MAX_WINDOW + 2; r++) model.target_us[r] *= 1 + 0.04 * (r - 1);
        for (enum spec_mode mode = SPEC_SD; mode < SPEC_N_MODES; mode++) {
            int window = cases[i].window, delay = cases[i].delay;
            struct speed_round expected = simulate(&model, mode, window, delay);
            struct speed_round got = speed_model_round(&model, mode, window, delay);
            cr_assert(near(got.tokens, expected.tokens, 0.01 * expected.tokens),
                      "case %zu, %s, seed %d: %.4f tokens, simulated %.4f", i, spec_mode_name(mode),
                      SEED, got.tokens, expected.tokens);
            cr_assert(near(got.us, expected.us, 0.01 * expected.us),
                      "case %zu, %s, seed %d: %.1f us, simulated %.1f", i, spec_mode_name(mode), SEED,
                      got.us, expected.us);
        }
    }
}
