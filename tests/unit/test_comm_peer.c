/* Groups of one device: virtual ranks, each a thread with a stream of its own on the emulated device,
 * exchange through memory that their kernels write into each other's. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "tests/reference/emulated.h"
#include "tests/reference/isas.h"
#include "tests/unit/test.h"
#include "worker/comm/comm_peer.h"

enum { MAX_RANKS = 8, MAX_BYTES = 8192, ROUNDS = 30 };

struct member {
    struct comm *host;
    int rank, size;
    bool absent; /* sends nothing in the last exchange */
    enum status last;
    struct error err;
    int n_wrong;
    pthread_t thread;
};

static uint32_t word_of(int round, int rank, int i) {
    return (uint32_t)(round * 1000003 + rank * 4099 + i);
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
    m->last = m->absent ? STATUS_OK : comm_complete(comm, &m->err);
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
    if (comm_peer_create(&comm, m->host, backend, MAX_BYTES, &m->err) != STATUS_OK) abort();
    exchange(m, comm, backend);
    comm_destroy(comm);
    backend_destroy(backend);
    return NULL;
}

static void group_of(int size, int absent, struct member *members) {
    struct comm *hosts[MAX_RANKS];
    struct error err;
    cr_assert_eq(comm_threads_create(hosts, size, &err), STATUS_OK);
    for (int i = 0; i < size; i++) {
        members[i] = (struct member){.host = hosts[i], .rank = i, .size = size, .absent = i == absent};
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
            group_of(size, -1, members);
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
    group_of(4, 2, members);
    for (int i = 0; i < 4; i++) {
        cr_assert_eq(members[i].n_wrong, 0);
        if (i == 2) continue;
        cr_assert(members[i].last == STATUS_UNAVAILABLE || members[i].last == STATUS_ABORTED);
    }
    cr_assert(strstr(members[0].err.text, "waited in vain for rank 2") != NULL, "%s",
              members[0].err.text);
}
