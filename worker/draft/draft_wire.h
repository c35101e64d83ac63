/* Orders and answers as bytes between the leaders of target and draft (remote_drafter.c and
 * draft_service.c). Both ends are the same program on the same kind of machine: structures travel
 * as they are. A message is sent as one part of fixed size, and a second where it is longer. */
#pragma once
#include "worker/comm/comm.h"
#include "worker/draft/drafter.h"

enum draft_wire_kind {
    DRAFT_WIRE_ORDER,        /* target to draft; answered by one or two ANSWERs */
    DRAFT_WIRE_DISTRIBUTION, /* target to draft: {slot, index}; answered by DISTRIBUTION: floats */
    DRAFT_WIRE_STOP,
    DRAFT_WIRE_ANSWER,
    DRAFT_WIRE_FAILURE, /* instead of an answer: {status, words} */
    DRAFT_WIRE_PING,    /* answered by a PING: measures the line */
};

/* A message being written or read. Zero-initialised; free with draft_wire_free. */
struct draft_wire {
    char *bytes;
    size_t n_bytes, capacity;
    size_t at; /* reading */
};

void draft_wire_free(struct draft_wire *wire);

/* Writing: begin, add, send. */
void draft_wire_begin(struct draft_wire *wire, enum draft_wire_kind kind);
void draft_wire_add(struct draft_wire *wire, const void *data, size_t bytes);
enum status draft_wire_send(struct draft_wire *wire, struct comm *pair, int to,
                            struct error *err);

/* Reading: receive, then take what was added, in its order; pointers are aligned to 8 and borrowed
 * until the next receive. CHECKs that there is as much. */
enum status draft_wire_receive(struct draft_wire *wire, enum draft_wire_kind *kind,
                               struct comm *pair, int from, struct error *err);
const void *draft_wire_take(struct draft_wire *wire, size_t bytes);

/* An order in a message of its own, and back. The arrays of *order are borrowed from the message,
 * or from `arrays`, which is reused and freed with draft_wire_arrays_free. */
struct draft_wire_arrays {
    struct draft_begin *begins;
    struct draft_job *jobs;
    int begin_capacity, job_capacity;
};
void draft_wire_put_order(struct draft_wire *wire, const struct draft_order *order);
void draft_wire_get_order(struct draft_wire *wire, struct draft_order *order,
                          struct draft_wire_arrays *arrays);
void draft_wire_arrays_free(struct draft_wire_arrays *arrays);
