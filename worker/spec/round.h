/* The round of one sequence: how many rows the target verifies, how many tokens the draft makes,
 * and what both sides do with the verdict. Pure; target and draft run this same text.
 *
 * A sequence is `committed` tokens (final), then `tail`: drafted tokens that the target has been
 * given and has not judged. A round drafts `make` more behind the tail. The target waits for the
 * first `wait` of them, feeds its last committed token, the tail and those, and judges
 *
 *     x[0 .. judged)  =  tail, then the first wait + 1 new tokens (or all there are)
 *
 * against its own choice at each place. One rule covers every mode (speculation.md 2, 4):
 *
 *     plain              make 0                 1 row, nothing judged, the target's token is the bonus
 *     sd, easyspec       wait = make = g        g + 1 rows, g judged, then a bonus
 *     PEARL, PRE         tail 0, wait 0         1 row, the new block's first token is judged
 *     PEARL, POST        tail g - 1, wait 0     g rows, tail and the new block's first token are judged
 *     delayed pre-verify tail 0, 0 < wait < g   1 + wait rows, wait + 1 judged
 *
 * PEARL: Liu et al., arXiv 2408.11850, 4; delayed pre-verify and the sums: speculation.md 2. */
#pragma once
#include <stdbool.h>

struct round_plan {
    int tail; /* known to the target, unjudged */
    int make; /* new tokens */
    int wait; /* of them, those the target's rows include; <= make */
};

/* Plans a round. window: new tokens wanted; wait: new tokens the target waits for (clipped to the
 * window; 0 while there is a tail, which only overlapped rounds leave); limit: tokens the sequence
 * may still get, >= 1: candidates beyond it are never made. */
struct round_plan round_plan(int tail, int window, int wait, int limit);

/* The draft may make fewer than planned: none while its prefill runs, few when its own KV is full
 * or after an end token. */
struct round_plan round_made(struct round_plan plan, int made);

static inline int round_rows(struct round_plan plan) {
    return 1 + plan.tail + plan.wait;
}

/* Candidates that the target judges. */
static inline int round_judged(struct round_plan plan) {
    int n = plan.tail + plan.make;
    return n < round_rows(plan) ? n : round_rows(plan);
}

/* Whether the row after the last judged candidate gives a token of the target's own. */
static inline bool round_has_bonus(struct round_plan plan) {
    return round_judged(plan) < round_rows(plan);
}

/* What follows from `accepted` of round_judged(plan) candidates. */
struct round_outcome {
    int accepted;     /* candidates that become committed */
    bool own;         /* then one token of the target's own: correction or bonus */
    int committed;    /* accepted + own */
    int tail;         /* candidates that stay, unjudged, behind the committed ones */
    int dropped;      /* candidates that fall */
};
struct round_outcome round_settle(struct round_plan plan, int accepted);
