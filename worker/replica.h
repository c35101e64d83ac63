/* The life of one replica: ranks that come up without a role, tell the coordinator what they have,
 * are given roles and shards, read only then the checkpoint, and serve until stopped.
 *
 * Rank 0 leads: it alone speaks with the coordinator (link.h), schedules and decides
 * (step_loop.h). The others do what rank.h says: follow its steps, or draft. A failure on one rank
 * ends all of them with the reason. */
#pragma once
#include <stdint.h>

#include "common/error.h"
#include "kernels/backend.h"
#include "worker/comm/comm.h"

struct replica_options {
    const char *coordinator; /* "host:port" */
    const char *id;          /* names the replica at the coordinator */
    const char *device;      /* see device.h */
    enum backend_isa isa;    /* the CPU's */
    int n_threads;           /* compute threads of each rank */
    /* How subgroups of the world are made: comm_mpi_group or comm_threads_group. */
    enum status (*make_group)(struct comm **out, struct comm *world, const int *members,
                              int n_members, struct error *err);
    int64_t patience_ns;     /* how long to wait for the coordinator */
    const char *trace_file;  /* written by rank 0 when the replica is stopped; NULL: none */
};

/* Collective over `world`. Returns OK when the coordinator stopped the replica; otherwise why it
 * ended, the same words on every rank that is still there. */
enum status replica_run(const struct replica_options *options, struct comm *world,
                        struct error *err);
