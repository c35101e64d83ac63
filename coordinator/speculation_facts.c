#include "coordinator/speculation_facts.h"

static void take_policy(struct speculation_facts *facts, const Tandem__V1__Policy *policy) {
    int mode = policy != NULL ? spec_mode_parse(policy->mode) : -1;
    if (mode <= SPEC_PLAIN) return;
    facts->mode = (enum spec_mode)mode;
    facts->window = policy->window;
    facts->layer_width = policy->layer_width;
}

struct speculation_facts speculation_facts_of(const Tandem__V1__SpecStats *stats) {
    struct speculation_facts facts = {.mode = SPEC_PLAIN};
    if (stats == NULL) return facts;
    take_policy(&facts, stats->policy);
    facts.drafts = stats->drafts;
    facts.draft_tokens = stats->draft_tokens;
    facts.accepted_tokens = stats->accepted_tokens;
    for (size_t i = 0; i < stats->n_accepted_per_position && i < SPEC_MAX_WINDOW; i++) {
        facts.accepted_per_position[i] = stats->accepted_per_position[i];
    }
    facts.pre_verify_hits = stats->pre_verify_hits;
    facts.post_verify_continuations = stats->post_verify_continuations;
    facts.rollbacks = stats->rollbacks;
    facts.discarded_tokens = stats->discarded_tokens;
    facts.draft_wait_us = stats->draft_wait_us;
    facts.target_wait_us = stats->target_wait_us;
    return facts;
}
