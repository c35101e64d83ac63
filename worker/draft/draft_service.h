/* The draft's leader in an overlapped replica: takes orders from the target's leader, drafts,
 * answers, and uses the time until the next order to make fuzzy KV exact. The other end of
 * remote_drafter.c. */
#pragma once
#include "worker/comm/comm.h"
#include "worker/draft/drafter.h"

struct trace;

struct draft_service_options {
    struct comm *pair;       /* rank 1 is this one */
    struct drafter *drafter; /* a model_drafter; borrowed */
    int vocab;               /* entries of a distribution */
    int max_sequences;
    struct trace *trace; /* NULL: none */
};

/* Until the target's leader says stop: OK. ABORTED when both sides are out of step, UNAVAILABLE
 * when ranks are lost. */
enum status draft_service_run(const struct draft_service_options *options, struct error *err);
