/* Ranks of an mpirun job. Members that all stand on one host talk through a window of shared
 * memory (comm_shared.c); otherwise every operation is a non-blocking MPI call, polled with
 * back-off, so that an idle rank costs little. One thread per process calls MPI. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "worker/comm/comm_internal.h"
#include "worker/comm/comm_mpi.h"

enum status comm_mpi_init(int *argc, char ***argv, struct error *err) {
    int provided;
    if (MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS) {
        return error_set(err, STATUS_INTERNAL, "MPI did not start; run this under mpirun");
    }
    if (provided < MPI_THREAD_FUNNELED) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "this MPI cannot be used beside other threads (level %d)", provided);
    }
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    return STATUS_OK;
}

void comm_mpi_finalize(void) {
    MPI_Finalize();
}

_Noreturn void comm_mpi_kill_job(int code) {
    MPI_Abort(MPI_COMM_WORLD, code);
    abort();
}

/* --- over the network ------------------------------------------------------------------------- */

struct networked {
    struct comm head;
    MPI_Comm mpi;
    int *counts, *offsets; /* [size], for gather */
    _Atomic int aborted;
};

static enum status failed(int code, const char *what, struct error *err) {
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(code, text, &length);
    return error_set(err, STATUS_UNAVAILABLE, "%s between ranks failed: %s", what, text);
}

static enum status complete(struct networked *c, int started, MPI_Request *request,
                            const char *what, struct error *err) {
    if (started != MPI_SUCCESS) return failed(started, what, err);
    enum { MAX_PAUSE_NS = 2 * 1000 * 1000 };
    struct comm_wait wait = {.crowded = false};
    int64_t pause_ns = 20 * 1000;
    for (;;) {
        int done = 0;
        int code = MPI_Test(request, &done, MPI_STATUS_IGNORE);
        if (code != MPI_SUCCESS) return failed(code, what, err);
        if (done) return STATUS_OK;
        if (atomic_load(&c->aborted)) return error_set(err, STATUS_ABORTED, "the group was ended");
        if (comm_wait_turn(&wait)) continue;
        /* Pauses grow with the time waited: an idle rank costs little, a short wait stays short. */
        clock_sleep_ns(pause_ns);
        if (pause_ns < MAX_PAUSE_NS) pause_ns += pause_ns / 16;
    }
}

static enum status check_size(size_t bytes, struct error *err) {
    if (bytes <= INT32_MAX) return STATUS_OK;
    return error_set(err, STATUS_INVALID_ARGUMENT, "a message of %zu bytes, at most %d are possible",
                     bytes, INT32_MAX);
}

static enum status networked_broadcast(struct comm *head, void *buffer, size_t bytes, int root,
                                       struct error *err) {
    struct networked *c = (struct networked *)head;
    TRY(check_size(bytes, err));
    MPI_Request request;
    int started = MPI_Ibcast(buffer, (int)bytes, MPI_BYTE, root, c->mpi, &request);
    return complete(c, started, &request, "broadcast", err);
}

static enum status networked_all_gather(struct comm *head, void *recv, const void *send,
                                        size_t bytes, struct error *err) {
    struct networked *c = (struct networked *)head;
    TRY(check_size(bytes, err));
    MPI_Request request;
    if (bytes == 0) return complete(c, MPI_Ibarrier(c->mpi, &request), &request, "barrier", err);
    bool in_place = (char *)recv + (size_t)head->rank * bytes == send;
    int started = MPI_Iallgather(in_place ? MPI_IN_PLACE : send, (int)bytes, MPI_BYTE, recv,
                                 (int)bytes, MPI_BYTE, c->mpi, &request);
    return complete(c, started, &request, "all-gather", err);
}

static enum status networked_gather(struct comm *head, void *recv, const void *send,
                                    const size_t *bytes_of_rank, int root, struct error *err) {
    struct networked *c = (struct networked *)head;
    size_t offset = 0;
    for (int i = 0; i < head->size; i++) {
        TRY(check_size(offset + bytes_of_rank[i], err));
        c->counts[i] = (int)bytes_of_rank[i];
        c->offsets[i] = (int)offset;
        offset += bytes_of_rank[i];
    }
    bool in_place = head->rank == root && (char *)recv + c->offsets[root] == send;
    MPI_Request request;
    int started = MPI_Igatherv(in_place ? MPI_IN_PLACE : send, c->counts[head->rank], MPI_BYTE, recv,
                               c->counts, c->offsets, MPI_BYTE, root, c->mpi, &request);
    return complete(c, started, &request, "gather", err);
}

static enum status networked_send(struct comm *head, const void *buffer, size_t bytes, int to,
                                  struct error *err) {
    struct networked *c = (struct networked *)head;
    TRY(check_size(bytes, err));
    MPI_Request request;
    int started = MPI_Isend(buffer, (int)bytes, MPI_BYTE, to, 0, c->mpi, &request);
    return complete(c, started, &request, "send", err);
}

