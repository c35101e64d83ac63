/* Collectives over shared memory: threads of one process, or processes of one host.
 *
 * Operations are numbered; every rank counts the same ones. A rank writes its part of operation n
 * into its buffer n % 2, then raises its mark to 2n+1 ("published"); readers wait for that mark. A
 * mark of at least 2n+2 says that the rank has finished operation n (beginning the next one says
 * so as well). A buffer may be written again for operation n+2 once everybody has finished n.
 * Messages longer than a buffer are several operations.
 *
 * Who waits spins, yields, and then sleeps on the mark itself (futex), so that an idle server
 * costs nothing and still wakes at once; who raises a mark looks whether anybody sleeps on it. */
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "worker/comm/comm_internal.h"

enum { BUFFER_BYTES = 64 * 1024, CHANNEL_BYTES = 4096, LINE = 64 };

/* A number that only grows, and who sleeps until it does. */
struct flag {
    _Alignas(LINE) _Atomic uint64_t value;
    _Atomic uint32_t sleepers;
};

struct rank_area {
    struct flag mark;
    _Alignas(LINE) _Atomic int32_t pid; /* 0: a thread */
    _Alignas(LINE) char buffers[2][BUFFER_BYTES];
};

/* From one rank to another; holds one chunk at a time. */
struct channel {
    struct flag written;
    struct flag read;
    char data[CHANNEL_BYTES];
};

struct comm_region {
    _Alignas(LINE) _Atomic int aborted; /* 1: being written, 2: reason is complete */
    char reason[256];
    struct rank_area ranks[]; /* then size * size channels */
};

struct shared {
    struct comm head;
    struct comm_region *region;
    struct channel *channels;
    uint64_t n; /* the current operation */
    bool processes, crowded;
    void (*release)(void *user);
    void *user;
};

size_t comm_shared_bytes(int n_ranks) {
    size_t n = (size_t)n_ranks;
    return sizeof(struct comm_region) + n * sizeof(struct rank_area) + n * n * sizeof(struct channel);
}

/* --- waiting --------------------------------------------------------------------------------- */

/* The low half of a flag's value, which is what a futex compares (little-endian). */
static uint32_t *futex_word(struct flag *flag) {
    return (uint32_t *)(void *)&flag->value;
}

