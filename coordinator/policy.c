#include "coordinator/policy.h"

#include <math.h>
#include <string.h>

#include "common/error.h"

/* Segments: how long one setting runs before a decision. A new setting's first rounds, in which the
 * draft may have to catch up, are not measured, but not waited for without end either. */
struct span {
    uint32_t rounds;           /* both of these, */
    double us;
    uint32_t rounds_least;     /* or, where rounds are slow, both of these */
    double us_most;
};
static const struct span SEGMENT = {64, 250e3, 8, 1e6}, TRIAL = {32, 60e3, 4, 120e3};
enum { WARM_ROUNDS = 3 };
static const double WARM_US_MOST = 400e3;
static const double FORCE_US_MOST = 2e6;    /* a replica that does not say so has its reasons */

static const double GAIN = 1.05;            /* that a change must promise */
static const double REFRESH_US = 3e6;       /* estimates older than this may be probed */
static const double PROBE_BUDGET = 0.02;    /* of the time since exploring */
static const double PROBE_PAUSE_US = 2e6, PROBE_PAUSE_US_MOST = 60e6;
static const double PROBE_WORTH = 0.7;      /* of the current speed, below which nothing is probed */
static const double TRIAL_WORTH = 0.85;     /* of the best that ran, the same when exploring */
enum { PROBE_WINDOW = 3, CONFIRMATIONS = 2 };

const char *policy_phase_name(enum policy_phase phase) {
    static const char *const names[] = {"exploring", "settled", "probing"};
    return names[phase];
}

bool policy_allows(const struct policy *policy, enum spec_mode mode) {
    const struct policy_options *options = &policy->options;
    if ((options->modes >> mode & 1) == 0) return false;
    if (options->wish.mode >= 0) return (int)mode == options->wish.mode;
    /* One layer at a time is the ordinary draft with a calibration on top. */
    return !spec_mode_layer_parallel(mode) || options->wish.layer_width > 1;
}

/* ---- the model, from what is measured -------------------------------------------------------- */

static double at(const float *values, size_t n, int i) {
    return (size_t)i < n && values[i] > 0 ? (double)values[i] : 0;
}

/* The prior's time for a number of rows that need not be whole. */
static double prior_us(const struct speed_model *prior, double rows) {
    const int most = SPEC_MAX_WINDOW + 1;
    if (rows <= 1) return prior->target_us[1];
    if (rows >= most) return prior->target_us[most];
    int below = (int)rows;
    double part = rows - below;
    return prior->target_us[below] * (1 - part) + prior->target_us[below + 1] * part;
}

/* A report of a series. Its average needs some rounds to forget what it was before a pause. */
static void take_time(struct policy *policy, enum policy_series series, double raw, double scale) {
    enum { SETTLED_STREAK = 24 };
    static const double pause_us = 500e3;
    struct policy_time *time = &policy->times[policy->bucket][series];
    if (raw == 0 || raw == time->raw) return;
    bool resumed = time->streak == 0 || policy->busy_us - time->at_us > pause_us;
    time->streak = resumed ? 1 : time->streak + 1;
    bool of_target = series == POLICY_TARGET || series == POLICY_VERIFY;
    bool vacant = policy->lead == NULL || policy->busy_us - policy->lead->at_us > pause_us;
    if (policy->lead == time && !resumed) policy->drift *= scale / time->scale;
    if (of_target && vacant && time->streak >= SETTLED_STREAK) policy->lead = time;
    time->raw = raw;
    time->scale = scale;
    time->drift = policy->drift;
    time->at_us = policy->busy_us;
}

/* What it would be now; 0: not known. */
static double scale_now(const struct policy *policy, enum policy_series series) {
    const struct policy_time *time = &policy->times[policy->bucket][series];
    return time->scale > 0 ? time->scale * policy->drift / time->drift : 0;
}

