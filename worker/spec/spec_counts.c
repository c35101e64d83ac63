#include "worker/spec/spec_counts.h"

/* Weight of the newest value in an average over time, and over judged tokens. */
static const float TIME_WEIGHT = 1.0f / 8, TOKEN_WEIGHT = 1.0f / 64;

static int bucket_of(int n_sequences) {
    int i = 0;
    while (i < SPEC_BUCKETS - 1 && 1 << i < n_sequences) i++;
    return i;
}

static void average(float *mean, float value, float weight) {
    *mean = *mean == 0 ? value : *mean + (value - *mean) * weight;
}

static void average_ns(float *mean, int64_t ns) {
    if (ns > 0) average(mean, (float)ns / 1e3f, TIME_WEIGHT);
}

void spec_counts_policy_changed(struct spec_counts *c) {
    c->policy_tokens = 0;
    c->policy_ns = 0;
    c->policy_rounds = 0;
}

void spec_counts_draft_times(struct spec_counts *c, int n_sequences,
                             const struct draft_report *report) {
    int i = bucket_of(n_sequences);
    average_ns(&c->draft_us[i], report->step_ns);
    average_ns(&c->fuzzy_us[i], report->fuzzy_ns);
    average_ns(&c->calibrate_us[i], report->calibrate_ns);
}

void spec_counts_pass(struct spec_counts *c, const struct scheduler_plan *plan, int64_t pass_ns) {
    int n_rows = 0, i = bucket_of(plan->n_items);
    if (plan->n_items == 0 || plan->n_prefill_rows > 0) return;
    for (int j = 0; j < plan->n_items; j++) n_rows += plan->items[j].n_rows;
    if (n_rows == plan->n_items) {
        average_ns(&c->target_us[i], pass_ns);
        return;
    }
    average_ns(&c->verify_us[i], pass_ns);
    average(&c->verify_rows[i], (float)n_rows / (float)plan->n_items, TIME_WEIGHT);
}

/* One judged token more: it held or it fell. 0 means "not measured", so the average stays above
 * it. */
static void judge(struct spec_counts *c, bool fuzzy, bool held) {
    float *mean = fuzzy ? &c->acceptance_fuzzy : &c->acceptance;
    if (*mean == 0) *mean = 0.5f;
    average(mean, held ? 1 : 0, TOKEN_WEIGHT);
    if (*mean < 1e-6f) *mean = 1e-6f;
}

void spec_counts_verdict(struct spec_counts *c, const struct scheduler_item *item,
                         const struct round_outcome *outcome, int judged, bool overlapped) {
    const struct candidate *candidates = item->request->spec.candidates;
    c->discarded += (uint64_t)outcome->dropped;
    if (judged == 0) return;
    c->drafts++;
    c->draft_tokens += (uint64_t)judged;
    c->accepted += (uint64_t)outcome->accepted;
    for (int i = 0; i < outcome->accepted; i++) {
        c->per_position[i < SPEC_MAX_WINDOW ? i : SPEC_MAX_WINDOW - 1]++;
        judge(c, candidates[i].fuzzy, true);
    }
    bool held = outcome->accepted == judged;
    if (!held) judge(c, candidates[outcome->accepted].fuzzy, false);
    c->rollbacks += !held;
    if (!overlapped) return;
    c->pre_verify_hits += item->round.tail == 0 && outcome->accepted > 0;
    c->post_verify_continuations += item->round.tail > 0 && held;
}

void spec_counts_step(struct spec_counts *c, int n_tokens, int64_t step_ns) {
    c->policy_tokens += (uint64_t)n_tokens;
    c->policy_ns += step_ns;
    c->policy_rounds++;
}

void spec_counts_describe(struct spec_counts *c, Tandem__V1__SpecStats *stats) {
    tandem__v1__spec_stats__init(stats);
    stats->drafts = c->drafts;
    stats->draft_tokens = c->draft_tokens;
    stats->accepted_tokens = c->accepted;
    stats->n_accepted_per_position = SPEC_MAX_WINDOW;
    stats->accepted_per_position = c->per_position;
    stats->pre_verify_hits = c->pre_verify_hits;
    stats->post_verify_continuations = c->post_verify_continuations;
    stats->rollbacks = c->rollbacks;
    stats->discarded_tokens = c->discarded;
    stats->draft_wait_us = (uint64_t)(c->draft_wait_ns / 1000);
    stats->target_wait_us = (uint64_t)(c->target_wait_ns / 1000);
    stats->acceptance = c->acceptance;
    stats->acceptance_fuzzy = c->acceptance_fuzzy;
    stats->n_target_us = stats->n_verify_us = stats->n_verify_rows = SPEC_BUCKETS;
    stats->n_draft_us = stats->n_fuzzy_us = stats->n_calibrate_us = SPEC_BUCKETS;
    stats->target_us = c->target_us;
    stats->verify_us = c->verify_us;
    stats->verify_rows = c->verify_rows;
    stats->draft_us = c->draft_us;
    stats->fuzzy_us = c->fuzzy_us;
    stats->calibrate_us = c->calibrate_us;
    stats->handoff_us = (float)c->handoff_ns / 1e3f;
    if (c->policy_ns > 0) {
        stats->tokens_per_second = (float)((double)c->policy_tokens * 1e9 / (double)c->policy_ns);
    }
    stats->rounds = c->policy_rounds;
}
