/* What the links between ranks do: a self-test at start-up that times messages between every
 * ordered pair of ranks, one pair at a time, medians of several rounds. Where all-gathers are only enqueued
 * (comm_recordable_bytes) it is they that are timed, of all ranks at once, and every link gets the result.
 * Feeds the planner. */
#pragma once
#include "worker/comm/comm.h"

/* From one rank to another, as a send and its receive see it, or of an all-gather. */
struct comm_link {
    int64_t latency_ns;      /* of 8 bytes: half of a round trip, or the whole all-gather */
    double bytes_per_second; /* of a long message, its latency taken off */
};

struct comm_links_options {
    struct comm *comm;    /* the group that is timed */
    struct comm *control; /* the same ranks over host memory, for results; may be `comm` */
    void *buffer;         /* [bytes] of comm's memory, [(1 + size) * bytes] for all-gathers; overwritten */
    size_t bytes;         /* of a long message, >= 8: long enough that latency does not count */
    int64_t budget_ns;    /* no round is begun that would probably end later; one is made anyhow */
};

/* Collective. out[size * size] at rank 0 (elsewhere ignored, may be NULL): out[from * size + to],
 * zeros where from == to. Fails as the groups do. */
enum status comm_links_measure(struct comm_link *out, const struct comm_links_options *options,
                               struct error *err);

/* The slowest latency and bandwidth among the links of `size` ranks; zeros for one rank. */
struct comm_link comm_links_slowest(const struct comm_link *links, int size);

/* Of n samples, which it sorts: round trips of 8 bytes, and of `bytes` there with 8 back. Pure. */
struct comm_link comm_links_summary(int64_t *short_ns, int64_t *long_ns, int n, size_t bytes);
