#include "worker/comm/comm_nccl.h"

#include <nccl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "worker/comm/comm_device_module.h"
#include "worker/comm/comm_internal.h"

struct nccl {
    struct comm head;
    struct comm *bootstrap;
    cudaStream_t stream;
    cudaEvent_t event;
    char *marks; /* device, [size]: what a barrier gathers */
    int64_t deadline_ns;
    char name[32];
    char doing[64];        /* the last call, for messages */
    uint64_t n_calls;
    pthread_mutex_t mutex; /* guards what follows, and calls of NCCL: comm_abort is any thread's */
    ncclComm_t comm;       /* NULL: the group is dead, or not yet born */
    struct error death;
};

/* --- death ------------------------------------------------------------------------------------ */

/* Ends this rank's side, with the mutex held; the first reason stays. */
static void die_locked(struct nccl *c, enum status status, const char *reason) {
    if (c->death.status != STATUS_OK) return;
    error_set(&c->death, status, "%s group, rank %d of %d: %s", c->name, c->head.rank, c->head.size,
              reason);
    if (c->comm != NULL) ncclCommAbort(c->comm);
    c->comm = NULL;
}

static enum status dead_locked(const struct nccl *c, struct error *err) {
    return error_set(err, c->death.status, "%s", c->death.text);
}

static enum status die(struct nccl *c, const char *reason, struct error *err) {
    pthread_mutex_lock(&c->mutex);
    die_locked(c, STATUS_UNAVAILABLE, reason);
    enum status status = dead_locked(c, err);
    pthread_mutex_unlock(&c->mutex);
    return status;
}

static void die_of_nccl_locked(struct nccl *c, ncclResult_t code) {
    char reason[400];
    const char *more = ncclGetLastError(c->comm);
    snprintf(reason, sizeof reason, "%s failed: NCCL: %s%s%s", c->doing, ncclGetErrorString(code),
             more != NULL && more[0] != '\0' ? ": " : "", more != NULL ? more : "");
    die_locked(c, STATUS_UNAVAILABLE, reason);
}

static enum status die_of_cuda(struct nccl *c, cudaError_t code, struct error *err) {
    char reason[400];
    snprintf(reason, sizeof reason, "%s failed: CUDA: %s", c->doing, cudaGetErrorString(code));
    return die(c, reason, err);
}

/* --- waiting ---------------------------------------------------------------------------------- */

/* Looks once; *busy: NCCL is still at the last call, or at the start. */
static enum status look_at_nccl(struct nccl *c, bool *busy, struct error *err) {
    enum status status = STATUS_OK;
    pthread_mutex_lock(&c->mutex);
    ncclResult_t state = ncclSuccess;
    if (c->death.status == STATUS_OK) {
        ncclResult_t code = ncclCommGetAsyncError(c->comm, &state);
        if (code != ncclSuccess) state = code;
        if (state != ncclSuccess && state != ncclInProgress) die_of_nccl_locked(c, state);
    }
    if (c->death.status != STATUS_OK) status = dead_locked(c, err);
    pthread_mutex_unlock(&c->mutex);
    *busy = state == ncclInProgress;
    return status;
}

/* *busy: the stream has not yet come to the event. The event is looked at first: an abort lets the
 * stream go on, as if all were done. */
static enum status look_at_event(struct nccl *c, bool *busy, struct error *err) {
    cudaError_t code = cudaEventQuery(c->event);
    TRY(look_at_nccl(c, busy, err));
    if (code != cudaSuccess && code != cudaErrorNotReady) return die_of_cuda(c, code, err);
    *busy = code == cudaErrorNotReady;
    return STATUS_OK;
}

static enum status check_bootstrap(struct nccl *c, struct error *err) {
    struct error why;
    if (comm_check(c->bootstrap, &why) == STATUS_OK) return STATUS_OK;
    pthread_mutex_lock(&c->mutex);
    die_locked(c, why.status, why.text);
    enum status status = dead_locked(c, err);
    pthread_mutex_unlock(&c->mutex);
    return status;
}

