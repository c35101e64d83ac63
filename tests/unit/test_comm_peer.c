/* Groups of one process: ranks, each a thread with a stream of its own on one emulated device or on several,
 * exchange through memory that their kernels write into each other's. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "tests/reference/emulated.h"
#include "tests/reference/isas.h"
#include "tests/unit/test.h"
#include "worker/comm/comm_peer.h"
#include "worker/comm/comm_staged.h"
#include "worker/comm/comm_tensors.h"

enum { MAX_RANKS = 8, MAX_BYTES = 8192, ROUNDS = 30 };

struct member {
    struct comm *host;
    int rank, size;
    bool absent; /* sends nothing in the last exchange */
    bool gathers; /* goes on to what one rank collects, without a wait */
    enum status last;
    struct error err;
    int n_wrong;
    pthread_t thread;
};

static uint32_t word_of(int round, int rank, int i) {
    return (uint32_t)round * 1000003u + (uint32_t)rank * 4099u + (uint32_t)i;
}

/* Sizes from one word to more than an inbox holds, without a wait in between; what comes back is
 * looked at in the end. */
static const int sizes[] = {4, 1000, 4096, 8192, 12000};

static void exchange(struct member *m, struct comm *comm, struct backend *backend) {
    enum { WORDS = 12000 / 4 };
    uint32_t *send = backend_alloc(backend, ROUNDS * WORDS * 4);
    uint32_t *recv = backend_alloc(backend, (size_t)ROUNDS * MAX_RANKS * WORDS * 4);
    for (int round = 0; round < ROUNDS; round++) {
        int bytes = sizes[round % 5];
        uint32_t *mine = send + round * WORDS, *all = recv + (size_t)round * MAX_RANKS * WORDS;
        for (int i = 0; i < bytes / 4; i++) mine[i] = word_of(round, m->rank, i);
        if (comm_all_gather(comm, all, mine, (size_t)bytes, &m->err) != STATUS_OK) m->n_wrong++;
    }
    if (comm_complete(comm, &m->err) != STATUS_OK) m->n_wrong++;
    for (int round = 0; round < ROUNDS; round++) {
        int words = sizes[round % 5] / 4;
        const uint32_t *all = recv + (size_t)round * MAX_RANKS * WORDS;
        for (int i = 0; i < m->size * words; i++) {
            m->n_wrong += all[i] != word_of(round, i / words, i % words);
        }
    }
    if (!m->absent) comm_all_gather(comm, recv, send, 64, &m->err);
    size_t parts[MAX_RANKS];
    for (int i = 0; i < m->size; i++) parts[i] = 64;
    m->last = m->absent    ? STATUS_OK
              : m->gathers ? comm_gather(comm, recv, send, parts, 0, &m->err)
                           : comm_complete(comm, &m->err);
    comm_barrier(m->host, &m->err); /* inboxes live until all have waited */
    backend_free(backend, send);
    backend_free(backend, recv);
}

static void *run(void *arg) {
    struct member *m = arg;
    struct backend_options options = {BACKEND_EMULATED, 1, 16, 64, 0};
    struct backend *backend;
    struct comm *comm;
    if (backend_create(&backend, &options, &m->err) != STATUS_OK) abort();
    struct comm *others = comm_staged_create(m->host, backend);
    if (comm_peer_create(&comm, m->host, others, backend, MAX_BYTES, &m->err) != STATUS_OK) abort();
    exchange(m, comm, backend);
    comm_destroy(comm);
    backend_destroy(backend);
    return NULL;
}

static void group_of(int size, int absent, bool gathers, struct member *members) {
    struct comm *hosts[MAX_RANKS];
    struct error err;
    cr_assert_eq(comm_threads_create(hosts, size, &err), STATUS_OK);
    for (int i = 0; i < size; i++) {
        members[i] = (struct member){.host = hosts[i], .rank = i, .size = size, .absent = i == absent,
                                     .gathers = gathers};
        cr_assert_eq(pthread_create(&members[i].thread, NULL, run, &members[i]), 0);
    }
    for (int i = 0; i < size; i++) pthread_join(members[i].thread, NULL);
    for (int i = 0; i < size; i++) comm_destroy(hosts[i]);
}

static void skip_without_device(void) {
    if (!computes_here(BACKEND_EMULATED)) {
        cr_skip_test("the emulated device is not built here (x86-64, no thread sanitizer)");
    }
}

Test(comm_peer, exchanges) {
    skip_without_device();
    struct member members[MAX_RANKS];
    for (int order = 0; order < EMULATION_ORDERS; order++) {
        emulated_set_order(order, 9);
        for (int size = 1; size <= MAX_RANKS; size *= 2) {
            group_of(size, -1, size == 4, members);
            for (int i = 0; i < size; i++) {
                cr_assert_eq(members[i].n_wrong, 0, "order %d, rank %d of %d: %d wrong", order, i, size,
                             members[i].n_wrong);
                cr_assert_eq(members[i].last, STATUS_OK);
            }
        }
    }
}

