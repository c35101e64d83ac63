#include "worker/spec/policy.h"

static int least(int a, int b) {
    return a < b ? a : b;
}

enum spec_mode spec_policy_mode(const struct spec_policy *policy, const struct spec_wish *wish) {
    return wish->mode >= 0 ? (enum spec_mode)wish->mode : policy->mode;
}

struct round_plan spec_policy_round(const struct spec_policy *policy, const struct spec_wish *wish,
                                    int tail, bool any_tails, int most, int limit) {
    enum spec_mode mode = spec_policy_mode(policy, wish);
    if (wish->max_window > 0) most = least(most, wish->max_window);
    int window = least(policy->window, most);
    if (mode == SPEC_PLAIN) window = 0;
    if (spec_mode_overlapped(mode)) {
        /* What the target waits for is drafted besides: behind it the draft is a whole window ahead. */
        int wait = any_tails || tail > 0 ? 0 : policy->delay;
        int make = window > 0 ? least(window + wait, least(most, SPEC_MAX_WINDOW)) : 0;
        return round_plan(tail, make, wait, limit);
    }
    /* A serial round leaves no tail; one that an overlapped round left is judged first. */
    if (tail > 0) window = 0;
    return round_plan(tail, window, window, limit);
}