static enum status die_of_age(struct nccl *c, int64_t waited_ns, struct error *err) {
    char reason[300];
    snprintf(reason, sizeof reason,
             "waited %.1f s for %s (call %llu) and gave up; another rank is stuck or lost",
             (double)waited_ns / 1e9, c->doing, (unsigned long long)c->n_calls);
    return die(c, reason, err);
}

typedef enum status (*look_fn)(struct nccl *, bool *busy, struct error *);

/* Until `look` finds nothing busy any more. The clock is read once spinning and yielding, some
 * milliseconds at most, did not help. */
static enum status await(struct nccl *c, look_fn look, struct error *err) {
    enum { PAUSE_NS = 20 * 1000, MAX_PAUSE_NS = 500 * 1000 };
    struct comm_wait wait = {.crowded = false};
    int64_t since_ns = 0, pause_ns = PAUSE_NS;
    for (;;) {
        bool busy;
        TRY(look(c, &busy, err));
        if (!busy) return STATUS_OK;
        if (comm_wait_turn(&wait)) continue;
        TRY(check_bootstrap(c, err));
        int64_t now_ns = clock_now_ns();
        if (since_ns == 0) since_ns = now_ns;
        if (now_ns - since_ns > c->deadline_ns) return die_of_age(c, now_ns - since_ns, err);
        clock_sleep_ns(pause_ns);
        if (pause_ns < MAX_PAUSE_NS) pause_ns += pause_ns / 8;
    }
}

static enum status nccl_complete(struct comm *head, struct error *err) {
    struct nccl *c = (struct nccl *)head;
    bool busy;
    TRY(look_at_nccl(c, &busy, err));
    cudaError_t code = cudaEventRecord(c->event, c->stream);
    if (code != cudaSuccess) return die_of_cuda(c, code, err);
    return await(c, look_at_event, err);
}

/* --- calls ------------------------------------------------------------------------------------ */

/* Before calls of NCCL: takes the mutex, unless the group is dead. */
static enum status begin(struct nccl *c, const char *what, size_t bytes, struct error *err) {
    pthread_mutex_lock(&c->mutex);
    if (c->death.status == STATUS_OK) {
        c->n_calls++;
        snprintf(c->doing, sizeof c->doing, "%s of %zu bytes", what, bytes);
        return STATUS_OK;
    }
    enum status status = dead_locked(c, err);
    pthread_mutex_unlock(&c->mutex);
    return status;
}

/* Behind them, with what they said: gives the mutex back and waits until the stream has them. */
static enum status end(struct nccl *c, ncclResult_t code, struct error *err) {
    enum status status = STATUS_OK;
    if (code != ncclSuccess && code != ncclInProgress) {
        die_of_nccl_locked(c, code);
        status = dead_locked(c, err);
    }
    pthread_mutex_unlock(&c->mutex);
    return code == ncclInProgress ? await(c, look_at_nccl, err) : status;
}

static enum status nccl_broadcast(struct comm *head, void *buffer, size_t bytes, int root,
                                  struct error *err) {
    struct nccl *c = (struct nccl *)head;
    TRY(begin(c, "broadcast", bytes, err));
    ncclResult_t code = ncclSuccess;
    if (bytes > 0) {
        code = ncclBroadcast(buffer, buffer, bytes, ncclUint8, root, c->comm, c->stream);
    }
    return end(c, code, err);
}

static enum status barrier(struct nccl *c, struct error *err) {
    TRY(begin(c, "barrier", 0, err));
    ncclResult_t code =
        ncclAllGather(c->marks + c->head.rank, c->marks, 1, ncclUint8, c->comm, c->stream);
    TRY(end(c, code, err));
    return nccl_complete(&c->head, err);
}

static enum status nccl_all_gather(struct comm *head, void *recv, const void *send, size_t bytes,
                                   struct error *err) {
    struct nccl *c = (struct nccl *)head;
    if (bytes == 0) return barrier(c, err);
    TRY(begin(c, "all-gather", bytes, err));
    return end(c, ncclAllGather(send, recv, bytes, ncclUint8, c->comm, c->stream), err);
}

