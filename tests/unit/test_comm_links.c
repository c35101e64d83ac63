/* The self-test of links: over groups of threads, with one link made slow, and its arithmetic. */
#include "tests/unit/test.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "tests/reference/isas.h"
#include "worker/comm/comm_internal.h"
#include "worker/comm/comm_links.h"
#include "worker/hello_links.h"

enum { MAX_RANKS = 8, BYTES = 100000 };

/* A group in front of another: counts messages, and delays those of one link. */
struct counted {
    struct comm head;
    struct comm *inner;
    int slow_from, slow_to;
    int64_t delay_ns;
    int n_sent[MAX_RANKS], n_long[MAX_RANKS]; /* by receiver */
};

static enum status counted_send(struct comm *head, const void *buffer, size_t bytes, int to,
                                struct error *err) {
    struct counted *c = (struct counted *)head;
    if (head->rank == c->slow_from && to == c->slow_to) clock_sleep_ns(c->delay_ns);
    c->n_sent[to]++;
    c->n_long[to] += bytes == BYTES;
    return comm_send(c->inner, buffer, bytes, to, err);
}

static enum status counted_recv(struct comm *head, void *buffer, size_t bytes, int from,
                                struct error *err) {
    return comm_recv(((struct counted *)head)->inner, buffer, bytes, from, err);
}

static const struct comm_ops counted_ops = {.send = counted_send, .recv = counted_recv};

struct rank {
    struct counted comm;
    pthread_t thread;
    int64_t budget_ns;
    struct comm_link *out;
    enum status status;
    struct error err;
    bool overrun;
};

static void *measure(void *arg) {
    struct rank *rank = arg;
    char *buffer = malloc(BYTES + 1);
    CHECK(buffer != NULL);
    memset(buffer, 'x', BYTES + 1);
    struct comm_links_options options = {&rank->comm.head, rank->comm.inner, buffer, BYTES,
                                         rank->budget_ns};
    rank->status = comm_links_measure(rank->out, &options, &rank->err);
    rank->overrun = buffer[BYTES] != 'x';
    free(buffer);
    return NULL;
}

/* Of all ranks; rank 0's result in `out`. */
static void run(struct rank *ranks, struct comm_link *out, int n_ranks, int64_t budget_ns,
                int64_t delay_ns) {
    struct comm *comms[MAX_RANKS];
    struct error err;
    CHECK(comm_threads_create(comms, n_ranks, &err) == STATUS_OK);
    memset(out, 0x7f, sizeof *out * (size_t)(n_ranks * n_ranks));
    for (int i = 0; i < n_ranks; i++) {
        ranks[i] = (struct rank){
            .comm = {.head = {&counted_ops, i, n_ranks}, .inner = comms[i], .slow_from = 1,
                     .slow_to = 0, .delay_ns = delay_ns},
            .budget_ns = budget_ns,
            .out = i == 0 ? out : NULL,
        };
        CHECK(pthread_create(&ranks[i].thread, NULL, measure, &ranks[i]) == 0);
    }
    for (int i = 0; i < n_ranks; i++) pthread_join(ranks[i].thread, NULL);
    for (int i = 0; i < n_ranks; i++) comm_destroy(comms[i]);
    for (int i = 0; i < n_ranks; i++) {
        cr_assert_eq(ranks[i].status, STATUS_OK, "rank %d: %s", i, ranks[i].err.text);
        cr_assert_not(ranks[i].overrun, "rank %d wrote past its buffer", i);
    }
}

