#include "worker/comm/comm_tensors.h"

#include <stdlib.h>

#include "worker/comm/comm_device.h"
#include "worker/comm/comm_peer.h"
#include "worker/comm/comm_staged.h"

/* The longest that ranks wait for each other's devices; loading and planning are not among it. */
#define DEVICE_DEADLINE_NS (60LL * 1000000000)

/* 16 rows of a width of 16384: what a graph of decoding or verifying exchanges at a time. */
enum { PEER_MAX_BYTES = 1024 * 1024 };

/* Whether every rank reaches every other's device. */
static enum status find_peers(bool *reached, struct comm *host,
                              const struct comm_tensors_options *options, struct error *err) {
    *reached = options->one_process && comm_size(host) <= BACKEND_MAX_PEERS;
    if (!*reached) return STATUS_OK;
    int *devices = xcalloc((size_t)comm_size(host), sizeof *devices);
    bool *all = xcalloc((size_t)comm_size(host), sizeof *all), mine = true;
    enum status status = comm_all_gather(host, devices, &options->device, sizeof *devices, err);
    for (int i = 0; i < comm_size(host) && status == STATUS_OK; i++) {
        mine = mine && backend_reaches(options->backend, devices[i]);
    }
    if (status == STATUS_OK) status = comm_all_gather(host, all, &mine, sizeof mine, err);
    for (int i = 0; i < comm_size(host); i++) *reached = *reached && all[i];
    free(devices);
    free(all);
    return status;
}

static enum status connect_over_nccl(struct comm **out, struct comm *host,
                                     const struct comm_tensors_options *options,
                                     struct error *err) {
    const struct comm_device_module *module;
    struct comm_nccl_options nccl = {options->name, options->device, DEVICE_DEADLINE_NS};
    TRY(comm_device_open(&module, NULL, err));
    return comm_device_create(out, module, host, backend_stream(options->backend), &nccl, err);
}

enum status comm_tensors_create(struct comm **out, struct comm *host,
                                const struct comm_tensors_options *options, struct error *err) {
    bool peers;
    struct comm *others = NULL;
    *out = NULL;
    if (backend_stream(options->backend) == NULL || comm_size(host) == 1) return STATUS_OK;
    TRY(find_peers(&peers, host, options, err));
    if (options->isa == BACKEND_CUDA && !options->shares_device) {
        TRY(connect_over_nccl(&others, host, options, err));
    } else {
        others = comm_staged_create(host, options->backend);
    }
    if (peers) return comm_peer_create(out, host, others, options->backend, PEER_MAX_BYTES, err);
    *out = others;
    return STATUS_OK;
}