/* Root's part of a gather: receives everybody's, one group of calls. */
static ncclResult_t receive_parts(struct nccl *c, char *recv, const size_t *bytes_of_rank) {
    ncclResult_t code = ncclGroupStart();
    for (int i = 0; i < c->head.size && code == ncclSuccess; recv += bytes_of_rank[i++]) {
        if (i == c->head.rank || bytes_of_rank[i] == 0) continue;
        code = ncclRecv(recv, bytes_of_rank[i], ncclUint8, i, c->comm, c->stream);
        if (code == ncclInProgress) code = ncclSuccess;
    }
    ncclResult_t ended = ncclGroupEnd();
    return code != ncclSuccess ? code : ended;
}

static enum status copy_own_part(struct nccl *c, char *recv, const char *send,
                                 const size_t *bytes_of_rank, struct error *err) {
    for (int i = 0; i < c->head.rank; i++) recv += bytes_of_rank[i];
    size_t bytes = bytes_of_rank[c->head.rank];
    if (recv == send || bytes == 0) return STATUS_OK;
    cudaError_t code = cudaMemcpyAsync(recv, send, bytes, cudaMemcpyDeviceToDevice, c->stream);
    return code == cudaSuccess ? STATUS_OK : die_of_cuda(c, code, err);
}

static enum status nccl_gather(struct comm *head, void *recv, const void *send,
                               const size_t *bytes_of_rank, int root, struct error *err) {
    struct nccl *c = (struct nccl *)head;
    size_t bytes = bytes_of_rank[head->rank];
    TRY(begin(c, "gather", bytes, err));
    ncclResult_t code = ncclSuccess;
    if (head->rank == root) {
        code = receive_parts(c, recv, bytes_of_rank);
    } else if (bytes > 0) {
        code = ncclSend(send, bytes, ncclUint8, root, c->comm, c->stream);
    }
    TRY(end(c, code, err));
    return head->rank == root ? copy_own_part(c, recv, send, bytes_of_rank, err) : STATUS_OK;
}

static enum status nccl_send(struct comm *head, const void *buffer, size_t bytes, int to,
                             struct error *err) {
    struct nccl *c = (struct nccl *)head;
    TRY(begin(c, "send", bytes, err));
    ncclResult_t code = ncclSuccess;
    if (bytes > 0) code = ncclSend(buffer, bytes, ncclUint8, to, c->comm, c->stream);
    return end(c, code, err);
}

static enum status nccl_recv(struct comm *head, void *buffer, size_t bytes, int from,
                             struct error *err) {
    struct nccl *c = (struct nccl *)head;
    TRY(begin(c, "receive", bytes, err));
    ncclResult_t code = ncclSuccess;
    if (bytes > 0) code = ncclRecv(buffer, bytes, ncclUint8, from, c->comm, c->stream);
    return end(c, code, err);
}

/* --- ends ------------------------------------------------------------------------------------- */

static enum status nccl_check(struct comm *head, struct error *err) {
    struct nccl *c = (struct nccl *)head;
    bool busy;
    TRY(look_at_nccl(c, &busy, err));
    return check_bootstrap(c, err);
}

static void nccl_abort(struct comm *head, const char *reason) {
    struct nccl *c = (struct nccl *)head;
    char words[400];
    snprintf(words, sizeof words, "the group was ended: %s", reason);
    pthread_mutex_lock(&c->mutex);
    die_locked(c, STATUS_ABORTED, words);
    pthread_mutex_unlock(&c->mutex);
    comm_abort(c->bootstrap, reason);
}

/* Leaves in good order while the group lives: others may be at a call that needs this side. */
static void leave(struct nccl *c) {
    struct error err;
    if (begin(c, "leaving the group", 0, &err) != STATUS_OK) return;
    if (end(c, ncclCommFinalize(c->comm), &err) != STATUS_OK) return;
    pthread_mutex_lock(&c->mutex);
    if (c->comm != NULL) ncclCommDestroy(c->comm);
    c->comm = NULL;
    pthread_mutex_unlock(&c->mutex);
}

