/* Collectives over shared memory: threads of one process, or processes of one host.
 *
 * Operations are numbered; every rank counts the same ones. A rank writes its part of operation n into
 * its buffer n % 2, then raises its mark to 2n+1 ("published"); readers wait for that mark. A mark of
 * at least 2n+2 says that the rank has finished operation n (beginning the next one says so as well).
 * A buffer may be written again for operation n+2 once everybody has finished n. Messages longer than
 * a buffer are several operations. */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "worker/comm/comm_internal.h"

enum { BUFFER_BYTES = 64 * 1024, CHANNEL_BYTES = 4096, LINE = 64 };

struct rank_area {
    _Alignas(LINE) _Atomic uint64_t mark;
    _Alignas(LINE) _Atomic int32_t pid; /* 0: a thread */
    _Alignas(LINE) char buffers[2][BUFFER_BYTES];
};

/* From one rank to another; holds one chunk at a time. */
struct channel {
    _Alignas(LINE) _Atomic uint64_t written;
    _Alignas(LINE) _Atomic uint64_t read;
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

enum { SPIN_TURNS = 2000, CROWDED_SPIN_TURNS = 20, YIELD_TURNS = 3000 };

void comm_wait_turn(struct comm_wait *wait) {
    uint32_t spins = wait->crowded ? CROWDED_SPIN_TURNS : SPIN_TURNS;
    uint32_t turn = wait->turns++;
    if (turn < spins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        return;
    }
    if (turn < spins + YIELD_TURNS) {
        sched_yield();
        return;
    }
    wait->turns = spins + YIELD_TURNS; /* stays here */
    int64_t pause_ns = wait->slept_ns / 32;
    if (pause_ns < 20 * 1000) pause_ns = 20 * 1000;
    if (pause_ns > 2000 * 1000) pause_ns = 2000 * 1000;
    int64_t before = wait->slept_ns;
    clock_sleep_ns(pause_ns);
    wait->slept_ns = before + pause_ns;
}

bool comm_wait_is_long(struct comm_wait *wait) {
    if (wait->slept_ns < 100 * 1000 * 1000) return false;
    wait->slept_ns = 50 * 1000 * 1000; /* keeps the pauses long and asks again in a while */
    return true;
}

static enum status check_aborted(struct shared *c, struct error *err) {
    int aborted = atomic_load_explicit(&c->region->aborted, memory_order_acquire);
    if (aborted == 0) return STATUS_OK;
    return error_set(err, STATUS_ABORTED, "the group was ended: %s",
                     aborted == 2 ? c->region->reason : "no reason given");
}

static enum status check_peers(struct shared *c, struct error *err) {
    for (int i = 0; i < c->head.size; i++) {
        pid_t pid = atomic_load_explicit(&c->region->ranks[i].pid, memory_order_relaxed);
        if (pid == 0 || kill(pid, 0) == 0 || errno != ESRCH) continue;
        return error_set(err, STATUS_UNAVAILABLE, "rank %d (process %d) has died", i, (int)pid);
    }
    return STATUS_OK;
}

/* Waits until *word >= value. */
static enum status await(struct shared *c, _Atomic uint64_t *word, uint64_t value,
                         struct error *err) {
    struct comm_wait wait = {.crowded = c->crowded};
    while (atomic_load_explicit(word, memory_order_acquire) < value) {
        if ((wait.turns & 63) == 63 || wait.slept_ns > 0) TRY(check_aborted(c, err));
        if (c->processes && comm_wait_is_long(&wait)) TRY(check_peers(c, err));
        comm_wait_turn(&wait);
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
    atomic_store_explicit(&mine(c)->mark, 2 * n + 1, memory_order_release);
    return STATUS_OK;
}

static enum status take(struct shared *c, void *out, size_t bytes, int from, struct error *err) {
    TRY(await(c, &c->region->ranks[from].mark, 2 * c->n + 1, err));
    if (bytes > 0) memcpy(out, c->region->ranks[from].buffers[c->n % 2], bytes);
    return STATUS_OK;
}

static void finish(struct shared *c) {
    atomic_store_explicit(&mine(c)->mark, 2 * c->n + 2, memory_order_release);
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
        uint64_t n = atomic_load_explicit(&channel->written, memory_order_relaxed);
        TRY(await(c, &channel->read, n, err));
        if (chunk > 0) memcpy(channel->data, (const char *)buffer + done, chunk);
        atomic_store_explicit(&channel->written, n + 1, memory_order_release);
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
        uint64_t n = atomic_load_explicit(&channel->read, memory_order_relaxed);
        TRY(await(c, &channel->written, n + 1, err));
        if (chunk > 0) memcpy((char *)buffer + done, channel->data, chunk);
        atomic_store_explicit(&channel->read, n + 1, memory_order_release);
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

static void shared_destroy(struct comm *head) {
    struct shared *c = (struct shared *)head;
    if (c->release != NULL) c->release(c->user);
    free(c);
}

static const struct comm_ops shared_ops = {
    shared_broadcast, shared_all_gather, shared_gather, shared_send,
    shared_recv,      shared_abort,      shared_destroy,
};

struct comm *comm_shared_create(struct comm_region *region, int rank, int size, bool processes,
                                void (*release)(void *user), void *user) {
    struct shared *c = xcalloc(1, sizeof *c);
    c->head = (struct comm){&shared_ops, rank, size};
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
