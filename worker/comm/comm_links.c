#include "worker/comm/comm_links.h"

#include <stdbool.h>
#include <stdlib.h>

#include "common/clock.h"

enum { SHORT_BYTES = 8, TRIPS = 4, MAX_ROUNDS = 9 };
/* All-gathers that are only enqueued are told from the wait behind them by their number. */
enum { SHORT_GATHERS = 32, LONG_GATHERS = 4 };

struct samples {
    int64_t short_ns[MAX_ROUNDS], long_ns[MAX_ROUNDS];
};

struct probe {
    const struct comm_links_options *options;
    int rank, size;
    bool gathers; /* all-gathers are what is timed */
    struct samples *to; /* [size]: of the links that begin here */
};

static int by_size(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static int64_t median(int64_t *values, int n) {
    qsort(values, (size_t)n, sizeof *values, by_size);
    return values[n / 2];
}

/* A clock that is coarse, or messages too short, must not give infinity. */
static struct comm_link link_of(int64_t latency_ns, int64_t moving_ns, size_t bytes) {
    return (struct comm_link){latency_ns, (double)bytes * 1e9 / (double)(moving_ns > 0 ? moving_ns : 1)};
}

struct comm_link comm_links_summary(int64_t *short_ns, int64_t *long_ns, int n, size_t bytes) {
    int64_t latency = median(short_ns, n) / 2;
    return link_of(latency, median(long_ns, n) - 2 * latency, bytes);
}

static struct comm_link summary_of_gathers(int64_t *short_ns, int64_t *long_ns, int n, size_t bytes) {
    int64_t latency = median(short_ns, n);
    return link_of(latency, median(long_ns, n) - latency, bytes);
}

struct comm_link comm_links_slowest(const struct comm_link *links, int size) {
    struct comm_link slowest = {0};
    for (int i = 0; i < size * size; i++) {
        if (i / size == i % size) continue;
        const struct comm_link *link = &links[i];
        if (link->latency_ns > slowest.latency_ns) slowest.latency_ns = link->latency_ns;
        if (slowest.bytes_per_second == 0 || link->bytes_per_second < slowest.bytes_per_second) {
            slowest.bytes_per_second = link->bytes_per_second;
        }
    }
    return slowest;
}

/* One side of `trips` messages there and SHORT_BYTES back, one behind the other. */
static enum status play(const struct probe *p, int from, int to, size_t bytes, int trips,
                        struct error *err) {
    struct comm *comm = p->options->comm;
    void *buffer = p->options->buffer;
    for (int i = 0; i < trips; i++) {
        if (p->rank == from) {
            TRY(comm_send(comm, buffer, bytes, to, err));
            TRY(comm_recv(comm, buffer, SHORT_BYTES, to, err));
        } else {
            TRY(comm_recv(comm, buffer, bytes, from, err));
            TRY(comm_send(comm, buffer, SHORT_BYTES, from, err));
        }
    }
    return comm_complete(comm, err);
}

static enum status time_link(const struct probe *p, int from, int to, int round,
                             struct error *err) {
    int64_t start = clock_now_ns();
    TRY(play(p, from, to, SHORT_BYTES, TRIPS, err));
    int64_t between = clock_now_ns();
    TRY(play(p, from, to, p->options->bytes, 1, err));
    if (p->rank != from) return STATUS_OK;
    p->to[to].short_ns[round] = (between - start) / TRIPS;
    p->to[to].long_ns[round] = clock_now_ns() - between;
    return STATUS_OK;
}

/* *each_ns: of n all-gathers, without the wait for them. */
static enum status time_some(int64_t *each_ns, const struct comm_links_options *o, char *recv,
                             size_t bytes, int n, struct error *err) {
    TRY(comm_complete(o->comm, err));
    int64_t start = clock_now_ns();
    TRY(comm_complete(o->comm, err));
    int64_t wait_ns = clock_now_ns() - start;
    start = clock_now_ns();
    for (int i = 0; i < n; i++) TRY(comm_all_gather(o->comm, recv, o->buffer, bytes, err));
    TRY(comm_complete(o->comm, err));
    int64_t spent_ns = clock_now_ns() - start - wait_ns;
    *each_ns = spent_ns > n ? spent_ns / n : 1;
    return STATUS_OK;
}

/* The all-gather of everybody, in place of every link of this rank. */
static enum status time_all_gathers(const struct probe *p, int round, struct error *err) {
    const struct comm_links_options *o = p->options;
    char *recv = (char *)o->buffer + o->bytes;
    int64_t short_ns, long_ns;
    TRY(time_some(&short_ns, o, recv, SHORT_BYTES, SHORT_GATHERS, err));
    TRY(time_some(&long_ns, o, recv, o->bytes, LONG_GATHERS, err));
    for (int to = 0; to < p->size; to++) {
        p->to[to].short_ns[round] = short_ns;
        p->to[to].long_ns[round] = long_ns;
    }
    return comm_barrier(o->control, err);
}

/* One link at a time: all that begin at one rank, then everybody waits before the next rank's. */
static enum status time_links(const struct probe *p, int round, struct error *err) {
    for (int from = 0; from < p->size; from++) {
        for (int to = 0; to < p->size; to++) {
            if (from == to || (p->rank != from && p->rank != to)) continue;
            TRY(time_link(p, from, to, round, err));
        }
        TRY(comm_barrier(p->options->control, err));
    }
    return STATUS_OK;
}

/* Rank 0 knows whether there is time for one more. */
static enum status ask_for_more(const struct probe *p, int n_rounds, int64_t spent_ns, bool *more,
                                struct error *err) {
    *more = n_rounds < MAX_ROUNDS && spent_ns + spent_ns / n_rounds <= p->options->budget_ns;
    return comm_broadcast(p->options->control, more, sizeof *more, 0, err);
}

static enum status time_rounds(const struct probe *p, int *n_rounds, struct error *err) {
    TRY(comm_barrier(p->options->control, err));
    int64_t start = clock_now_ns();
    bool more = true;
    for (*n_rounds = 0; more; ) {
        int round = (*n_rounds)++;
        TRY(p->gathers ? time_all_gathers(p, round, err) : time_links(p, round, err));
        TRY(ask_for_more(p, *n_rounds, clock_now_ns() - start, &more, err));
    }
    return STATUS_OK;
}

enum status comm_links_measure(struct comm_link *out, const struct comm_links_options *options,
                               struct error *err) {
    struct probe p = {.options = options,
                      .rank = comm_rank(options->comm),
                      .size = comm_size(options->comm),
                      .gathers = comm_recordable_bytes(options->comm) >= options->bytes};
    CHECK(options->bytes >= SHORT_BYTES && comm_rank(options->control) == p.rank);
    struct comm_link *mine = xcalloc((size_t)p.size, sizeof *mine);
    size_t *parts = xcalloc((size_t)p.size, sizeof *parts);
    p.to = xcalloc((size_t)p.size, sizeof *p.to);
    int n_rounds = 0;
    enum status status = time_rounds(&p, &n_rounds, err);
    for (int i = 0; i < p.size && status == STATUS_OK; i++) {
        parts[i] = (size_t)p.size * sizeof *mine;
        if (i == p.rank) continue;
        struct samples *s = &p.to[i];
        /* The first round wakes everything up: it counts only where it stayed alone. */
        int first = n_rounds > 1;
        mine[i] = (p.gathers ? summary_of_gathers : comm_links_summary)(
            s->short_ns + first, s->long_ns + first, n_rounds - first, options->bytes);
    }
    if (status == STATUS_OK) status = comm_gather(options->control, out, mine, parts, 0, err);
    free(p.to);
    free(parts);
    free(mine);
    return status;
}
