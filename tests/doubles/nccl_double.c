#include "tests/doubles/nccl_double.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "tests/doubles/nccl_double_streams.h"

struct group {
    struct group *next;
    unsigned long id;
    int size, n_joined, n_alive;
    ncclResult_t failed; /* what everybody's state says from now on */
    ncclComm_t members[NCCL_DOUBLE_MAX_RANKS];
};

struct ncclComm {
    struct group *group;
    int rank;
    int init_polls, launch_polls, n_calls;
    int n_pending; /* tasks on streams */
    bool ready, leaving;
    ncclResult_t failed;
    struct double_task call; /* made, not yet on its stream */
    bool has_call;
    cudaStream_t stream;     /* of the call */
    struct CUstream_st own;  /* with settings.immediate */
    struct double_task *here; /* the head of its stream, when that is this communicator's */
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
struct nccl_double_settings double_settings;
struct nccl_double_counts double_counts;
static struct CUstream_st *streams;
static struct group *groups;
static unsigned long n_ids, n_looks;

void double_lock(void) {
    pthread_mutex_lock(&mutex);
}

void double_unlock(void) {
    pthread_mutex_unlock(&mutex);
}

struct nccl_double_settings nccl_double_usual(void) {
    return (struct nccl_double_settings){
        .launch_polls = 2, .lazy = 3, .init_polls = 3, .silent_rank = -1,
        .init_code_rank = -1, .fail_rank = -1, .refuse_rank = -1,
    };
}

void nccl_double_set(const struct nccl_double_settings *settings) {
    double_lock();
    double_settings = *settings;
    double_counts = (struct nccl_double_counts){0};
    double_unlock();
}

struct nccl_double_counts nccl_double_counts(void) {
    double_lock();
    struct nccl_double_counts counts = double_counts;
    double_unlock();
    return counts;
}

/* --- streams ---------------------------------------------------------------------------------- */

static void link_stream(struct CUstream_st *stream) {
    stream->next = streams;
    streams = stream;
}

static void unlink_stream(struct CUstream_st *stream) {
    struct CUstream_st **at = &streams;
    while (*at != stream) at = &(*at)->next;
    *at = stream->next;
    while (stream->head != NULL) {
        struct double_task *task = stream->head;
        stream->head = task->next;
        free(task);
    }
}

void *nccl_double_stream_create(void) {
    struct CUstream_st *stream = calloc(1, sizeof *stream);
    if (stream == NULL) abort();
    double_lock();
    link_stream(stream);
    double_unlock();
    return stream;
}

void nccl_double_stream_destroy(void *stream) {
    double_lock();
    unlink_stream(stream);
    double_unlock();
    free(stream);
}

void double_push(cudaStream_t stream, const struct double_task *task) {
    struct double_task *copy = malloc(sizeof *copy), **tail = &stream->head;
    if (copy == NULL) abort();
    *copy = *task;
    copy->next = NULL;
    while (*tail != NULL) tail = &(*tail)->next;
    *tail = copy;
    if (copy->comm != NULL) copy->comm->n_pending++;
}

void double_forget_event(cudaEvent_t event) {
    for (struct CUstream_st *stream = streams; stream != NULL; stream = stream->next) {
        for (struct double_task *task = stream->head; task != NULL; task = task->next) {
            if (task->event == event) task->event = NULL;
        }
    }
}

/* --- what runs on them ------------------------------------------------------------------------ */

static void copy_bytes(void *to, const void *from, size_t bytes) {
    if (bytes > 0 && to != from) memmove(to, from, bytes);
}

static bool alike(const struct double_task *a, const struct double_task *b) {
    return a->kind == b->kind && a->bytes == b->bytes && a->root == b->root;
}

/* A collective runs when every member has it at the head of its stream. */
static bool run_collective(struct double_task *task) {
    struct group *group = task->comm->group;
    for (int i = 0; i < group->size; i++) {
        ncclComm_t member = group->members[i];
        if (member == NULL || member->here == NULL || member->here->done) return false;
        if (member->here->kind == DOUBLE_PARTS) return false;
        if (!alike(member->here, task)) group->failed = ncclInvalidArgument;
    }
    if (group->failed != ncclSuccess) return false;
    for (int to = 0; to < group->size; to++) {
        struct double_task *out = group->members[to]->here;
        for (int from = 0; from < group->size; from++) {
            if (task->root >= 0 && from != task->root) continue;
            size_t at = task->root >= 0 ? 0 : (size_t)from * task->bytes;
            copy_bytes((char *)out->to + at, group->members[from]->here->from, task->bytes);
        }
    }
    for (int i = 0; i < group->size; i++) group->members[i]->here->done = true;
    return true;
}

/* A message moves when both sides stand at the heads of their streams. */
static bool move_message(struct group *group, int from, struct double_part *sent, int to) {
    struct double_task *there = group->members[to] == NULL ? NULL : group->members[to]->here;
    if (there == NULL || there->kind != DOUBLE_PARTS || there->done) return false;
    for (int i = 0; i < there->n_parts; i++) {
        struct double_part *part = &there->parts[i];
        if (part->is_send || part->done || part->peer != from) continue;
        if (part->bytes != sent->bytes) group->failed = ncclInvalidArgument;
        if (group->failed != ncclSuccess) return false;
        copy_bytes(part->buffer, sent->buffer, sent->bytes);
        part->done = sent->done = true;
        return true;
    }
    return false;
}

static bool run_parts(struct double_task *task) {
    bool moved = false, all = true;
    for (int i = 0; i < task->n_parts; i++) {
        struct double_part *part = &task->parts[i];
        if (part->is_send && !part->done) {
            moved |= move_message(task->comm->group, task->comm->rank, part, part->peer);
        }
        all &= part->done;
    }
    task->done = all;
    return moved;
}

/* True when something happened. */
static bool run_head(struct CUstream_st *stream) {
    struct double_task *task = stream->head;
    bool moved = false;
    if (task->comm != NULL && !task->done) {
        if (task->comm->rank == double_settings.silent_rank) return false;
        task->comm->here = task;
        moved = task->kind == DOUBLE_PARTS ? run_parts(task) : run_collective(task);
    } else if (task->kind == DOUBLE_COPY) {
        copy_bytes(task->to, task->from, task->bytes);
        task->done = true;
    } else if (task->kind == DOUBLE_EVENT) {
        if (task->event != NULL) task->event->reached = task->number;
        task->done = true;
    }
    if (!task->done) return moved;
    stream->head = task->next;
    if (task->comm != NULL) {
        task->comm->here = NULL;
        task->comm->n_pending--;
    }
    free(task);
    return true;
}

void double_progress(void) {
    if (double_settings.lazy > 0 && ++n_looks % (unsigned long)double_settings.lazy != 0) return;
    for (bool moved = true; moved;) {
        moved = false;
        for (struct CUstream_st *stream = streams; stream != NULL; stream = stream->next) {
            while (stream->head != NULL && run_head(stream)) moved = true;
        }
    }
}

/* --- communicators ---------------------------------------------------------------------------- */

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    double_lock();
    n_ids++;
    memset(id, 0, sizeof *id);
    memcpy(id, &n_ids, sizeof n_ids);
    double_unlock();
    return (ncclResult_t)double_settings.id_code;
}

