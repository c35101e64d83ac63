/* Ranks are threads of this process: tests, benches, one device shared by several ranks. */
#include <stdlib.h>
#include <string.h>

#include "worker/comm/comm_internal.h"

struct crowd {
    struct comm_region *region;
    _Atomic int n_left;
};

static void leave(void *user) {
    struct crowd *crowd = user;
    if (atomic_fetch_sub(&crowd->n_left, 1) != 1) return;
    free(crowd->region);
    free(crowd);
}

enum status comm_threads_create(struct comm **out, int n_ranks, struct error *err) {
    if (n_ranks < 1 || n_ranks > 256) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "%d ranks, expected 1..256", n_ranks);
    }
    size_t bytes = (comm_shared_bytes(n_ranks) + 63) / 64 * 64;
    struct comm_region *region = aligned_alloc(64, bytes);
    if (region == NULL) {
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for %zu bytes of buffers", bytes);
    }
    memset(region, 0, bytes);
    struct crowd *crowd = xcalloc(1, sizeof *crowd);
    crowd->region = region;
    atomic_store(&crowd->n_left, n_ranks);
    for (int i = 0; i < n_ranks; i++) {
        out[i] = comm_shared_create(region, i, n_ranks, false, leave, crowd);
    }
    return STATUS_OK;
}

/* The first member makes all views and hands the others theirs. */
enum status comm_threads_group(struct comm **out, struct comm *world, const int *members,
                               int n_members, struct error *err) {
    if (comm_rank(world) != members[0]) {
        return comm_recv(world, out, sizeof *out, members[0], err);
    }
    struct comm *views[256];
    enum status status = comm_threads_create(views, n_members, err);
    if (status != STATUS_OK) {
        comm_abort(world, err->text); /* the others wait */
        return status;
    }
    for (int i = 1; i < n_members; i++) {
        TRY(comm_send(world, &views[i], sizeof views[i], members[i], err));
    }
    *out = views[0];
    return STATUS_OK;
}
