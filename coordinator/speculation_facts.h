/* What a replica last said of its speculation, kept beyond the message that said it.
 *
 * Place: a replica's entry in the fleet (fleet.h), for metrics and the log (facts.c). Counts are since
 * the replica's start: a restarted one begins again at 0. Pure. */
#pragma once
#include <stdint.h>

#include "common/spec_mode.h"
#include "tandem/v1/replica.pb-c.h"

struct speculation_facts {
    enum spec_mode mode;           /* in force */
    uint32_t window, layer_width;  /* 0 while plain */
    uint64_t drafts, draft_tokens, accepted_tokens;
    uint64_t accepted_per_position[SPEC_MAX_WINDOW];
    uint64_t pre_verify_hits, post_verify_continuations, rollbacks, discarded_tokens;
    uint64_t draft_wait_us, target_wait_us;
};

/* NULL: the replica has no drafter; all is 0 and plain. Positions past the largest window and modes of
 * other names are not counted. */
struct speculation_facts speculation_facts_of(const Tandem__V1__SpecStats *stats);