static void raise_flag(struct flag *flag, uint64_t value) {
    /* Sequentially consistent with the sleeper, who counts itself in and then looks at the value. */
    atomic_store(&flag->value, value);
    if (atomic_load(&flag->sleepers) == 0) return;
    syscall(SYS_futex, futex_word(flag), FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

/* Until the value changes, at most 50 ms: an abort or a dead peer does not raise it. */
static void sleep_on(struct flag *flag, uint64_t wanted) {
    const struct timespec most = {0, 50 * 1000 * 1000};
    atomic_fetch_add(&flag->sleepers, 1);
    uint64_t seen = atomic_load(&flag->value);
    if (seen < wanted) {
        syscall(SYS_futex, futex_word(flag), FUTEX_WAIT, (uint32_t)seen, &most, NULL, 0);
    }
    atomic_fetch_sub(&flag->sleepers, 1);
}

/* Only once the reason stands there; who dies while writing it is noticed as dead. */
static enum status check_aborted(struct shared *c, struct error *err) {
    if (atomic_load_explicit(&c->region->aborted, memory_order_acquire) != 2) return STATUS_OK;
    return error_set(err, STATUS_ABORTED, "the group was ended: %s", c->region->reason);
}

static enum status check_peers(struct shared *c, struct error *err) {
    for (int i = 0; i < c->head.size; i++) {
        pid_t pid = atomic_load_explicit(&c->region->ranks[i].pid, memory_order_relaxed);
        if (pid == 0 || kill(pid, 0) == 0 || errno != ESRCH) continue;
        return error_set(err, STATUS_UNAVAILABLE, "rank %d (process %d) has died", i, (int)pid);
    }
    return STATUS_OK;
}

static enum status await(struct shared *c, struct flag *flag, uint64_t value, struct error *err) {
    struct comm_wait wait = {.crowded = c->crowded};
    while (atomic_load_explicit(&flag->value, memory_order_acquire) < value) {
        if ((wait.turns & 63) == 63) TRY(check_aborted(c, err));
        if (comm_wait_turn(&wait)) continue;
        TRY(check_aborted(c, err));
        if (c->processes) TRY(check_peers(c, err));
        sleep_on(flag, value);
    }
    return STATUS_OK;
}

/* --- one operation --------------------------------------------------------------------------- */

static struct rank_area *mine(struct shared *c) {
    return &c->region->ranks[c->head.rank];
}

/* Begins operation n and offers `bytes` of it. */
static enum status publish(struct shared *c, const void *data, size_t bytes, struct error *err) {
    uint64_t n = c->n;
    for (int i = 0; i < c->head.size && n >= 2; i++) {
        if (i != c->head.rank) TRY(await(c, &c->region->ranks[i].mark, 2 * (n - 2) + 2, err));
    }
    if (bytes > 0) memcpy(mine(c)->buffers[n % 2], data, bytes);
    raise_flag(&mine(c)->mark, 2 * n + 1);
    return STATUS_OK;
}

static enum status take(struct shared *c, void *out, size_t bytes, int from, struct error *err) {
    TRY(await(c, &c->region->ranks[from].mark, 2 * c->n + 1, err));
    if (bytes > 0) memcpy(out, c->region->ranks[from].buffers[c->n % 2], bytes);
    return STATUS_OK;
}

static void finish(struct shared *c) {
    raise_flag(&mine(c)->mark, 2 * c->n + 2);
    c->n++;
}

static size_t chunk_of(size_t bytes, size_t done) {
    return bytes - done < BUFFER_BYTES ? bytes - done : BUFFER_BYTES;
}

static enum status shared_broadcast(struct comm *head, void *buffer, size_t bytes, int root,
                                    struct error *err) {
    struct shared *c = (struct shared *)head;
    TRY(check_aborted(c, err));
    size_t done = 0;
    do {
        size_t chunk = chunk_of(bytes, done);
        if (head->rank == root) TRY(publish(c, (char *)buffer + done, chunk, err));
        else TRY(take(c, (char *)buffer + done, chunk, root, err));
        finish(c);
        done += chunk;
    } while (done < bytes);
    return STATUS_OK;
}

static enum status shared_all_gather(struct comm *head, void *recv, const void *send, size_t bytes,
                                     struct error *err) {
    struct shared *c = (struct shared *)head;
    TRY(check_aborted(c, err));
    char *own = (char *)recv + (size_t)head->rank * bytes;
    size_t done = 0;
    do {
        size_t chunk = chunk_of(bytes, done);
        TRY(publish(c, (const char *)send + done, chunk, err));
        for (int i = 0; i < head->size; i++) {
            if (i == head->rank) continue;
            TRY(take(c, (char *)recv + (size_t)i * bytes + done, chunk, i, err));
        }
        c->n++; /* the next operation's mark says that this one is finished */
        done += chunk;
    } while (done < bytes);
    if (own != send && bytes > 0) memmove(own, send, bytes);
    return STATUS_OK;
}

static enum status shared_gather(struct comm *head, void *recv, const void *send,
                                 const size_t *bytes_of_rank, int root, struct error *err) {
    struct shared *c = (struct shared *)head;
    TRY(check_aborted(c, err));
    size_t longest = 0, own = bytes_of_rank[head->rank], done = 0;
    for (int i = 0; i < head->size; i++) {
        if (bytes_of_rank[i] > longest) longest = bytes_of_rank[i];
    }
    do {
        size_t left = own > done ? own - done : 0;
        size_t chunk = left < BUFFER_BYTES ? left : BUFFER_BYTES;
        if (head->rank != root) TRY(publish(c, (const char *)send + done, chunk, err));
        char *part = recv;
        for (int i = 0; i < head->size && head->rank == root; part += bytes_of_rank[i++]) {
            if (i == root || bytes_of_rank[i] <= done) continue;
            TRY(take(c, part + done, chunk_of(bytes_of_rank[i], done), i, err));
        }
        finish(c);
        done += BUFFER_BYTES;
    } while (done < longest);
    if (head->rank != root) return STATUS_OK;
    char *part = recv;
    for (int i = 0; i < root; i++) part += bytes_of_rank[i];
    if (part != send && own > 0) memmove(part, send, own);
    return STATUS_OK;
}

/* --- point to point -------------------------------------------------------------------------- */

static struct channel *channel_of(struct shared *c, int from, int to) {
    return &c->channels[from * c->head.size + to];
}

static enum status shared_send(struct comm *head, const void *buffer, size_t bytes, int to,
                               struct error *err) {
    struct shared *c = (struct shared *)head;
    struct channel *channel = channel_of(c, head->rank, to);
    TRY(check_aborted(c, err));
    size_t done = 0;
    do {
        size_t chunk = bytes - done < CHANNEL_BYTES ? bytes - done : CHANNEL_BYTES;
        uint64_t n = atomic_load_explicit(&channel->written.value, memory_order_relaxed);
        TRY(await(c, &channel->read, n, err));
        if (chunk > 0) memcpy(channel->data, (const char *)buffer + done, chunk);
        raise_flag(&channel->written, n + 1);
        done += chunk;
    } while (done < bytes);
    return STATUS_OK;
}

static enum status shared_recv(struct comm *head, void *buffer, size_t bytes, int from,
                               struct error *err) {
    struct shared *c = (struct shared *)head;
    struct channel *channel = channel_of(c, from, head->rank);
    TRY(check_aborted(c, err));
    size_t done = 0;
    do {
        size_t chunk = bytes - done < CHANNEL_BYTES ? bytes - done : CHANNEL_BYTES;
        uint64_t n = atomic_load_explicit(&channel->read.value, memory_order_relaxed);
        TRY(await(c, &channel->written, n + 1, err));
        if (chunk > 0) memcpy((char *)buffer + done, channel->data, chunk);
        raise_flag(&channel->read, n + 1);
        done += chunk;
    } while (done < bytes);
    return STATUS_OK;
}

/* --- ends ------------------------------------------------------------------------------------ */

static void shared_abort(struct comm *head, const char *reason) {
    struct shared *c = (struct shared *)head;
    int none = 0;
    if (!atomic_compare_exchange_strong(&c->region->aborted, &none, 1)) return;
    snprintf(c->region->reason, sizeof c->region->reason, "%s", reason);
    atomic_store_explicit(&c->region->aborted, 2, memory_order_release);
}

static enum status shared_check(struct comm *head, struct error *err) {
    struct shared *c = (struct shared *)head;
    TRY(check_aborted(c, err));
    return c->processes ? check_peers(c, err) : STATUS_OK;
}

static void shared_destroy(struct comm *head) {
    struct shared *c = (struct shared *)head;
    if (c->release != NULL) c->release(c->user);
    free(c);
}

static const struct comm_ops shared_ops = {
    .broadcast = shared_broadcast,
    .all_gather = shared_all_gather,
    .gather = shared_gather,
    .send = shared_send,
    .recv = shared_recv,
    .check = shared_check,
    .abort = shared_abort,
    .destroy = shared_destroy,
};

struct comm *comm_shared_create(struct comm_region *region, int rank, int size, bool processes,
                                void (*release)(void *user), void *user) {
    struct shared *c = xcalloc(1, sizeof *c);
    c->head = (struct comm){&shared_ops, rank, size, 0};
    c->region = region;
    c->channels = (struct channel *)&region->ranks[size];
    c->processes = processes;
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    /* Bound to one processor each, ranks may still all have their own: then count the machine's. */
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    if (!processes && sched_getaffinity(0, sizeof cpus, &cpus) == 0) processors = CPU_COUNT(&cpus);
    c->crowded = size > processors;
    c->release = release;
    c->user = user;
    if (processes) atomic_store(&mine(c)->pid, (int32_t)getpid());
    return &c->head;
}
