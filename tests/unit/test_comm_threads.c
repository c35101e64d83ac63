/* Groups of threads: every collective with random sizes and roots, more ranks than processors,
 * point to point, and the end of a group. The processes' twin is tests/mpi/mpi_case.c. */
#include "tests/unit/test.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "tests/reference/comm_checks.h"
#include "worker/comm/comm.h"

enum { MAX_RANKS = 8 };

struct rank {
    struct comm *comm;
    pthread_t thread;
    uint64_t seed;
    int n_rounds;
    const char *wrong; /* NULL: all was right */
    enum status status;
    struct error err;
    _Atomic bool done;
};

static void run_ranks(struct rank *ranks, int n_ranks, void *(*run)(void *)) {
    struct comm *comms[MAX_RANKS];
    struct error err;
    CHECK(comm_threads_create(comms, n_ranks, &err) == STATUS_OK);
    for (int i = 0; i < n_ranks; i++) {
        ranks[i].comm = comms[i];
        CHECK(pthread_create(&ranks[i].thread, NULL, run, &ranks[i]) == 0);
    }
}

static void join_ranks(struct rank *ranks, int n_ranks) {
    for (int i = 0; i < n_ranks; i++) {
        pthread_join(ranks[i].thread, NULL);
        comm_destroy(ranks[i].comm);
    }
}

static void *mixed_operations(void *arg) {
    struct rank *rank = arg;
    rank->wrong = comm_checks_mixed(rank->comm, rank->seed, rank->n_rounds);
    return NULL;
}

static void check_mixed(int n_ranks, uint64_t seed, int n_rounds) {
    struct rank ranks[MAX_RANKS] = {0};
    for (int i = 0; i < n_ranks; i++) {
        ranks[i].seed = seed;
        ranks[i].n_rounds = n_rounds;
    }
    run_ranks(ranks, n_ranks, mixed_operations);
    join_ranks(ranks, n_ranks);
    for (int i = 0; i < n_ranks; i++) {
        if (ranks[i].wrong != NULL) {
            printf("rank %d of %d, seed %llu: %s\n", i, n_ranks, (unsigned long long)seed,
                   ranks[i].wrong);
        }
        cr_assert_null(ranks[i].wrong, "rank %d of %d, seed %llu: %s", i, n_ranks,
                       (unsigned long long)seed, ranks[i].wrong);
    }
}

Test(comm_threads, mixed_operations_alone) {
    check_mixed(1, 11, 200);
}

Test(comm_threads, mixed_operations_of_two) {
    check_mixed(2, 12, 300);
    check_mixed(2, 13, 300);
}

Test(comm_threads, mixed_operations_of_four) {
    check_mixed(4, 14, 150);
}

Test(comm_threads, mixed_operations_of_eight) {
    check_mixed(8, 15, 80);
}

static void *large_messages(void *arg) {
    struct rank *rank = arg;
    rank->wrong = comm_checks_sizes(rank->comm);
    return NULL;
}

Test(comm_threads, sizes_up_to_three_mebibytes) {
    static const int sizes[] = {1, 2, 4, 8};
    for (int s = 0; s < 4; s++) {
        struct rank ranks[MAX_RANKS] = {0};
        run_ranks(ranks, sizes[s], large_messages);
        join_ranks(ranks, sizes[s]);
        for (int i = 0; i < sizes[s]; i++) {
            cr_assert_null(ranks[i].wrong, "rank %d of %d: %s", i, sizes[s], ranks[i].wrong);
        }
    }
}

static void *many_small_ones(void *arg) {
    struct rank *rank = arg;
    for (uint64_t i = 0; i < 20000 && rank->wrong == NULL; i++) {
        uint64_t mine = i * 16 + (uint64_t)comm_rank(rank->comm), all[MAX_RANKS];
        if (comm_all_gather(rank->comm, all, &mine, sizeof mine, &rank->err) != STATUS_OK) {
            rank->wrong = "an all-gather failed";
        }
        for (int r = 0; r < comm_size(rank->comm) && rank->wrong == NULL; r++) {
            if (all[r] != i * 16 + (uint64_t)r) rank->wrong = "a value of another operation";
        }
    }
    return NULL;
}

