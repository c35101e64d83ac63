#include "worker/comm/comm_peer.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "worker/comm/comm_internal.h"

struct peer {
    struct comm head;
    struct comm *host, *others;
    struct inbox *inbox;
    bool waits_for_others; /* they have something underway */
    bool failed;
    struct peer *next; /* of those kept */
};

/* Whose exchange failed: a rank that comes late may still write into their inboxes, so they stay until the
 * process ends, which it does after such a failure. */
static struct peer *_Atomic kept;

static struct peer *self(struct comm *comm) {
    return (struct peer *)comm;
}

static struct comm *through_others(struct comm *comm) {
    self(comm)->waits_for_others = true;
    return self(comm)->others;
}

static enum status broadcast(struct comm *comm, void *buffer, size_t bytes, int root,
                             struct error *err) {
    return comm_broadcast(through_others(comm), buffer, bytes, root, err);
}

static enum status all_gather(struct comm *comm, void *recv, const void *send, size_t bytes,
                              struct error *err) {
    struct peer *p = self(comm);
    if (bytes == 0 || bytes % 4 != 0 || bytes > comm->recordable_bytes) {
        return comm_all_gather(through_others(comm), recv, send, bytes, err);
    }
    backend_inbox_gather(p->inbox, recv, send, bytes);
    return STATUS_OK;
}

static void abort_all(struct comm *comm, const char *reason) {
    comm_abort(self(comm)->others, reason);
    comm_abort(self(comm)->host, reason);
}

/* What waited in vain ends the group for everybody. */
static enum status look(struct comm *comm, struct error *err) {
    struct peer *p = self(comm);
    enum status status = backend_inbox_check(p->inbox, err);
    if (status == STATUS_OK) return STATUS_OK;
    p->failed = true;
    abort_all(comm, err->text);
    return status;
}

/* A rank that waited in vain has computed with what it had: root must not get that. */
static enum status gather(struct comm *comm, void *recv, const void *send,
                          const size_t *bytes_of_rank, int root, struct error *err) {
    TRY(look(comm, err));
    return comm_gather(through_others(comm), recv, send, bytes_of_rank, root, err);
}

static enum status send_to(struct comm *comm, const void *buffer, size_t bytes, int to,
                           struct error *err) {
    return comm_send(through_others(comm), buffer, bytes, to, err);
}

static enum status recv_from(struct comm *comm, void *buffer, size_t bytes, int from,
                             struct error *err) {
    return comm_recv(through_others(comm), buffer, bytes, from, err);
}

static enum status complete(struct comm *comm, struct error *err) {
    struct peer *p = self(comm);
    struct error by_others;
    enum status status = p->waits_for_others ? comm_complete(p->others, &by_others) : STATUS_OK;
    p->waits_for_others = false;
    TRY(look(comm, err)); /* the inbox knows best whom it waited for */
    if (status == STATUS_OK) return STATUS_OK;
    *err = by_others;
    p->failed = true;
    abort_all(comm, err->text);
    return status;
}

static enum status check(struct comm *comm, struct error *err) {
    return comm_check(self(comm)->others, err);
}

static void destroy(struct comm *comm) {
    struct peer *p = self(comm);
    comm_destroy(p->others);
    if (p->failed) {
        p->next = atomic_load(&kept);
        while (!atomic_compare_exchange_weak(&kept, &p->next, p)) continue;
        return;
    }
    backend_inbox_free(p->inbox);
    free(p);
}

enum status comm_peer_create(struct comm **out, struct comm *host, struct comm *others,
                             struct backend *backend, size_t max_bytes, struct error *err) {
    static const struct comm_ops ops = {
        .broadcast = broadcast,
        .all_gather = all_gather,
        .gather = gather,
        .send = send_to,
        .recv = recv_from,
        .complete = complete,
        .check = check,
        .abort = abort_all,
        .destroy = destroy,
    };
    struct inbox *inbox = NULL;
    enum status mine = backend_inbox_create(&inbox, backend, comm_rank(host), comm_size(host),
                                            max_bytes, err);
    void *memory = mine == STATUS_OK ? backend_inbox_memory(inbox) : NULL, *memories[256];
    struct error other;
    enum status status = comm_all_gather(host, memories, &memory, sizeof memory, &other);
    for (int i = 0; i < comm_size(host) && status == STATUS_OK && mine == STATUS_OK; i++) {
        if (memories[i] == NULL) {
            status = error_set(&other, STATUS_UNAVAILABLE, "rank %d has no inbox", i);
        }
    }
    if (mine != STATUS_OK || status != STATUS_OK) {
        backend_inbox_free(inbox);
        comm_destroy(others);
        if (mine != STATUS_OK) return mine;
        *err = other;
        return status;
    }
    backend_inbox_connect(inbox, memories);
    struct peer *p = xcalloc(1, sizeof *p);
    p->head = (struct comm){&ops, comm_rank(host), comm_size(host), max_bytes};
    p->host = host;
    p->others = others;
    p->inbox = inbox;
    *out = &p->head;
    return STATUS_OK;
}