static void nccl_destroy(struct comm *head) {
    struct nccl *c = (struct nccl *)head;
    if (c->comm != NULL) leave(c);
    if (c->event != NULL) cudaEventDestroy(c->event);
    if (c->marks != NULL) cudaFree(c->marks);
    pthread_mutex_destroy(&c->mutex);
    free(c);
}

static const struct comm_ops nccl_ops = {
    .broadcast = nccl_broadcast,
    .all_gather = nccl_all_gather,
    .gather = nccl_gather,
    .send = nccl_send,
    .recv = nccl_recv,
    .complete = nccl_complete,
    .check = nccl_check,
    .abort = nccl_abort,
    .destroy = nccl_destroy,
};

/* --- start ------------------------------------------------------------------------------------ */

/* Rank 0's id for everybody, or why there is none. */
struct invitation {
    int32_t code; /* ncclResult_t */
    ncclUniqueId id;
};

static enum status get_invitation(struct nccl *c, ncclUniqueId *id, struct error *err) {
    struct invitation invitation = {0};
    if (c->head.rank == 0) invitation.code = (int32_t)ncclGetUniqueId(&invitation.id);
    TRY(comm_broadcast(c->bootstrap, &invitation, sizeof invitation, 0, err));
    *id = invitation.id;
    if (invitation.code == ncclSuccess) return STATUS_OK;
    return error_set(err, STATUS_UNAVAILABLE, "%s group, rank 0 of %d has no id to share: NCCL: %s",
                     c->name, c->head.size, ncclGetErrorString((ncclResult_t)invitation.code));
}

static enum status open_device(struct nccl *c, int device, struct error *err) {
    snprintf(c->doing, sizeof c->doing, "opening device %d", device);
    cudaError_t code = cudaSetDevice(device);
    if (code == cudaSuccess) code = cudaEventCreateWithFlags(&c->event, cudaEventDisableTiming);
    if (code != cudaSuccess) return die_of_cuda(c, code, err);
    code = cudaMalloc((void **)&c->marks, (size_t)c->head.size);
    if (code == cudaSuccess) return STATUS_OK;
    return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                     "%s group, rank %d of %d: no %d bytes of device memory: CUDA: %s", c->name,
                     c->head.rank, c->head.size, c->head.size, cudaGetErrorString(code));
}

static enum status meet(struct nccl *c, ncclUniqueId id, struct error *err) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    config.commName = c->name;
    TRY(begin(c, "meeting the others, for an id", sizeof id, err));
    ncclResult_t code = ncclCommInitRankConfig(&c->comm, c->head.size, id, c->head.rank, &config);
    TRY(end(c, code, err));
    snprintf(c->doing, sizeof c->doing, "what came before the first call");
    return STATUS_OK;
}

enum status comm_nccl_create(struct comm **out, struct comm *bootstrap, void *stream,
                             const struct comm_nccl_options *options, struct error *err) {
    enum status status, opened;
    ncclUniqueId id;
    CHECK(options->deadline_ns > 0);
    struct nccl *c = xcalloc(1, sizeof *c);
    c->head = (struct comm){&nccl_ops, comm_rank(bootstrap), comm_size(bootstrap), 0};
    c->bootstrap = bootstrap;
    c->stream = stream;
    c->deadline_ns = options->deadline_ns;
    snprintf(c->name, sizeof c->name, "%s", options->name);
    pthread_mutex_init(&c->mutex, NULL);
    *out = NULL;
    opened = open_device(c, options->device, err);
    struct error ignored; /* who cannot go on still takes part, so that nobody waits for it here */
    status = get_invitation(c, &id, opened == STATUS_OK ? err : &ignored);
    if (opened != STATUS_OK) status = opened;
    if (status == STATUS_OK) status = meet(c, id, err);
    if (status == STATUS_OK) *out = &c->head;
    else nccl_destroy(&c->head);
    return status;
}

__attribute__((visibility("default"))) const struct comm_device_module tandem_comm_device = {
    .version = COMM_DEVICE_VERSION,
    .comm_bytes = sizeof(struct comm),
    .ops_bytes = sizeof(struct comm_ops),
    .options_bytes = sizeof(struct comm_nccl_options),
    .error_bytes = sizeof(struct error),
    .create = comm_nccl_create,
};
