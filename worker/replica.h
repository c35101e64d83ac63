/* The life of one replica: ranks that come up without a role, tell the coordinator what they have, are
 * given roles and shards, read only then the checkpoint, and serve until stopped.
 *
 * Rank 0 leads: it alone speaks with the coordinator (link.h), schedules and samples (step_loop.h).
 * The others follow its steps (engine.h). A failure on one rank ends all of them with the reason. */
#pragma once
#include <stdint.h>

#include "common/error.h"
#include "kernels/backend.h"
#include "worker/comm/comm.h"

struct replica_options {
    const char *coordinator; /* "host:port" */
    const char *id;          /* names the replica at the coordinator */
    enum backend_isa isa;
    int n_threads;           /* compute threads of each rank */
    int64_t patience_ns;     /* how long to wait for the coordinator */
};

/* Collective over `world`. Returns OK when the coordinator stopped the replica; otherwise why it
 * ended, the same words on every rank that is still there. */
enum status replica_run(const struct replica_options *options, struct comm *world,
                        struct error *err);