static void check_every_link(struct rank *ranks, const struct comm_link *links, int n_ranks) {
    int n_long = n_ranks > 1 ? ranks[0].comm.n_long[1] : 0;
    for (int i = 0; i < n_ranks * n_ranks; i++) {
        int from = i / n_ranks, to = i % n_ranks;
        if (from == to) {
            cr_assert_eq(links[i].latency_ns, 0);
            cr_assert_eq(links[i].bytes_per_second, 0);
            continue;
        }
        cr_assert(links[i].latency_ns > 0, "%d to %d", from, to);
        cr_assert(links[i].bytes_per_second > 0, "%d to %d", from, to);
        cr_assert_eq(ranks[from].comm.n_long[to], n_long, "%d to %d: %d long messages, not %d",
                     from, to, ranks[from].comm.n_long[to], n_long);
        cr_assert_eq(ranks[from].comm.n_sent[to], 10 * n_long, "%d to %d: %d messages", from, to,
                     ranks[from].comm.n_sent[to]);
    }
}

Test(comm_links, every_ordered_pair) {
    static const int n_ranks[] = {1, 2, 3, 8};
    for (int i = 0; i < 4; i++) {
        struct rank ranks[MAX_RANKS];
        struct comm_link links[MAX_RANKS * MAX_RANKS];
        run(ranks, links, n_ranks[i], 30000000, 0);
        check_every_link(ranks, links, n_ranks[i]);
    }
}

/* No time at all: one round. All the time: not more than nine. */
Test(comm_links, rounds_are_bounded) {
    struct rank ranks[MAX_RANKS];
    struct comm_link links[MAX_RANKS * MAX_RANKS];
    run(ranks, links, 4, 0, 0);
    check_every_link(ranks, links, 4);
    cr_assert_eq(ranks[0].comm.n_long[1], 1);
    run(ranks, links, 2, INT64_MAX / 4, 0);
    cr_assert_eq(ranks[0].comm.n_long[1], 9);
}

/* Each message from 1 to 0 takes 2 ms more, which round trips of that pair, and no other's, has. */
Test(comm_links, a_slow_link_is_seen) {
    struct rank ranks[MAX_RANKS];
    struct comm_link links[MAX_RANKS * MAX_RANKS];
    run(ranks, links, 3, 0, 2000000);
    cr_assert(links[1 * 3 + 0].latency_ns >= 1000000);
    cr_assert(links[0 * 3 + 1].latency_ns >= 1000000);
    struct comm_link slowest = comm_links_slowest(links, 3);
    cr_assert(slowest.latency_ns >= 1000000);
}

Test(comm_links, medians_and_their_arithmetic) {
    int64_t short_ns[] = {9000000, 4000, 2000, 6000, 4000};
    int64_t long_ns[] = {504000, 104000, 9, 104000, 1 << 30};
    struct comm_link link = comm_links_summary(short_ns, long_ns, 5, 1000000);
    cr_assert_eq(link.latency_ns, 2000, "%lld", (long long)link.latency_ns);
    cr_assert(link.bytes_per_second == 1e10, "%g", link.bytes_per_second); /* 10^6 in 100 us */
    int64_t alone_ns[] = {1000}, shorter_ns[] = {900};
    link = comm_links_summary(alone_ns, shorter_ns, 1, 100);
    cr_assert_eq(link.latency_ns, 500);
    cr_assert(link.bytes_per_second == 100e9, "%g", link.bytes_per_second);
    struct comm_link links[] = {{0, 0}, {5, 300}, {7, 200}, {0, 0}};
    struct comm_link slowest = comm_links_slowest(links, 2);
    cr_assert(slowest.latency_ns == 7 && slowest.bytes_per_second == 200);
    slowest = comm_links_slowest(links, 1);
    cr_assert(slowest.latency_ns == 0 && slowest.bytes_per_second == 0);
}

static void *measure_or_end(void *arg) {
    struct rank *rank = arg;
    if (comm_rank(&rank->comm.head) != 2) return measure(arg);
    comm_abort(rank->comm.inner, "a rank of the test left");
    return NULL;
}

