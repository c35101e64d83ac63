#include "coordinator/admission.h"

#include <inttypes.h>
#include <stdbool.h>

void admission_init(struct admission *admission, const struct admission_limits *limits) {
    *admission = (struct admission){.limits = *limits};
}

/* When a place should be free: the time that one request in the queue takes to leave it. */
static int64_t retry_after(const struct admission *admission, double finished_per_second) {
    if (finished_per_second <= 0) return 1000;
    double ms = 1000.0 * ((double)admission->n_requests / 2 + 1) / finished_per_second;
    return ms < 100 ? 100 : ms > 30000 ? 30000 : (int64_t)ms;
}

enum status admission_enter(struct admission *admission, struct admission_entry *entry,
                            double finished_per_second, int64_t *retry_after_ms, struct error *err) {
    const struct admission_limits *limits = &admission->limits;
    uint64_t tokens = admission->n_prompt_tokens + entry->prompt_tokens;
    bool no_place = admission->n_requests >= limits->max_requests;
    bool no_tokens = admission->n_requests > 0 && tokens > limits->max_prompt_tokens;
    if (no_place || no_tokens) {
        *retry_after_ms = retry_after(admission, finished_per_second);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                         "the queue is full: %" PRIu32 " requests of at most %" PRIu32 " and %" PRIu64
                         " prompt tokens of at most %" PRIu64 " wait, this one has %" PRIu32
                         "; try again in %" PRId64 " ms",
                         admission->n_requests, limits->max_requests, admission->n_prompt_tokens,
                         limits->max_prompt_tokens, entry->prompt_tokens, *retry_after_ms);
    }
    entry->previous = admission->last;
    entry->next = NULL;
    if (admission->last != NULL) admission->last->next = entry;
    else admission->first = entry;
    admission->last = entry;
    admission->n_requests++;
    admission->n_prompt_tokens = tokens;
    return STATUS_OK;
}

struct admission_entry *admission_first(const struct admission *admission) {
    return admission->first;
}

void admission_leave(struct admission *admission, struct admission_entry *entry) {
    if (entry->previous != NULL) entry->previous->next = entry->next;
    else admission->first = entry->next;
    if (entry->next != NULL) entry->next->previous = entry->previous;
    else admission->last = entry->previous;
    entry->previous = entry->next = NULL;
    CHECK(admission->n_requests > 0);
    admission->n_requests--;
    admission->n_prompt_tokens -= entry->prompt_tokens;
}

struct admission_entry *admission_expired(const struct admission *admission, int64_t now_ns) {
    struct admission_entry *entry = admission->first;
    while (entry != NULL && (entry->deadline_ns == 0 || entry->deadline_ns > now_ns)) {
        entry = entry->next;
    }
    return entry;
}
