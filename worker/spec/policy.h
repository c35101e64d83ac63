/* The policy in force on a replica, and what it means for one sequence in one round. Pure.
 *
 * The coordinator sets the policy (coordinator/policy.h); a request may ask for a mode by name, or
 * for none, or for smaller windows. All of it changes how fast a text comes, never the text. */
#pragma once
#include "common/spec_mode.h"
#include "worker/spec/round.h"

struct spec_policy {
    enum spec_mode mode;
    int window;      /* tokens drafted for a sequence in a round, 1..SPEC_MAX_WINDOW */
    int layer_width; /* of layer-parallel modes */
    int delay;       /* overlapped modes: new tokens that a target without tails waits for */
};

/* What a request asks for. */
struct spec_wish {
    int mode;       /* enum spec_mode, or -1: the policy's */
    int max_window; /* 0: the policy's */
};

/* The mode of a sequence. */
enum spec_mode spec_policy_mode(const struct spec_policy *policy, const struct spec_wish *wish);

/* A sequence's next round. tail: its unjudged candidates; any_tails: some sequence of the batch
 * has one (then nobody's target waits); most: the window that the batch's budget of rows leaves;
 * limit: tokens the sequence may still get, >= 1. */
struct round_plan spec_policy_round(const struct spec_policy *policy, const struct spec_wish *wish,
                                    int tail, bool any_tails, int most, int limit);
