#include "worker/draft/draft_wire.h"

#include <stdlib.h>
#include <string.h>

/* One chunk of comm.h's channels holds a round of a few sequences. */
enum { FIRST_BYTES = 2048, ALIGNMENT = 8 };

struct head {
    uint64_t n_bytes; /* of the whole message, this head included */
    uint32_t kind, unused;
};

static size_t padded(size_t bytes) {
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static void reserve(struct draft_wire *wire, size_t bytes) {
    if (bytes < FIRST_BYTES) bytes = FIRST_BYTES;
    if (bytes <= wire->capacity) return;
    wire->capacity = 2 * bytes;
    wire->bytes = xrealloc(wire->bytes, wire->capacity);
}

void draft_wire_free(struct draft_wire *wire) {
    free(wire->bytes);
    *wire = (struct draft_wire){0};
}

void draft_wire_begin(struct draft_wire *wire, enum draft_wire_kind kind) {
    struct head head = {.kind = kind};
    wire->n_bytes = 0;
    draft_wire_add(wire, &head, sizeof head);
}

void draft_wire_add(struct draft_wire *wire, const void *data, size_t bytes) {
    size_t whole = padded(bytes);
    reserve(wire, wire->n_bytes + whole);
    if (bytes > 0) memcpy(wire->bytes + wire->n_bytes, data, bytes);
    memset(wire->bytes + wire->n_bytes + bytes, 0, whole - bytes);
    wire->n_bytes += whole;
}

enum status draft_wire_send(struct draft_wire *wire, struct comm *pair, int to,
                            struct error *err) {
    uint64_t n_bytes = wire->n_bytes;
    memcpy(wire->bytes + offsetof(struct head, n_bytes), &n_bytes, sizeof n_bytes);
    if (n_bytes < FIRST_BYTES) memset(wire->bytes + n_bytes, 0, FIRST_BYTES - n_bytes);
    TRY(comm_send(pair, wire->bytes, FIRST_BYTES, to, err));
    if (n_bytes <= FIRST_BYTES) return STATUS_OK;
    return comm_send(pair, wire->bytes + FIRST_BYTES, n_bytes - FIRST_BYTES, to, err);
}

enum status draft_wire_receive(struct draft_wire *wire, enum draft_wire_kind *kind,
                               struct comm *pair, int from, struct error *err) {
    reserve(wire, FIRST_BYTES);
    TRY(comm_recv(pair, wire->bytes, FIRST_BYTES, from, err));
    struct head head;
    memcpy(&head, wire->bytes, sizeof head);
    if (head.n_bytes > FIRST_BYTES) {
        reserve(wire, head.n_bytes);
        TRY(comm_recv(pair, wire->bytes + FIRST_BYTES, head.n_bytes - FIRST_BYTES, from, err));
    }
    wire->n_bytes = head.n_bytes;
    wire->at = sizeof head;
    *kind = (enum draft_wire_kind)head.kind;
    return STATUS_OK;
}

const void *draft_wire_take(struct draft_wire *wire, size_t bytes) {
    CHECK(wire->at + padded(bytes) <= wire->n_bytes);
    const void *data = wire->bytes + wire->at;
    wire->at += padded(bytes);
    return data;
}

/* --- orders ------------------------------------------------------------------------------------ */

void draft_wire_put_order(struct draft_wire *wire, const struct draft_order *order) {
    draft_wire_begin(wire, DRAFT_WIRE_ORDER);
    draft_wire_add(wire, order, sizeof *order);
    draft_wire_add(wire, order->ends, (size_t)order->n_ends * sizeof *order->ends);
    for (int i = 0; i < order->n_begins; i++) {
        const struct draft_begin *begin = &order->begins[i];
        draft_wire_add(wire, begin, sizeof *begin);
        draft_wire_add(wire, begin->tokens, (size_t)begin->n_tokens * sizeof *begin->tokens);
        draft_wire_add(wire, begin->sampling.bias,
                       (size_t)begin->sampling.n_bias * sizeof *begin->sampling.bias);
        draft_wire_add(wire, begin->stop_ids, (size_t)begin->n_stop_ids * sizeof *begin->stop_ids);
    }
    for (int i = 0; i < order->n_jobs; i++) {
        const struct draft_job *job = &order->jobs[i];
        draft_wire_add(wire, job, sizeof *job);
        draft_wire_add(wire, job->own, (size_t)job->n_own * sizeof *job->own);
    }
}

static void reserve_arrays(struct draft_wire_arrays *arrays, const struct draft_order *order) {
    if (order->n_begins > arrays->begin_capacity) {
        arrays->begin_capacity = 2 * order->n_begins;
        arrays->begins = xrealloc(arrays->begins,
                                  (size_t)arrays->begin_capacity * sizeof *arrays->begins);
    }
    if (order->n_jobs > arrays->job_capacity) {
        arrays->job_capacity = 2 * order->n_jobs;
        arrays->jobs =
            xrealloc(arrays->jobs, (size_t)arrays->job_capacity * sizeof *arrays->jobs);
    }
}

void draft_wire_get_order(struct draft_wire *wire, struct draft_order *order,
                          struct draft_wire_arrays *arrays) {
    memcpy(order, draft_wire_take(wire, sizeof *order), sizeof *order);
    reserve_arrays(arrays, order);
    order->ends = draft_wire_take(wire, (size_t)order->n_ends * sizeof *order->ends);
    order->begins = arrays->begins;
    order->jobs = arrays->jobs;
    for (int i = 0; i < order->n_begins; i++) {
        struct draft_begin *begin = &arrays->begins[i];
        memcpy(begin, draft_wire_take(wire, sizeof *begin), sizeof *begin);
        begin->tokens = draft_wire_take(wire, (size_t)begin->n_tokens * sizeof *begin->tokens);
        begin->sampling.bias =
            draft_wire_take(wire, (size_t)begin->sampling.n_bias * sizeof *begin->sampling.bias);
        begin->sampling.banned = NULL;
        begin->stop_ids =
            draft_wire_take(wire, (size_t)begin->n_stop_ids * sizeof *begin->stop_ids);
    }
    for (int i = 0; i < order->n_jobs; i++) {
        struct draft_job *job = &arrays->jobs[i];
        memcpy(job, draft_wire_take(wire, sizeof *job), sizeof *job);
        job->own = draft_wire_take(wire, (size_t)job->n_own * sizeof *job->own);
    }
}

void draft_wire_arrays_free(struct draft_wire_arrays *arrays) {
    free(arrays->begins);
    free(arrays->jobs);
    *arrays = (struct draft_wire_arrays){0};
}