/* The wait has an end, and says who is missing. */
Test(comm_peer, a_rank_that_does_not_come) {
    skip_without_device();
    struct member members[MAX_RANKS];
    group_of(4, 2, false, members);
    for (int i = 0; i < 4; i++) {
        cr_assert_eq(members[i].n_wrong, 0);
        if (i == 2) continue;
        cr_assert(members[i].last == STATUS_UNAVAILABLE || members[i].last == STATUS_ABORTED);
    }
    cr_assert(strstr(members[0].err.text, "waited in vain for rank 2") != NULL, "%s",
              members[0].err.text);
}

/* What was computed without its part reaches nobody. */
Test(comm_peer, a_rank_that_waited_in_vain_hands_nothing_on) {
    skip_without_device();
    struct member members[MAX_RANKS];
    group_of(4, 2, true, members);
    for (int i = 0; i < 4; i++) {
        if (i == 2) continue;
        cr_assert(members[i].last == STATUS_UNAVAILABLE || members[i].last == STATUS_ABORTED, "rank %d", i);
    }
}

/* --- which way a group's tensors go ------------------------------------------------------------ */

struct way {
    struct comm *host;
    int device;
    bool one_process;
    struct error err;
    enum status status;
    size_t recordable_bytes;
    bool right; /* a short and a long exchange came back as they should */
    pthread_t thread;
};

enum { LONG_WORDS = 512 * 1024 };

static void *find_way(void *arg) {
    struct way *w = arg;
    struct backend_options options = {BACKEND_EMULATED, 1, 16, 64, w->device};
    struct backend *backend;
    struct comm *comm = NULL;
    if (backend_create(&backend, &options, &w->err) != STATUS_OK) abort();
    struct comm_tensors_options tensors = {"target", backend, BACKEND_EMULATED, w->device, false,
                                           w->one_process};
    w->status = comm_tensors_create(&comm, w->host, &tensors, &w->err);
    if (w->status != STATUS_OK) abort();
    w->recordable_bytes = comm_recordable_bytes(comm);
    uint32_t *send = backend_alloc(backend, LONG_WORDS * 4);
    uint32_t *recv = backend_alloc(backend, (size_t)comm_size(comm) * LONG_WORDS * 4);
    w->right = true;
    for (int round = 0; round < 2; round++) {
        int words = round == 0 ? 16 : LONG_WORDS;
        for (int i = 0; i < words; i++) send[i] = word_of(round, comm_rank(comm), i);
        comm_all_gather(comm, recv, send, (size_t)words * 4, &w->err);
        w->status = comm_complete(comm, &w->err);
        for (int i = 0; i < comm_size(comm) * words; i++) {
            w->right = w->right && recv[i] == word_of(round, i / words, i % words);
        }
        comm_barrier(w->host, &w->err);
    }
    backend_free(backend, send);
    backend_free(backend, recv);
    comm_destroy(comm);
    backend_destroy(backend);
    return NULL;
}

/* Ranks on `devices`: whether short messages are peers'. */
static void check_way(const int *devices, int n, bool one_process, bool peers) {
    struct comm *hosts[MAX_RANKS];
    struct way ways[MAX_RANKS];
    struct error err;
    cr_assert_eq(comm_threads_create(hosts, n, &err), STATUS_OK);
    for (int i = 0; i < n; i++) {
        ways[i] = (struct way){.host = hosts[i], .device = devices[i], .one_process = one_process};
        cr_assert_eq(pthread_create(&ways[i].thread, NULL, find_way, &ways[i]), 0);
    }
    for (int i = 0; i < n; i++) pthread_join(ways[i].thread, NULL);
    for (int i = 0; i < n; i++) {
        cr_assert_eq(ways[i].status, STATUS_OK, "%s", ways[i].err.text);
        cr_assert(ways[i].right, "rank %d of %d", i, n);
        cr_assert_eq(ways[i].recordable_bytes > 0, peers, "rank %d of %d", i, n);
        for (int j = 0; j < n && peers; j++) {
            bool mapped = devices[i] == devices[j] || emulated_peer_enabled(devices[i], devices[j]);
            cr_assert(mapped, "device %d writes into %d's memory unasked", devices[i], devices[j]);
        }
    }
    for (int i = 0; i < n; i++) comm_destroy(hosts[i]);
}

Test(comm_peer, devices_that_reach_each_other) {
    skip_without_device();
    emulated_set_devices(4, 1);
    check_way((const int[]){0, 1, 2, 3}, 4, true, true);
    check_way((const int[]){2, 2, 1, 1}, 4, true, true);
    check_way((const int[]){0, 1}, 2, true, true); /* already mapped */
    check_way((const int[]){0, 1}, 2, false, false);
}

Test(comm_peer, devices_that_do_not) {
    skip_without_device();
    emulated_set_devices(4, 0);
    check_way((const int[]){0, 1, 2, 3}, 4, true, false);
    check_way((const int[]){3, 3}, 2, true, true);
    check_way((const int[]){3, 3, 3, 0}, 4, true, false);
    emulated_set_devices(2, 2);
    check_way((const int[]){0, 1}, 2, true, false);
}
