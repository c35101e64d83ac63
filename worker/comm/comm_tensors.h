/* How the tensors of a group of ranks travel: over the group itself where they lie in host memory, else by
 * the best way there is between the ranks' devices. */
#pragma once
#include <stdbool.h>

#include "kernels/backend.h"
#include "worker/comm/comm.h"

struct comm_tensors_options {
    const char *name;    /* of the group, for messages */
    struct backend *backend;
    enum backend_isa isa;
    int device;          /* this rank's, of this process's */
    bool shares_device;  /* some ranks of the group share one */
    bool one_process;    /* all ranks are threads of this process */
};

/* Collective over `host`, which is borrowed with the backend until comm_destroy. *out: NULL where `host`
 * itself carries tensors; else, where the ranks are one process and reach each other's memory, peers
 * (comm_peer.h) for short messages, over NCCL (comm_nccl.h) for the rest, or through the host
 * (comm_staged.h) where ranks share a device. Fails as those do; ranks may end differently: have them tell
 * each other before the group is used. */
enum status comm_tensors_create(struct comm **out, struct comm *host,
                                const struct comm_tensors_options *options, struct error *err);