static void take_times(struct policy *policy, const Tandem__V1__SpecStats *spec) {
    const struct speed_model *prior = &policy->options.prior;
    int b = policy->bucket;
    double rows = at(spec->verify_rows, spec->n_verify_rows, b);
    double one = at(spec->target_us, spec->n_target_us, b);
    double many = at(spec->verify_us, spec->n_verify_us, b);
    double draft = at(spec->draft_us, spec->n_draft_us, b);
    double fuzzy = at(spec->fuzzy_us, spec->n_fuzzy_us, b);
    double calibrate = at(spec->calibrate_us, spec->n_calibrate_us, b);
    take_time(policy, POLICY_TARGET, one, one / prior_us(prior, 1));
    take_time(policy, POLICY_VERIFY, rows > 1.2 ? many : 0, many / prior_us(prior, rows));
    /* Look-up drafting has no prior: its scale is the time itself. */
    take_time(policy, POLICY_DRAFT, draft, draft / (prior->draft_us > 0 ? prior->draft_us : 1));
    take_time(policy, POLICY_FUZZY, fuzzy, fuzzy / (prior->fuzzy_us > 0 ? prior->fuzzy_us : 1));
    take_time(policy, POLICY_CALIBRATE, calibrate,
              calibrate / (prior->calibrate_us > 0 ? prior->calibrate_us : 1));
    policy->verify_rows = rows;
}

/* Times of the target: the prior's shape through the one or two points that are measured. */
static void fit_target(struct policy *policy) {
    double low = scale_now(policy, POLICY_TARGET), high = scale_now(policy, POLICY_VERIFY);
    double rows = policy->verify_rows;
    if (low == 0 && high == 0) return;
    if (low == 0) low = high;
    if (high == 0) high = low;
    for (int r = 1; r < SPEC_MAX_WINDOW + 2; r++) {
        double part = rows > 1.2 ? fmin((r - 1) / (rows - 1), 1) : 0;
        policy->model.target_us[r] *= low + (high - low) * part;
    }
}

/* What is not measured is as much slower than the prior as what is most like it. */
static void fit_draft(struct policy *policy) {
    struct speed_model *model = &policy->model;
    double draft = scale_now(policy, POLICY_DRAFT), fuzzy = scale_now(policy, POLICY_FUZZY);
    double calibrate = scale_now(policy, POLICY_CALIBRATE);
    double target = scale_now(policy, POLICY_TARGET), like = target > 0 ? target : 1;
    if (fuzzy > 0) like = fuzzy;
    if (draft > 0) like = draft;
    bool looks_up = policy->options.prior.draft_us == 0;
    model->draft_us = looks_up ? draft : model->draft_us * (draft > 0 ? draft : like);
    model->fuzzy_us *= fuzzy > 0 ? fuzzy : like;
    model->calibrate_us *= calibrate > 0 ? calibrate : like;
}

/* The workers' average forgets within a hundred tokens, and swings by some hundredths: windows would
 * follow the swings. This one goes slowly, and jumps where the difference is no swing. */
static void smooth(double *slow, float fast) {
    static const double weight = 1.0 / 256, swing = 0.12;
    double step = (double)fast - *slow;
    if (fast > 0) *slow += *slow == 0 || fabs(step) > swing ? step : step * weight;
}

static void fit(struct policy *policy, const Tandem__V1__SpecStats *spec) {
    const struct speed_model *prior = &policy->options.prior;
    struct speed_model *model = &policy->model;
    *model = *prior;
    take_times(policy, spec);
    fit_target(policy);
    fit_draft(policy);
    smooth(&policy->accept_exact, spec->acceptance);
    smooth(&policy->accept_fuzzy, spec->acceptance_fuzzy);
    if (policy->accept_exact > 0) model->accept_exact = policy->accept_exact;
    double keeps = prior->accept_exact > 0 ? prior->accept_fuzzy / prior->accept_exact : 1;
    model->accept_fuzzy =
        policy->accept_fuzzy > 0 ? policy->accept_fuzzy : model->accept_exact * keeps;
    if (spec->handoff_us > 0) model->handoff_us = 2 * (double)spec->handoff_us; /* there and back */
}

/* ---- estimates ------------------------------------------------------------------------------- */

static int clamp(int value, int low, int high) {
    return value < low ? low : value > high ? high : value;
}

static struct policy_setting best_setting(const struct policy *policy, enum spec_mode mode,
                                          double *tokens_per_second) {
    const struct policy_wish *wish = &policy->options.wish;
    /* A window of one leaves no tail and no fuzzy step: nothing would be learned of either. */
    bool longer = spec_mode_overlapped(mode) || spec_mode_layer_parallel(mode);
    int least = longer && policy->options.max_window > 1 ? 2 : 1;
    int low = wish->window > 0 ? wish->window : least;
    int high = wish->window > 0 ? wish->window : policy->options.max_window;
    struct speed_choice choice = speed_model_best(&policy->model, mode, low, high);
    if (wish->delay >= 0 && spec_mode_overlapped(mode)) {
        choice = speed_model_choose(&policy->model, mode, choice.window,
                                    clamp(wish->delay, 0, choice.window - 1));
    }
    *tokens_per_second = choice.tokens_per_second * policy->n_sequences;
    return (struct policy_setting){mode, choice.window > 0 ? choice.window : 1,
                                   spec_mode_layer_parallel(mode) ? wish->layer_width : 1,
                                   choice.delay};
}

