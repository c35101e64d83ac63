/* What speculation did and how long its parts take: counters since start, and moving averages by
 * batch size that the planner's formulas are fed with (coordinator/policy.h). Pure. */
#pragma once
#include "tandem/v1/replica.pb-c.h"
#include "worker/draft/drafter.h"
#include "worker/scheduler.h"

/* Bucket i: 2^(i-1) < sequences <= 2^i. */
enum { SPEC_BUCKETS = 10 };

struct spec_counts {
    uint64_t drafts, draft_tokens, accepted, per_position[SPEC_MAX_WINDOW];
    uint64_t pre_verify_hits, post_verify_continuations, rollbacks, discarded;
    int64_t draft_wait_ns, target_wait_ns, handoff_ns;
    float acceptance, acceptance_fuzzy; /* moving averages, 0: not measured */
    /* Moving averages in microseconds, by bucket. */
    float target_us[SPEC_BUCKETS], verify_us[SPEC_BUCKETS], verify_rows[SPEC_BUCKETS];
    float draft_us[SPEC_BUCKETS], fuzzy_us[SPEC_BUCKETS], calibrate_us[SPEC_BUCKETS];
    /* Since the policy changed. */
    uint64_t policy_tokens;
    int64_t policy_ns;
    uint32_t policy_rounds;
};

void spec_counts_policy_changed(struct spec_counts *counts);
void spec_counts_draft_times(struct spec_counts *counts, int n_sequences,
                             const struct draft_report *report);
/* A pass that decodes only; others say nothing about rounds. */
void spec_counts_pass(struct spec_counts *counts, const struct scheduler_plan *plan,
                      int64_t pass_ns);
/* judged: candidates looked at, fewer than the round's where the request ended. */
void spec_counts_verdict(struct spec_counts *counts, const struct scheduler_item *item,
                         const struct round_outcome *outcome, int judged, bool overlapped);
void spec_counts_step(struct spec_counts *counts, int n_tokens, int64_t step_ns);

/* Everything but the policy. Arrays are borrowed. */
void spec_counts_describe(struct spec_counts *counts, Tandem__V1__SpecStats *stats);
