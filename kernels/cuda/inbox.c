/* A rank's inbox: memory that other ranks of the same process write into (gather.cu), on this device or on
 * one whose memory is mapped here. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/gather.h"

/* As long as groups over NCCL wait (worker/comm/comm_tensors.c); tests of the emulator wait to the end. */
#define WAIT_NS (60ull * 1000000000)
#define EMULATED_WAIT_NS (20ull * 1000000000)

struct inbox {
    struct backend_head head;
    struct backend *backend;
    struct gather gather;
    struct gather_state *seen; /* pinned: the state as the host knows it */
};

bool cuda_reaches(struct backend *backend, int device) {
    int reachable = 0, own = backend->options.device;
    if (device == own) return true;
    cudaError_t error = cudaSetDevice(own); /* access is the current device's */
    if (error == cudaSuccess) error = cudaDeviceCanAccessPeer(&reachable, own, device);
    if (error == cudaSuccess && reachable) error = cudaDeviceEnablePeerAccess(device, 0);
    cudaGetLastError(); /* what is refused here is no failure of the device's */
    return reachable && (error == cudaSuccess || error == cudaErrorPeerAccessAlreadyEnabled);
}

enum status cuda_inbox_create(struct inbox **out, struct backend *backend, int rank, int size,
                              size_t max_bytes, struct error *err) {
    enum status status;
    CHECK(size <= GATHER_MAX_RANKS);
    struct inbox *inbox = xcalloc(1, sizeof *inbox);
    size_t bytes = 2 * (size_t)size * max_bytes / 4 * 8;
    inbox->head = backend->head;
    inbox->backend = backend;
    inbox->gather.rank = rank;
    inbox->gather.size = size;
    inbox->gather.max_words = max_bytes / 4;
    inbox->gather.max_ns =
        backend->options.isa == BACKEND_EMULATED ? EMULATED_WAIT_NS : WAIT_NS;
    TRY_OR_FAIL(cuda_take((void **)&inbox->gather.inboxes[rank], bytes, "an inbox", err));
    TRY_OR_FAIL(cuda_take((void **)&inbox->gather.state, sizeof *inbox->gather.state, "an inbox", err));
    cudaMemsetAsync(inbox->gather.inboxes[rank], 0, bytes, backend->stream);
    cudaMemsetAsync(inbox->gather.state, 0, sizeof *inbox->gather.state, backend->stream);
    if (cudaHostAlloc((void **)&inbox->seen, sizeof *inbox->seen, cudaHostAllocDefault) != cudaSuccess) {
        status = error_set(err, STATUS_RESOURCE_EXHAUSTED, "no pinned memory for an inbox");
        goto fail;
    }
    /* Nobody may write before it is cleared. */
    cuda_went_well(backend, cudaStreamSynchronize(backend->stream), "clearing an inbox");
    TRY_OR_FAIL(cuda_failure(backend, err));
    *out = inbox;
    return STATUS_OK;

fail:
    cuda_inbox_free(inbox);
    return status;
}

void cuda_inbox_free(struct inbox *inbox) {
    cudaStreamSynchronize(inbox->backend->stream);
    cudaFree(inbox->gather.inboxes[inbox->gather.rank]);
    cudaFree(inbox->gather.state);
    cudaFreeHost(inbox->seen);
    free(inbox);
}

void *cuda_inbox_memory(const struct inbox *inbox) {
    return inbox->gather.inboxes[inbox->gather.rank];
}

void cuda_inbox_connect(struct inbox *inbox, void *const *memories) {
    for (int i = 0; i < inbox->gather.size; i++) inbox->gather.inboxes[i] = memories[i];
}

void cuda_inbox_gather(struct inbox *inbox, void *recv, const void *send, size_t bytes) {
    struct backend *backend = inbox->backend;
    CHECK(bytes % 4 == 0 && bytes <= 4 * inbox->gather.max_words);
    backend->packed_of = NULL;
    launch_gather(backend->queue, recv, send, bytes, &inbox->gather);
}

enum status cuda_inbox_check(struct inbox *inbox, struct error *err) {
    struct backend *backend = inbox->backend;
    cudaMemcpyAsync(inbox->seen, inbox->gather.state, sizeof *inbox->seen, cudaMemcpyDeviceToHost,
                    backend->stream);
    cuda_went_well(backend, cudaStreamSynchronize(backend->stream), "waiting for an exchange");
    TRY(cuda_failure(backend, err));
    if (inbox->seen->missing == 0) return STATUS_OK;
    return error_set(err, STATUS_UNAVAILABLE,
                     "rank %d of %d waited in vain for rank %u's part of an exchange",
                     inbox->gather.rank, inbox->gather.size, (unsigned)inbox->seen->missing - 1);
}