static double predict(const struct policy *policy, const struct policy_setting *s) {
    return speed_model_choose(&policy->model, s->mode, s->window, s->delay).tokens_per_second *
           policy->n_sequences;
}

/* Of this bucket, else of the nearest one in which the mode has run. */
static const struct policy_record *record_of(const struct policy *policy, enum spec_mode mode) {
    for (int distance = 0; distance < POLICY_BUCKETS; distance++) {
        for (int side = -1; side <= 1; side += 2) {
            int i = policy->bucket + side * distance;
            if (i < 0 || i >= POLICY_BUCKETS) continue;
            if (policy->records[i][mode].factor > 0) return &policy->records[i][mode];
        }
    }
    return NULL;
}

static double factor_of(const struct policy *policy, enum spec_mode mode) {
    const struct policy_record *record = record_of(policy, mode);
    return record != NULL ? record->factor : 1;
}

struct policy_estimate policy_estimate(const struct policy *policy, enum spec_mode mode) {
    struct policy_estimate estimate = {
        .measured = policy->records[policy->bucket][mode].tokens_per_second};
    estimate.setting = best_setting(policy, mode, &estimate.predicted);
    estimate.expected = estimate.predicted * factor_of(policy, mode);
    return estimate;
}

/* The best of the modes that are allowed; `but` is left out (-1: none). */
static struct policy_estimate best_of(const struct policy *policy, int but) {
    struct policy_estimate best = {.expected = -1};
    for (enum spec_mode mode = SPEC_PLAIN; mode < SPEC_N_MODES; mode++) {
        if ((int)mode == but || !policy_allows(policy, mode)) continue;
        struct policy_estimate estimate = policy_estimate(policy, mode);
        if (estimate.expected > best.expected) best = estimate;
    }
    return best;
}

static bool same(const struct policy_setting *a, const struct policy_setting *b) {
    return a->mode == b->mode && a->window == b->window && a->delay == b->delay &&
           a->layer_width == b->layer_width;
}

/* ---- segments -------------------------------------------------------------------------------- */

static void begin_segment(struct policy *policy) {
    policy->rounds = policy->warm_rounds = 0;
    policy->segment_us = policy->tokens = policy->measured_us = policy->sequence_us = 0;
    policy->segment_bucket = policy->bucket;
}

/* True: it is another one. */
static bool change(struct policy *policy, const struct policy_setting *setting) {
    begin_segment(policy);
    policy->rival_streak = 0;
    if (same(&policy->current, setting)) return false;
    policy->current = *setting;
    policy->in_force = policy->warm = false;
    return true;
}

static bool says_so(const Tandem__V1__SpecStats *spec, const struct policy_setting *setting) {
    const Tandem__V1__Policy *p = spec->policy;
    if (p == NULL || strcmp(p->mode, spec_mode_name(setting->mode)) != 0) return false;
    if (setting->mode == SPEC_PLAIN) return true;
    return p->window == (uint32_t)setting->window && p->delay == (uint32_t)setting->delay &&
           p->layer_width == (uint32_t)setting->layer_width;
}

/* Whether the new setting has begun to work: the draft caught up and something was judged. */
static bool is_warm(const struct policy *policy, const Tandem__V1__SpecStats *spec) {
    if (policy->segment_us >= WARM_US_MOST) return true;
    if (policy->warm_rounds < WARM_ROUNDS) return false;
    return policy->current.mode == SPEC_PLAIN || spec->drafts > policy->drafts_before;
}

/* Adds the step to the segment; true: the segment is long enough. */
static bool measure(struct policy *policy, const struct policy_step *step) {
    policy->segment_us += step->step_us;
    if (!policy->in_force) {
        policy->in_force =
            says_so(step->spec, &policy->current) || policy->segment_us > FORCE_US_MOST;
        policy->drafts_before = step->spec->drafts;
        policy->warm_rounds = 0;
        return false;
    }
    if (!policy->warm) {
        policy->warm_rounds++;
        policy->warm = is_warm(policy, step->spec);
        return false;
    }
    policy->rounds++;
    policy->tokens += step->n_tokens;
    policy->measured_us += step->step_us;
    policy->sequence_us += (double)step->step_us * step->n_sequences;
    const struct span *span = policy->phase == POLICY_SETTLED ? &SEGMENT : &TRIAL;
    return (policy->rounds >= span->rounds && policy->measured_us >= span->us) ||
           (policy->rounds >= span->rounds_least && policy->measured_us >= span->us_most);
}