Test(comm_links, an_ended_group_ends_it) {
    struct comm *comms[3];
    struct rank ranks[3];
    struct comm_link links[9];
    struct error err;
    CHECK(comm_threads_create(comms, 3, &err) == STATUS_OK);
    for (int i = 0; i < 3; i++) {
        ranks[i] = (struct rank){
            .comm = {.head = {&counted_ops, i, 3}, .inner = comms[i], .slow_from = -1},
            .out = links,
        };
        CHECK(pthread_create(&ranks[i].thread, NULL, measure_or_end, &ranks[i]) == 0);
    }
    for (int i = 0; i < 3; i++) pthread_join(ranks[i].thread, NULL);
    for (int i = 0; i < 3; i++) comm_destroy(comms[i]);
    for (int i = 0; i < 2; i++) cr_assert_eq(ranks[i].status, STATUS_ABORTED, "rank %d", i);
}

/* --- as the coordinator is told --------------------------------------------------------------- */

struct teller {
    struct comm *world;
    const struct hello_devices *devices;
    pthread_t thread;
    struct hello_links links;
    enum status status;
};

static void *tell(void *arg) {
    struct teller *teller = arg;
    struct error err;
    teller->status = hello_links_measure(&teller->links, teller->world, teller->devices, &err);
    return NULL;
}

/* broken: a rank without its device, of which the others hear; -1: none. */
static void check_told(int n_ranks, const struct hello_devices *devices, int broken) {
    struct comm *comms[MAX_RANKS], *groups[MAX_RANKS];
    struct hello_devices own[MAX_RANKS];
    struct teller tellers[MAX_RANKS] = {0};
    struct error err;
    CHECK(comm_threads_create(comms, n_ranks, &err) == STATUS_OK);
    CHECK(comm_threads_create(groups, n_ranks, &err) == STATUS_OK);
    for (int i = 0; i < n_ranks; i++) {
        tellers[i].world = comms[i];
        if (devices != NULL) {
            own[i] = *devices;
            own[i].group = groups[i];
            if (i == broken) own[i].device = 99;
            tellers[i].devices = &own[i];
        }
        CHECK(pthread_create(&tellers[i].thread, NULL, tell, &tellers[i]) == 0);
    }
    for (int i = 0; i < n_ranks; i++) pthread_join(tellers[i].thread, NULL);
    bool right = true;
    for (int i = 0; i < n_ranks; i++) {
        const Tandem__V1__Links *told = &tellers[i].links.message;
        size_t n = i == 0 && n_ranks > 1 && broken < 0 ? (size_t)(n_ranks * n_ranks) : 0;
        right &= tellers[i].status == STATUS_OK && told->n_latency_ns == n;
        right &= told->n_gigabytes_per_second == n;
        right &= told->n_host_latency_ns == (devices != NULL ? n : 0);
        for (size_t k = 0; right && k < n; k++) {
            bool link = k / (size_t)n_ranks != k % (size_t)n_ranks;
            right = (told->latency_ns[k] > 0) == link;
            right &= (told->gigabytes_per_second[k] > 0) == link;
            if (devices != NULL) right &= (told->host_latency_ns[k] > 0) == link;
        }
        hello_links_free(&tellers[i].links);
        comm_destroy(comms[i]);
        comm_destroy(groups[i]);
    }
    cr_assert(right, "%d ranks", n_ranks);
}

Test(comm_links, the_leader_has_them_for_its_hello) {
    check_told(1, NULL, -1);
    check_told(2, NULL, -1);
    check_told(5, NULL, -1);
}

/* One device, where all-gathers are timed, and one through the host, where messages are. */
Test(comm_links, of_devices_too) {
    if (!computes_here(BACKEND_EMULATED)) {
        cr_skip_test("the emulated device is not built here (x86-64, no thread sanitizer)");
    }
    struct hello_devices devices = {NULL, BACKEND_EMULATED, 0, true, true};
    check_told(1, &devices, -1);
    check_told(2, &devices, -1);
    check_told(4, &devices, -1);
    check_told(4, &devices, 2);
    check_told(2, &devices, 0);
    devices.one_process = false;
    check_told(2, &devices, -1);
    check_told(2, &devices, 1);
}
