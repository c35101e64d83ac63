#include "worker/comm/comm_staged.h"

#include <stdlib.h>

#include "worker/comm/comm_internal.h"

struct staged {
    struct comm head;
    struct comm *host;
    struct backend *backend;
    char *mine, *all; /* host twins of what is sent and received */
    size_t mine_bytes, all_bytes;
};

static char *room(char **buffer, size_t *have, size_t bytes) {
    if (bytes > *have) {
        *buffer = xrealloc(*buffer, bytes);
        *have = bytes;
    }
    return *buffer;
}

static char *mine(struct staged *s, size_t bytes) {
    return room(&s->mine, &s->mine_bytes, bytes);
}

static char *all(struct staged *s, size_t bytes) {
    return room(&s->all, &s->all_bytes, bytes);
}

static enum status broadcast(struct comm *comm, void *buffer, size_t bytes, int root,
                             struct error *err) {
    struct staged *s = (struct staged *)comm;
    char *host = mine(s, bytes);
    if (comm->rank == root) TRY(backend_copy_out(s->backend, host, buffer, bytes, err));
    TRY(comm_broadcast(s->host, host, bytes, root, err));
    if (comm->rank != root) backend_copy_in(s->backend, buffer, host, bytes);
    return STATUS_OK;
}

static enum status all_gather(struct comm *comm, void *recv, const void *send, size_t bytes,
                              struct error *err) {
    struct staged *s = (struct staged *)comm;
    size_t total = bytes * (size_t)comm->size;
    char *from = mine(s, bytes), *to = all(s, total);
    TRY(backend_copy_out(s->backend, from, send, bytes, err));
    TRY(comm_all_gather(s->host, to, from, bytes, err));
    backend_copy_in(s->backend, recv, to, total);
    return STATUS_OK;
}

static enum status gather(struct comm *comm, void *recv, const void *send,
                          const size_t *bytes_of_rank, int root, struct error *err) {
    struct staged *s = (struct staged *)comm;
    size_t bytes = bytes_of_rank[comm->rank], total = 0;
    for (int i = 0; i < comm->size; i++) total += bytes_of_rank[i];
    char *from = mine(s, bytes), *to = comm->rank == root ? all(s, total) : NULL;
    TRY(backend_copy_out(s->backend, from, send, bytes, err));
    TRY(comm_gather(s->host, to, from, bytes_of_rank, root, err));
    if (comm->rank == root) backend_copy_in(s->backend, recv, to, total);
    return STATUS_OK;
}

static enum status send_to(struct comm *comm, const void *buffer, size_t bytes, int to,
                           struct error *err) {
    struct staged *s = (struct staged *)comm;
    char *host = mine(s, bytes);
    TRY(backend_copy_out(s->backend, host, buffer, bytes, err));
    return comm_send(s->host, host, bytes, to, err);
}

static enum status recv_from(struct comm *comm, void *buffer, size_t bytes, int from,
                             struct error *err) {
    struct staged *s = (struct staged *)comm;
    char *host = all(s, bytes);
    TRY(comm_recv(s->host, host, bytes, from, err));
    backend_copy_in(s->backend, buffer, host, bytes);
    return STATUS_OK;
}

static enum status check_host(struct comm *comm, struct error *err) {
    return comm_check(((struct staged *)comm)->host, err);
}

static void abort_host(struct comm *comm, const char *reason) {
    comm_abort(((struct staged *)comm)->host, reason);
}

static void destroy(struct comm *comm) {
    struct staged *s = (struct staged *)comm;
    free(s->mine);
    free(s->all);
    free(s);
}

struct comm *comm_staged_create(struct comm *host, struct backend *backend) {
    static const struct comm_ops ops = {
        .broadcast = broadcast,
        .all_gather = all_gather,
        .gather = gather,
        .send = send_to,
        .recv = recv_from,
        .check = check_host,
        .abort = abort_host,
        .destroy = destroy,
    };
    struct staged *s = xcalloc(1, sizeof *s);
    s->head = (struct comm){.ops = &ops, .rank = comm_rank(host), .size = comm_size(host)};
    s->host = host;
    s->backend = backend;
    return &s->head;
}
