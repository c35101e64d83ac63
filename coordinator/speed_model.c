#include "coordinator/speed_model.h"

#include "common/error.h"

static double larger(double a, double b) {
    return a > b ? a : b;
}

/* Below 1: a chain that never fails would never return to PRE, and has no average cycle. */
static double probability(double a) {
    const double most = 1 - 1e-9;
    return a < 0 ? 0 : a > most ? most : a;
}

/* 1 + a + ... + a^n */
static double geometric(double a, int n) {
    double sum = 1;
    for (int i = 0; i < n; i++) sum = 1 + a * sum;
    return sum;
}

static double power(double a, int n) {
    double product = 1;
    for (int i = 0; i < n; i++) product *= a;
    return product;
}

/* Acceptance and times of one mode's draft: the first token of a block, and the others. */
struct drafting {
    double accept_first, accept_next, first_us, next_us;
};

static struct drafting drafting_of(const struct speed_model *model, enum spec_mode mode) {
    bool fuzzy = spec_mode_layer_parallel(mode);
    return (struct drafting){
        .accept_first = probability(model->accept_exact),
        .accept_next = probability(fuzzy ? model->accept_fuzzy : model->accept_exact),
        .first_us = fuzzy ? model->calibrate_us : model->draft_us,
        .next_us = fuzzy ? model->fuzzy_us : model->draft_us,
    };
}

static double block_us(const struct drafting *d, int n) {
    return n == 0 ? 0 : d->first_us + (n - 1) * d->next_us;
}

/* Draft, then verify: one state, n tokens judged and one of the target's own. */
static struct speed_round serial_round(const struct speed_model *model, const struct drafting *d,
                                       int window) {
    return (struct speed_round){
        .tokens = 1 + d->accept_first * geometric(d->accept_next, window - 1),
        .us = block_us(d, window) + model->target_us[window + 1] + model->handoff_us,
    };
}

/* One cycle of the chain: PRE once, FIRST and POST as often as a cycle meets them. */
static struct speed_round overlapped_round(const struct speed_model *model,
                                           const struct drafting *d, int window, int delay) {
    /* Without a tail the draft makes a window behind what is waited for (worker/spec/policy.c). */
    int made = window + delay < SPEC_MAX_WINDOW ? window + delay : SPEC_MAX_WINDOW;
    double waited_us = block_us(d, delay), draft_us = block_us(d, window);
    double tokens = 1 + (delay > 0 ? d->accept_first * geometric(d->accept_next, delay - 1) : 0);
    double us = waited_us + larger(block_us(d, made) - waited_us, model->target_us[delay + 1]);
    double visits = 1;

    /* A tail of m tokens: those are judged before the first token of the next block. */
    double held = d->accept_first * power(d->accept_next, delay);
    int m = made - delay - 1;
    if (m > 0) {
        double all = power(d->accept_next, window - 1) * d->accept_first;
        double post = held * power(d->accept_next, m) * d->accept_first / (1 - all);
        tokens += held * geometric(d->accept_next, m);
        us += held * larger(draft_us, model->target_us[m + 1]);
        tokens += post * geometric(d->accept_next, window - 1);
        us += post * larger(draft_us, model->target_us[window]);
        visits += held + post;
    }
    return (struct speed_round){tokens / visits, us / visits + model->handoff_us};
}

struct speed_round speed_model_round(const struct speed_model *model, enum spec_mode mode,
                                     int window, int delay) {
    if (mode == SPEC_PLAIN) return (struct speed_round){1, model->target_us[1]};
    CHECK(window >= 1 && window <= SPEC_MAX_WINDOW && delay >= 0 && delay < window);
    struct drafting drafting = drafting_of(model, mode);
    return spec_mode_overlapped(mode) ? overlapped_round(model, &drafting, window, delay)
                                      : serial_round(model, &drafting, window);
}

struct speed_choice speed_model_choose(const struct speed_model *model, enum spec_mode mode,
                                       int window, int delay) {
    struct speed_choice choice = {.round = speed_model_round(model, mode, window, delay)};
    if (mode != SPEC_PLAIN) choice.window = window;
    if (spec_mode_overlapped(mode)) choice.delay = delay;
    if (choice.round.us > 0) choice.tokens_per_second = choice.round.tokens / choice.round.us * 1e6;
    return choice;
}

struct speed_choice speed_model_best(const struct speed_model *model, enum spec_mode mode, int low,
                                     int high) {
    if (mode == SPEC_PLAIN) return speed_model_choose(model, mode, 0, 0);
    struct speed_choice best = speed_model_choose(model, mode, low, 0);
    for (int window = low; window <= high; window++) {
        int delays = spec_mode_overlapped(mode) ? window : 1;
        for (int delay = 0; delay < delays; delay++) {
            struct speed_choice choice = speed_model_choose(model, mode, window, delay);
            if (choice.tokens_per_second > best.tokens_per_second * (1 + 1e-9)) best = choice;
        }
    }
    return best;
}
