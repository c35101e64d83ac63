/* A group of ranks of one process whose tensors lie on devices that reach each other's memory, or on one:
 * small all-gathers go from kernel to kernel through peer-mapped memory (kernels/cuda/gather.cu), enqueued
 * like any op; the rest through another group. */
#pragma once
#include "kernels/backend.h"
#include "worker/comm/comm.h"

/* Collective over `host`, a group of threads, which is borrowed with the backend until comm_destroy.
 * `others` (comm_nccl.h, comm_staged.h) carries everything but all-gathers of up to max_bytes a rank, and
 * is owned from here on, after a failure as well. Every rank has found that it reaches all devices
 * (backend_reaches). Ranks may end differently: have them tell each other before the group is used. */
enum status comm_peer_create(struct comm **out, struct comm *host, struct comm *others,
                             struct backend *backend, size_t max_bytes, struct error *err);
