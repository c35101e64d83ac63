/* A group of ranks, each with a device of its own, over NCCL. This file is compiled into the module
 * tandem-nccl.so, never into a program: see comm_device.h for how it is reached.
 *
 * Buffers are device memory. Calls are enqueued on the group's stream and return when NCCL has put
 * them there; comm_complete waits for them. What differs from groups of host memory:
 *   - an all-gather of no bytes (comm_barrier) waits until everybody has come there;
 *   - other calls of no bytes do nothing, and so synchronise nobody;
 *   - ranks that send to each other at once must not count on room underway: one receives first.
 * Bytes are moved, nothing is summed.
 *
 * Communicators are non-blocking, so that every wait has an end. NCCL then launches each call from a
 * thread that it makes for it: tens of microseconds a call, paid once by calls that a graph records.
 *
 * Death: an error of NCCL or the device, or a wait past the deadline, aborts this rank's side and is
 * UNAVAILABLE, with group, rank, what was waited for, how long, and NCCL's words; comm_abort is
 * ABORTED. Every later call repeats the reason at once. Waits also end when the bootstrap group dies,
 * which is how the other ranks learn of comm_abort before their deadline. */
#pragma once
#include <stdint.h>

#include "worker/comm/comm.h"

struct comm_nccl_options {
    const char *name;    /* "target", "draft", "pair": for messages */
    int device;          /* CUDA device of this rank and of the stream, from 0 */
    int64_t deadline_ns; /* > 0: the longest wait of any call, the start included */
};

/* Collective over `bootstrap`, a group of host memory that carries NCCL's id from its rank 0 and is
 * borrowed until the end; rank and size are the same. stream: a cudaStream_t, borrowed as well.
 * UNAVAILABLE: no such device, NCCL's words, or not everybody came before the deadline;
 * RESOURCE_EXHAUSTED: no device memory for a few bytes; the bootstrap group's failures. Ranks may
 * end differently: have them tell each other before the group is used. */
enum status comm_nccl_create(struct comm **out, struct comm *bootstrap, void *stream,
                             const struct comm_nccl_options *options, struct error *err);
