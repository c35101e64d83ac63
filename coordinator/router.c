#include "coordinator/router.h"

/* Compares shares n / max as cross products, exactly. */
static bool is_less_loaded(const struct router_load *a, const struct router_load *b) {
    uint64_t share_a = (uint64_t)a->n_requests * b->max_requests;
    uint64_t share_b = (uint64_t)b->n_requests * a->max_requests;
    if (share_a != share_b) return share_a < share_b;
    return a->n_tokens < b->n_tokens;
}

int router_pick(const struct router_load *loads, size_t n_loads) {
    int best = -1;
    for (size_t i = 0; i < n_loads; i++) {
        if (!loads[i].serving || loads[i].n_requests >= loads[i].max_requests) continue;
        if (best < 0 || is_less_loaded(&loads[i], &loads[best])) best = (int)i;
    }
    return best;
}