static struct group *join_group(unsigned long id, int size) {
    struct group *group = groups;
    while (group != NULL && group->id != id) group = group->next;
    if (group != NULL) return group;
    group = calloc(1, sizeof *group);
    if (group == NULL) abort();
    group->id = id;
    group->size = size;
    group->next = groups;
    groups = group;
    return group;
}

static void leave_group(struct group *group, int rank) {
    group->members[rank] = NULL;
    if (--group->n_alive > 0) return;
    struct group **at = &groups;
    while (*at != group) at = &(*at)->next;
    *at = group->next;
    free(group);
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t *config) {
    unsigned long number;
    memcpy(&number, &id, sizeof number);
    *out = NULL;
    if (config->size != sizeof *config || config->blocking != 0) return ncclInvalidArgument;
    if (number == 0 || size > NCCL_DOUBLE_MAX_RANKS) return ncclInvalidArgument;
    double_lock();
    struct group *group = join_group(number, size);
    if (group->size != size || rank >= size || group->members[rank] != NULL) {
        double_unlock();
        return ncclInvalidUsage;
    }
    struct ncclComm *comm = calloc(1, sizeof *comm);
    if (comm == NULL) abort();
    comm->group = group;
    comm->rank = rank;
    comm->init_polls = double_settings.init_polls;
    link_stream(&comm->own);
    group->members[rank] = comm;
    group->n_joined++;
    group->n_alive++;
    double_counts.comms++;
    double_unlock();
    *out = comm;
    return ncclInProgress;
}

static ncclResult_t state_of_birth(ncclComm_t comm) {
    if (comm->group->n_joined < comm->group->size) return ncclInProgress;
    if (comm->init_polls-- > 0) return ncclInProgress;
    int rank = double_settings.init_code_rank;
    if (double_settings.init_code != 0 && (rank < 0 || rank == comm->rank)) {
        return comm->failed = (ncclResult_t)double_settings.init_code;
    }
    comm->ready = true;
    return ncclSuccess;
}

static ncclResult_t state_of(ncclComm_t comm) {
    if (comm->failed != ncclSuccess) return comm->failed;
    if (comm->group->failed != ncclSuccess) return comm->group->failed;
    if (!comm->ready) return state_of_birth(comm);
    if (comm->has_call) {
        if (comm->launch_polls-- > 0) return ncclInProgress;
        double_push(double_settings.immediate ? &comm->own : comm->stream, &comm->call);
        comm->has_call = false;
    }
    double_progress();
    bool waits = double_settings.immediate || comm->leaving;
    return waits && comm->n_pending > 0 ? ncclInProgress : ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *state) {
    double_lock();
    *state = state_of(comm);
    double_unlock();
    return ncclSuccess;
}

