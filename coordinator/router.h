/* Which replica gets a request. Pure. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct router_load {
    bool serving;
    uint32_t n_requests;     /* submitted and not finished */
    uint32_t max_requests;   /* as many may be submitted */
    uint64_t n_tokens;       /* their prompt tokens and the tokens they made */
};

/* Index of the least loaded serving replica with room: the smallest share of its places taken, then
 * the fewest tokens, then the lowest index. -1: none has room. */
int router_pick(const struct router_load *loads, size_t n_loads);