static void record(struct policy *policy) {
    struct policy_record *r = &policy->records[policy->bucket][policy->current.mode];
    double rate = policy->tokens / policy->measured_us * 1e6;
    double predicted = predict(policy, &policy->current) / policy->n_sequences *
                       (policy->sequence_us / policy->measured_us);
    double factor = predicted > 0 ? fmin(fmax(rate / predicted, 0.1), 10) : 1;
    /* A setting that goes on is averaged; a trial counts as it is. */
    double weight = r->factor > 0 && policy->phase == POLICY_SETTLED ? 0.3 : 1;
    r->factor += (factor - r->factor) * weight;
    r->tokens_per_second += (rate - r->tokens_per_second) * weight;
    r->at_us = policy->busy_us;
}

/* ---- decisions ------------------------------------------------------------------------------- */

static bool ever_ran(const struct policy *policy, enum spec_mode mode) {
    return record_of(policy, mode) != NULL;
}

static bool settle(struct policy *policy) {
    struct policy_estimate best = best_of(policy, -1);
    if (policy_allows(policy, SPEC_PLAIN) && best.setting.mode != SPEC_PLAIN) {
        struct policy_estimate plain = policy_estimate(policy, SPEC_PLAIN);
        if (best.expected < plain.expected * GAIN) best = plain;
    }
    policy->phase = POLICY_SETTLED;
    policy->settled = best.setting;
    return change(policy, &best.setting);
}

/* Plain and the modes that could be the best are tried, first what promises most; then the policy
 * settles. */
static bool explore(struct policy *policy) {
    struct policy_estimate next = {.expected = -1};
    double best = 0;
    for (enum spec_mode mode = SPEC_PLAIN; mode < SPEC_N_MODES; mode++) {
        if (!policy_allows(policy, mode)) continue;
        struct policy_estimate estimate = policy_estimate(policy, mode);
        bool ran = ever_ran(policy, mode);
        if (ran && estimate.expected > best) best = estimate.expected;
        if (!ran && estimate.expected > next.expected) next = estimate;
    }
    bool plain_ran = !policy_allows(policy, SPEC_PLAIN) || ever_ran(policy, SPEC_PLAIN);
    bool promising = next.expected > best * TRIAL_WORTH;
    if (!promising && !plain_ran) next = policy_estimate(policy, SPEC_PLAIN);
    if (promising || !plain_ran) return change(policy, &next.setting);
    policy->explored_us = policy->busy_us;
    policy->next_probe_us = policy->busy_us + policy->probe_pause_us;
    return settle(policy);
}

/* Speed of a mode against the current one's: what a moment in it costs. */
static double loss_of(const struct policy *policy, enum spec_mode mode) {
    double here = predict(policy, &policy->settled) * factor_of(policy, policy->settled.mode);
    double there = policy_estimate(policy, mode).expected;
    return here > 0 ? fmax(0, 1 - there / here) : 0;
}

/* A mode at rest whose estimate is old and could be wrong by enough to matter; -1: none. In plain
 * nothing measures the acceptance, so the best of the others is always worth it. */
static int probe_target(const struct policy *policy) {
    int target = -1;
    double best = 0;
    bool in_plain = policy->settled.mode == SPEC_PLAIN;
    for (enum spec_mode mode = SPEC_PLAIN; mode < SPEC_N_MODES; mode++) {
        if (mode == policy->settled.mode || !policy_allows(policy, mode)) continue;
        const struct policy_record *r = &policy->records[policy->bucket][mode];
        if (r->factor > 0 && policy->busy_us - r->at_us < REFRESH_US) continue;
        double expected = policy_estimate(policy, mode).expected;
        if (!in_plain && loss_of(policy, mode) > 1 - PROBE_WORTH) continue;
        if (expected > best) target = (int)mode;
        if (expected > best) best = expected;
    }
    return target;
}

static bool start_probe(struct policy *policy, enum spec_mode mode) {
    struct policy_setting setting = policy_estimate(policy, mode).setting;
    /* Of a window of one an overlapped round learns nothing but that it is no use. */
    if (mode != SPEC_PLAIN && policy->options.wish.window == 0) {
        setting.window = clamp(setting.window, PROBE_WINDOW, policy->options.max_window);
    }
    policy->phase = POLICY_PROBING;
    return change(policy, &setting);
}