static enum status networked_recv(struct comm *head, void *buffer, size_t bytes, int from,
                                  struct error *err) {
    struct networked *c = (struct networked *)head;
    TRY(check_size(bytes, err));
    MPI_Request request;
    int started = MPI_Irecv(buffer, (int)bytes, MPI_BYTE, from, 0, c->mpi, &request);
    return complete(c, started, &request, "receive", err);
}

/* Other hosts cannot be told without MPI, whose calls may be stuck: the job ends as a whole. */
static void networked_abort(struct comm *head, const char *reason) {
    struct networked *c = (struct networked *)head;
    atomic_store(&c->aborted, 1);
    log_error("ending the job: %s", reason);
    comm_mpi_kill_job(1);
}

static enum status networked_check(struct comm *head, struct error *err) {
    struct networked *c = (struct networked *)head;
    if (atomic_load(&c->aborted)) return error_set(err, STATUS_ABORTED, "the group was ended");
    return STATUS_OK;
}

static void networked_destroy(struct comm *head) {
    struct networked *c = (struct networked *)head;
    MPI_Comm_free(&c->mpi);
    free(c->counts);
    free(c->offsets);
    free(c);
}

static const struct comm_ops networked_ops = {
    .broadcast = networked_broadcast,
    .all_gather = networked_all_gather,
    .gather = networked_gather,
    .send = networked_send,
    .recv = networked_recv,
    .check = networked_check,
    .abort = networked_abort,
    .destroy = networked_destroy,
};

static struct comm *networked_create(MPI_Comm mpi, int rank, int size) {
    struct networked *c = xcalloc(1, sizeof *c);
    c->head = (struct comm){&networked_ops, rank, size, 0};
    c->mpi = mpi;
    c->counts = xcalloc((size_t)size, sizeof *c->counts);
    c->offsets = xcalloc((size_t)size, sizeof *c->offsets);
    return &c->head;
}

/* --- on one host ------------------------------------------------------------------------------ */

struct window {
    MPI_Comm mpi;
    MPI_Win win;
};

static void release_window(void *user) {
    struct window *window = user;
    MPI_Win_free(&window->win);
    MPI_Comm_free(&window->mpi);
    free(window);
}

static enum status shared_window(struct comm **out, MPI_Comm mpi, int rank, int size,
                                 struct error *err) {
    struct window *window = xcalloc(1, sizeof *window);
    window->mpi = mpi;
    char *base;
    /* The whole region in rank 0's part, with room to align it. */
    MPI_Aint bytes = rank == 0 ? (MPI_Aint)comm_shared_bytes(size) + 64 : 0;
    int code = MPI_Win_allocate_shared(bytes, 1, MPI_INFO_NULL, mpi, &base, &window->win);
    if (code != MPI_SUCCESS) return failed(code, "allocating shared memory", err);
    int unit;
    MPI_Win_shared_query(window->win, 0, &bytes, &unit, &base);
    /* Where the region starts in the window must not depend on where a process has mapped it:
     * mappings are page-aligned, so the offset to 64 is the same everywhere. */
    base = (char *)(((uintptr_t)base + 63) / 64 * 64);
    if (rank == 0) memset(base, 0, comm_shared_bytes(size));
    MPI_Barrier(mpi);
    *out = comm_shared_create((struct comm_region *)base, rank, size, true, release_window, window);
    MPI_Barrier(mpi);
    return STATUS_OK;
}

static enum status make(struct comm **out, MPI_Comm mpi, bool may_share, struct error *err) {
    int rank, size, n_here;
    MPI_Comm_rank(mpi, &rank);
    MPI_Comm_size(mpi, &size);
    MPI_Comm here;
    MPI_Comm_split_type(mpi, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here);
    MPI_Comm_size(here, &n_here);
    MPI_Comm_free(&here);
    int all_here = n_here == size;
    MPI_Allreduce(MPI_IN_PLACE, &all_here, 1, MPI_INT, MPI_MIN, mpi);
    if (all_here && may_share) return shared_window(out, mpi, rank, size, err);
    *out = networked_create(mpi, rank, size);
    return STATUS_OK;
}

enum status comm_mpi_world(struct comm **out, struct error *err) {
    MPI_Comm mpi;
    MPI_Comm_dup(MPI_COMM_WORLD, &mpi);
    return make(out, mpi, true, err);
}

enum status comm_mpi_world_networked(struct comm **out, struct error *err) {
    MPI_Comm mpi;
    MPI_Comm_dup(MPI_COMM_WORLD, &mpi);
    return make(out, mpi, false, err);
}

enum status comm_mpi_group(struct comm **out, struct comm *world, const int *members, int n_members,
                           struct error *err) {
    (void)world; /* there is one */
    MPI_Group everybody, group;
    MPI_Comm mpi;
    MPI_Comm_group(MPI_COMM_WORLD, &everybody);
    MPI_Group_incl(everybody, n_members, members, &group);
    int code = MPI_Comm_create_group(MPI_COMM_WORLD, group, 0, &mpi);
    MPI_Group_free(&group);
    MPI_Group_free(&everybody);
    if (code != MPI_SUCCESS) return failed(code, "making a group", err);
    return make(out, mpi, true, err);
}
