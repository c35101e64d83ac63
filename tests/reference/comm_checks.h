/* What any group of ranks must do, whoever made it: called on every rank with the same arguments.
 * Returns NULL, or what was wrong. Everything is drawn from the seed, the same on all ranks. */
#pragma once
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "tests/reference/random.h"
#include "worker/comm/comm.h"

enum { COMM_CHECKS_MAX_BYTES = 3 << 20, COMM_CHECKS_MAX_RANKS = 16 };

static inline void comm_checks_fill(char *out, size_t bytes, uint64_t tag) {
    struct test_random random = {tag * 7919};
    uint64_t word = 0;
    for (size_t i = 0; i < bytes; i++) {
        if (i % 8 == 0) word = random_u64(&random);
        out[i] = (char)(word >> (i % 8 * 8));
    }
}

static inline bool comm_checks_holds(const char *data, size_t bytes, uint64_t tag) {
    char *expected = malloc(bytes + 1);
    if (expected == NULL) abort();
    comm_checks_fill(expected, bytes, tag);
    bool same = bytes == 0 || memcmp(data, expected, bytes) == 0;
    free(expected);
    return same;
}

/* Mostly small, sometimes around the length of a buffer, sometimes long. */
static inline size_t comm_checks_size(struct test_random *random, size_t most) {
    int dice = random_below(random, 20);
    size_t bytes = (size_t)random_below(random, 5000);
    if (dice < 3) bytes = 65536 - 2 + (size_t)random_below(random, 5);
    if (dice == 3) bytes = (size_t)random_below(random, (int)most + 1);
    if (dice == 4) bytes = 0;
    return bytes < most ? bytes : most;
}

/* The operation's result, once it is there: on a device the call returns earlier. */
static inline bool comm_checks_done(struct comm *comm, enum status status) {
    struct error err;
    return status == STATUS_OK && comm_complete(comm, &err) == STATUS_OK;
}

static inline const char *comm_checks_broadcast(struct comm *comm, char *buffer, size_t bytes,
                                                int root, uint64_t tag) {
    struct error err;
    memset(buffer, 0, bytes + 1);
    if (comm_rank(comm) == root) comm_checks_fill(buffer, bytes, tag);
    if (!comm_checks_done(comm, comm_broadcast(comm, buffer, bytes, root, &err))) {
        return "broadcast failed";
    }
    return comm_checks_holds(buffer, bytes, tag) ? NULL : "broadcast brought other bytes";
}

/* In place: the sent part stands where it will be received. */
static inline const char *comm_checks_all_gather(struct comm *comm, char *buffer, size_t bytes,
                                                 bool in_place, uint64_t tag) {
    struct error err;
    int rank = comm_rank(comm), size = comm_size(comm);
    char *send = in_place ? buffer + (size_t)rank * bytes : malloc(bytes + 1);
    if (send == NULL) abort();
    memset(buffer, 0, (size_t)size * bytes + 1);
    comm_checks_fill(send, bytes, tag + (uint64_t)rank);
    bool done = comm_checks_done(comm, comm_all_gather(comm, buffer, send, bytes, &err));
    if (!in_place) free(send);
    if (!done) return "all-gather failed";
    for (int i = 0; i < size; i++) {
        if (!comm_checks_holds(buffer + (size_t)i * bytes, bytes, tag + (uint64_t)i)) {
            return "all-gather brought other bytes";
        }
    }
    return NULL;
}

static inline const char *comm_checks_gather(struct comm *comm, char *buffer, const size_t *bytes,
                                             int root, uint64_t tag) {
    struct error err;
    int rank = comm_rank(comm);
    char *send = malloc(bytes[rank] + 1);
    if (send == NULL) abort();
    comm_checks_fill(send, bytes[rank], tag + (uint64_t)rank);
    bool done = comm_checks_done(comm, comm_gather(comm, buffer, send, bytes, root, &err));
    free(send);
    if (!done) return "gather failed";
    for (int i = 0; i < comm_size(comm) && rank == root; buffer += bytes[i++]) {
        if (!comm_checks_holds(buffer, bytes[i], tag + (uint64_t)i)) {
            return "gather brought other bytes";
        }
    }
    return NULL;
}