static bool may_probe(const struct policy *policy, int target) {
    if (target < 0 || policy->busy_us < policy->next_probe_us) return false;
    double round_us = policy->model.target_us[1];
    double cost = fmax(TRIAL.us_most, (WARM_ROUNDS + TRIAL.rounds_least) * round_us) *
                  loss_of(policy, (enum spec_mode)target);
    double budget = PROBE_BUDGET * (policy->busy_us - policy->explored_us);
    return policy->probe_loss_us + cost <= budget;
}

static bool finish_probe(struct policy *policy) {
    struct policy_setting before = policy->settled;
    policy->probe_loss_us += policy->segment_us * loss_of(policy, policy->current.mode);
    struct policy_estimate best = best_of(policy, -1);
    double here = predict(policy, &before) * factor_of(policy, before.mode);
    bool better = best.setting.mode != before.mode && best.expected > here * GAIN;
    policy->probe_pause_us = better ? PROBE_PAUSE_US
                                    : fmin(policy->probe_pause_us * 2, PROBE_PAUSE_US_MOST);
    policy->next_probe_us = policy->busy_us + policy->probe_pause_us;
    policy->phase = POLICY_SETTLED;
    if (better) policy->settled = best.setting;
    return change(policy, &policy->settled);
}

/* Another setting must win several times in a row; then it is taken. */
static bool confirm(struct policy *policy, const struct policy_setting *rival) {
    bool again = policy->rival_streak > 0 && policy->rival.mode == rival->mode;
    policy->rival_streak = again ? policy->rival_streak + 1 : 1;
    policy->rival = *rival;
    if (policy->rival_streak < CONFIRMATIONS) {
        begin_segment(policy);
        return false;
    }
    policy->settled = *rival;
    return change(policy, rival);
}

static bool stay_or_change(struct policy *policy) {
    struct policy_estimate best = best_of(policy, -1);
    double here = predict(policy, &policy->current) * factor_of(policy, policy->current.mode);
    double needed = best.setting.mode == SPEC_PLAIN ? 1 : GAIN;
    if (!same(&best.setting, &policy->current) && best.expected > here * needed) {
        return confirm(policy, &best.setting);
    }
    policy->rival_streak = 0;
    int target = probe_target(policy);
    if (may_probe(policy, target)) return start_probe(policy, (enum spec_mode)target);
    begin_segment(policy);
    return false;
}

static int bucket_of(uint32_t n_sequences) {
    int i = 0;
    while (i < POLICY_BUCKETS - 1 && UINT32_C(1) << i < n_sequences) i++;
    return i;
}

bool policy_observe(struct policy *policy, const struct policy_step *step) {
    if (step->n_sequences == 0 || step->step_us == 0) return false;
    policy->busy_us += step->step_us;
    if (step->prefill) return false;
    int bucket = bucket_of(step->n_sequences);
    policy->bucket = bucket;
    policy->n_sequences = step->n_sequences;
    /* Batches of about one size belong together. */
    if (bucket < policy->segment_bucket - 1 || bucket > policy->segment_bucket + 1) {
        begin_segment(policy);
    }
    fit(policy, step->spec);
    if (!measure(policy, step)) return false;
    record(policy);
    switch (policy->phase) {
    case POLICY_EXPLORING: return explore(policy);
    case POLICY_PROBING: return finish_probe(policy);
    case POLICY_SETTLED: break;
    }
    return stay_or_change(policy);
}

/* ---- the wish -------------------------------------------------------------------------------- */

/* Auto begins with what promises most, and tries the others after it. */
static void begin(struct policy *policy) {
    policy->phase = policy->options.wish.mode < 0 ? POLICY_EXPLORING : POLICY_SETTLED;
    policy->probe_pause_us = PROBE_PAUSE_US;
    policy->settled = best_of(policy, -1).setting;
    change(policy, &policy->settled);
}

void policy_init(struct policy *policy, const struct policy_options *options) {
    *policy = (struct policy){
        .options = *options, .model = options->prior, .n_sequences = 1, .drift = 1};
    CHECK(options->modes & 1u << SPEC_PLAIN);
    CHECK(options->max_window >= 1 && options->max_window <= SPEC_MAX_WINDOW);
    begin(policy);
}

void policy_set_wish(struct policy *policy, const struct policy_wish *wish) {
    policy->options.wish = *wish;
    begin(policy);
}