/* Off the streams with what is there of it; what stands behind goes on. */
static void end_comm(ncclComm_t comm) {
    for (struct CUstream_st *stream = streams; stream != NULL; stream = stream->next) {
        for (struct double_task *task = stream->head; task != NULL; task = task->next) {
            if (task->comm != comm) continue;
            task->comm = NULL;
            task->done = true;
        }
    }
    unlink_stream(&comm->own);
    leave_group(comm->group, comm->rank);
    free(comm);
    double_counts.comms--;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
    double_lock();
    if (double_settings.abort_is_seen) comm->group->failed = ncclRemoteError;
    end_comm(comm);
    double_counts.aborted++;
    double_unlock();
    return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    double_lock();
    comm->leaving = true;
    double_unlock();
    return ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    double_lock();
    end_comm(comm);
    double_counts.destroyed++;
    double_unlock();
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t code) {
    return code == ncclInvalidArgument  ? "invalid argument"
           : code == ncclInvalidUsage   ? "invalid usage"
           : code == ncclSystemError    ? "unhandled system error"
           : code == ncclInternalError  ? "internal error"
           : code == ncclRemoteError    ? "remote process exited or there was a network error"
                                        : "another error";
}

const char *ncclGetLastError(ncclComm_t comm) {
    (void)comm;
    return "the double was told so";
}

/* --- calls ------------------------------------------------------------------------------------ */

static _Thread_local struct {
    int depth;
    ncclComm_t comm;
    cudaStream_t stream;
    struct double_task task;
} open_group;

static bool strikes(ncclComm_t comm, int code, int rank, int call) {
    return code != 0 && call == comm->n_calls && (rank < 0 || rank == comm->rank);
}

static ncclResult_t make_call(ncclComm_t comm, cudaStream_t stream,
                              const struct double_task *task) {
    const struct nccl_double_settings *s = &double_settings;
    ncclResult_t code = ncclInProgress;
    double_lock();
    comm->n_calls++;
    if (!comm->ready || comm->has_call) {
        code = ncclInvalidUsage;
    } else if (strikes(comm, s->refuse_code, s->refuse_rank, s->refuse_call)) {
        code = (ncclResult_t)s->refuse_code;
    } else if (strikes(comm, s->fail_code, s->fail_rank, s->fail_call)) {
        comm->failed = (ncclResult_t)s->fail_code;
    } else {
        comm->call = *task;
        comm->call.comm = comm;
        comm->has_call = true;
        comm->stream = stream;
        comm->launch_polls = s->launch_polls;
    }
    double_unlock();
    return code;
}

ncclResult_t ncclBroadcast(const void *send, void *recv, size_t count, ncclDataType_t type,
                           int root, ncclComm_t comm, cudaStream_t stream) {
    if (type != ncclUint8 || root < 0 || root >= comm->group->size) return ncclInvalidArgument;
    return make_call(comm, stream,
                     &(struct double_task){.kind = DOUBLE_COLLECTIVE, .to = recv, .from = send,
                                           .bytes = count, .root = root});
}

ncclResult_t ncclAllGather(const void *send, void *recv, size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream) {
    if (type != ncclUint8) return ncclInvalidArgument;
    return make_call(comm, stream,
                     &(struct double_task){.kind = DOUBLE_COLLECTIVE, .to = recv, .from = send,
                                           .bytes = count, .root = -1});
}

static ncclResult_t make_part(struct double_part part, ncclComm_t comm, cudaStream_t stream) {
    struct double_task *task = &open_group.task;
    if (part.peer < 0 || part.peer >= comm->group->size) return ncclInvalidArgument;
    if (open_group.depth == 0) {
        return make_call(comm, stream, &(struct double_task){
                                           .kind = DOUBLE_PARTS, .parts = {part}, .n_parts = 1});
    }
    if (open_group.comm != NULL && open_group.comm != comm) return ncclInvalidUsage;
    open_group.comm = comm;
    open_group.stream = stream;
    task->parts[task->n_parts++] = part;
    return ncclSuccess;
}

ncclResult_t ncclSend(const void *buffer, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
    if (type != ncclUint8) return ncclInvalidArgument;
    struct double_part part = {true, false, (void *)buffer, count, peer};
    return make_part(part, comm, stream);
}

ncclResult_t ncclRecv(void *buffer, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    if (type != ncclUint8) return ncclInvalidArgument;
    struct double_part part = {false, false, buffer, count, peer};
    return make_part(part, comm, stream);
}

ncclResult_t ncclGroupStart(void) {
    open_group.depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void) {
    if (open_group.depth == 0) return ncclInvalidUsage;
    if (--open_group.depth > 0 || open_group.comm == NULL) return ncclSuccess;
    open_group.task.kind = DOUBLE_PARTS;
    ncclResult_t code = make_call(open_group.comm, open_group.stream, &open_group.task);
    memset(&open_group, 0, sizeof open_group);
    return code;
}