Test(comm_threads, twenty_thousand_small_gathers) {
    struct rank ranks[MAX_RANKS] = {0};
    run_ranks(ranks, 2, many_small_ones);
    join_ranks(ranks, 2);
    cr_assert_null(ranks[0].wrong, "%s", ranks[0].wrong);
    cr_assert_null(ranks[1].wrong, "%s", ranks[1].wrong);
}

/* --- the end of a group ----------------------------------------------------------------------- */

static void *wait_for_ever(void *arg) {
    struct rank *rank = arg;
    char byte = 0, all[MAX_RANKS];
    size_t sizes[MAX_RANKS];
    for (int i = 0; i < MAX_RANKS; i++) sizes[i] = 1;
    int me = comm_rank(rank->comm);
    /* Rank 0 never takes part, so everybody else waits. */
    if (me == 1) rank->status = comm_broadcast(rank->comm, &byte, 1, 0, &rank->err);
    if (me == 2) rank->status = comm_all_gather(rank->comm, all, &byte, 1, &rank->err);
    if (me == 3) rank->status = comm_recv(rank->comm, &byte, 1, 0, &rank->err);
    if (me == 4) rank->status = comm_barrier(rank->comm, &rank->err);
    if (me == 5) rank->status = comm_gather(rank->comm, all, &byte, sizes, 5, &rank->err);
    for (int i = 0; me == 6 && rank->status == STATUS_OK; i++) { /* until nobody takes any more */
        rank->status = comm_send(rank->comm, &byte, 1, 0, &rank->err);
        CHECK(i < 1000);
    }
    atomic_store(&rank->done, true);
    return NULL;
}

/* Deep asleep or still spinning: everybody is woken, with the reason. */
static void check_abort(int64_t after_ns) {
    struct rank ranks[7] = {0};
    run_ranks(ranks, 7, wait_for_ever);
    clock_sleep_ns(after_ns);
    bool early = false;
    for (int i = 1; i < 7; i++) early |= atomic_load(&ranks[i].done);
    comm_abort(ranks[0].comm, "the test wants it");
    comm_abort(ranks[0].comm, "a second reason");
    for (int i = 0; i < 7; i++) pthread_join(ranks[i].thread, NULL);
    char byte = 0, all[7];
    enum status later[] = {
        comm_broadcast(ranks[0].comm, &byte, 1, 0, &ranks[0].err),
        comm_all_gather(ranks[0].comm, all, &byte, 1, &ranks[0].err),
        comm_barrier(ranks[0].comm, &ranks[0].err),
        comm_send(ranks[0].comm, &byte, 1, 1, &ranks[0].err),
        comm_recv(ranks[0].comm, &byte, 1, 6, &ranks[0].err),
    };
    for (int i = 0; i < 7; i++) comm_destroy(ranks[i].comm);
    cr_assert_not(early, "somebody did not wait");
    for (int i = 1; i < 7; i++) {
        cr_assert_eq(ranks[i].status, STATUS_ABORTED, "rank %d: %d", i, ranks[i].status);
        cr_assert_not_null(strstr(ranks[i].err.text, "the test wants it"), "%s", ranks[i].err.text);
    }
    for (int i = 0; i < 5; i++) cr_assert_eq(later[i], STATUS_ABORTED, "operation %d", i);
}

Test(comm_threads, abort_wakes_everybody) {
    check_abort(1000 * 1000);
    check_abort(300 * 1000 * 1000);
}

Test(comm_threads, a_wrong_number_of_ranks) {
    struct comm *comms[1];
    struct error err;
    cr_assert_eq(comm_threads_create(comms, 0, &err), STATUS_INVALID_ARGUMENT);
    cr_assert_eq(comm_threads_create(comms, 257, &err), STATUS_INVALID_ARGUMENT);
}
