#include "worker/comm/comm.h"

#include "worker/comm/comm_internal.h"

int comm_rank(const struct comm *comm) {
    return comm->rank;
}

int comm_size(const struct comm *comm) {
    return comm->size;
}

size_t comm_recordable_bytes(const struct comm *comm) {
    return comm->recordable_bytes;
}

enum status comm_broadcast(struct comm *comm, void *buffer, size_t bytes, int root,
                           struct error *err) {
    CHECK(root >= 0 && root < comm->size);
    return comm->ops->broadcast(comm, buffer, bytes, root, err);
}

enum status comm_all_gather(struct comm *comm, void *recv, const void *send, size_t bytes,
                            struct error *err) {
    return comm->ops->all_gather(comm, recv, send, bytes, err);
}

enum status comm_gather(struct comm *comm, void *recv, const void *send,
                        const size_t *bytes_of_rank, int root, struct error *err) {
    CHECK(root >= 0 && root < comm->size);
    return comm->ops->gather(comm, recv, send, bytes_of_rank, root, err);
}

enum status comm_barrier(struct comm *comm, struct error *err) {
    return comm->ops->all_gather(comm, NULL, NULL, 0, err);
}

enum status comm_send(struct comm *comm, const void *buffer, size_t bytes, int to,
                      struct error *err) {
    CHECK(to >= 0 && to < comm->size && to != comm->rank);
    return comm->ops->send(comm, buffer, bytes, to, err);
}

enum status comm_recv(struct comm *comm, void *buffer, size_t bytes, int from, struct error *err) {
    CHECK(from >= 0 && from < comm->size && from != comm->rank);
    return comm->ops->recv(comm, buffer, bytes, from, err);
}

enum status comm_complete(struct comm *comm, struct error *err) {
    return comm->ops->complete == NULL ? STATUS_OK : comm->ops->complete(comm, err);
}

enum status comm_check(struct comm *comm, struct error *err) {
    return comm->ops->check(comm, err);
}

void comm_abort(struct comm *comm, const char *reason) {
    comm->ops->abort(comm, reason);
}

void comm_destroy(struct comm *comm) {
    if (comm != NULL) comm->ops->destroy(comm);
}
