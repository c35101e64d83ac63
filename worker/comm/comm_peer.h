/* A group of ranks of one process whose tensors lie on one device: small all-gathers go from kernel to
 * kernel through peer-mapped memory (kernels/cuda/gather.cu), enqueued like any op; the rest through the
 * host (comm_staged.h). */
#pragma once
#include "kernels/backend.h"
#include "worker/comm/comm.h"

/* Collective over `host`, a group of threads, which is borrowed with the backend until comm_destroy. What
 * is larger than max_bytes a rank goes through the host. Ranks may end differently: have them tell each
 * other before the group is used. */
enum status comm_peer_create(struct comm **out, struct comm *host, struct backend *backend,
                             size_t max_bytes, struct error *err);
