/* The queue in front of the replicas: first come, first served, bounded by requests and by prompt
 * tokens. Pure: time and rates are arguments.
 *
 * Place: the coordinator's thread; after validation and tokenizing, before the router. A request is
 * an entry embedded in its owner; the queue never allocates. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/error.h"

struct admission_limits {
    uint32_t max_requests;      /* waiting at once */
    uint64_t max_prompt_tokens; /* of all waiting requests together */
};

struct admission_entry {
    struct admission_entry *previous, *next;
    uint32_t prompt_tokens;
    int64_t deadline_ns; /* 0: none */
};

struct admission {
    struct admission_limits limits;
    struct admission_entry *first, *last;
    uint32_t n_requests;
    uint64_t n_prompt_tokens;
};

void admission_init(struct admission *admission, const struct admission_limits *limits);

/* Puts the entry at the end. RESOURCE_EXHAUSTED when the queue is full, with the numbers, and
 * *retry_after_ms (100 .. 30 000) when it makes sense to come back; `finished_per_second` is how fast
 * requests end lately (0: not known). A prompt larger than the whole token bound is let in when
 * nothing else waits, so that it can run at all. */
enum status admission_enter(struct admission *admission, struct admission_entry *entry,
                            double finished_per_second, int64_t *retry_after_ms, struct error *err);

/* The oldest entry, NULL when empty; it stays. */
struct admission_entry *admission_first(const struct admission *admission);

/* Takes the entry out, from anywhere in the queue. */
void admission_leave(struct admission *admission, struct admission_entry *entry);

/* The first entry whose deadline has passed, NULL: none. It stays. */
struct admission_entry *admission_expired(const struct admission *admission, int64_t now_ns);
