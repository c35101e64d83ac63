/* A group of ranks whose tensors lie on devices, over a group of host memory: every call copies to the
 * host, exchanges there, and copies back. For ranks that share a device or have no links between
 * theirs; groups of devices of their own use comm_nccl.h. */
#pragma once
#include "kernels/backend.h"
#include "worker/comm/comm.h"

/* Borrows both until comm_destroy. Calls return when they are done. */
struct comm *comm_staged_create(struct comm *host, struct backend *backend);