/* Two messages in a row from one rank to another; the others do not take part. */
static inline const char *comm_checks_message(struct comm *comm, char *buffer, size_t bytes,
                                              int from, int to, uint64_t tag) {
    struct error err;
    int rank = comm_rank(comm);
    if (from == to || (rank != from && rank != to)) return NULL;
    for (uint64_t i = 0; i < 2; i++) {
        if (rank == from) {
            comm_checks_fill(buffer, bytes, tag + i);
            if (!comm_checks_done(comm, comm_send(comm, buffer, bytes, to, &err))) {
                return "send failed";
            }
            continue;
        }
        memset(buffer, 0, bytes + 1);
        if (!comm_checks_done(comm, comm_recv(comm, buffer, bytes, from, &err))) {
            return "recv failed";
        }
        if (!comm_checks_holds(buffer, bytes, tag + i)) return "recv brought other bytes";
    }
    return NULL;
}

static inline const char *comm_checks_one(struct comm *comm, char *buffer, uint64_t seed,
                                          uint64_t round) {
    struct test_random random = {seed * 1000003 + round};
    int size = comm_size(comm);
    int root = random_below(&random, size), other = random_below(&random, size);
    uint64_t tag = seed * 4096 + round * 64;
    struct error err;
    size_t parts[COMM_CHECKS_MAX_RANKS], most = COMM_CHECKS_MAX_BYTES / (size_t)size;
    for (int i = 0; i < size; i++) parts[i] = comm_checks_size(&random, most);
    switch (random_below(&random, 6)) {
    case 0: return comm_checks_broadcast(comm, buffer, parts[0], root, tag);
    case 1: return comm_checks_all_gather(comm, buffer, parts[0], false, tag);
    case 2: return comm_checks_all_gather(comm, buffer, parts[0], true, tag);
    case 3: return comm_checks_gather(comm, buffer, parts, root, tag);
    case 4: return comm_checks_message(comm, buffer, parts[0], root, other, tag);
    default: return comm_barrier(comm, &err) == STATUS_OK ? NULL : "barrier failed";
    }
}

/* n_rounds random operations, one behind the other. */
static inline const char *comm_checks_mixed(struct comm *comm, uint64_t seed, int n_rounds) {
    char *buffer = malloc(COMM_CHECKS_MAX_BYTES + 1);
    if (buffer == NULL) abort();
    const char *wrong = NULL;
    for (int round = 0; round < n_rounds && wrong == NULL; round++) {
        wrong = comm_checks_one(comm, buffer, seed, (uint64_t)round);
    }
    if (wrong != NULL) comm_abort(comm, wrong);
    free(buffer);
    return wrong;
}

/* Every operation with every size at the edges, from nothing to 3 MiB. */
static inline const char *comm_checks_sizes(struct comm *comm) {
    static const size_t sizes[] = {0,     1,     4095,   4096,   4097,   65535,
                                   65536, 65537, 131072, 131073, 3 << 20};
    int size = comm_size(comm);
    char *buffer = malloc((size_t)size * COMM_CHECKS_MAX_BYTES + 1);
    if (buffer == NULL) abort();
    const char *wrong = NULL;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes && wrong == NULL; s++) {
        int root = (int)s % size;
        size_t parts[COMM_CHECKS_MAX_RANKS];
        for (int i = 0; i < size; i++) parts[i] = i % 2 == 0 ? sizes[s] : sizes[s] / 3;
        wrong = comm_checks_broadcast(comm, buffer, sizes[s], root, s * 64);
        if (wrong == NULL) wrong = comm_checks_all_gather(comm, buffer, sizes[s], s % 2, s);
        if (wrong == NULL) wrong = comm_checks_gather(comm, buffer, parts, root, s);
        if (wrong == NULL && size > 1) {
            wrong = comm_checks_message(comm, buffer, sizes[s], root, (root + 1) % size, s);
        }
    }
    if (wrong != NULL) comm_abort(comm, wrong);
    free(buffer);
    return wrong;
}
