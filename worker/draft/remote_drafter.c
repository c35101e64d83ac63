#include "worker/draft/remote_drafter.h"

#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "worker/draft/draft_wire.h"

enum { DRAFT_RANK = 1, N_PINGS = 64 };

struct remote_drafter {
    struct drafter head;
    struct comm *pair;
    int vocab;
    int n_jobs; /* of the last order */
    struct draft_wire out, in;
};

/* The next message from there, which must be of this kind or say why there is none. */
static enum status expect(struct remote_drafter *d, enum draft_wire_kind wanted,
                          struct error *err) {
    enum draft_wire_kind kind;
    TRY(draft_wire_receive(&d->in, &kind, d->pair, DRAFT_RANK, err));
    if (kind == wanted) return STATUS_OK;
    CHECK(kind == DRAFT_WIRE_FAILURE);
    enum status status;
    memcpy(&status, draft_wire_take(&d->in, sizeof status), sizeof status);
    const char *words = draft_wire_take(&d->in, sizeof err->text);
    return error_set(err, status, "the draft's leader: %s", words);
}

static enum status start(struct drafter *head, const struct draft_order *order,
                         struct error *err) {
    struct remote_drafter *d = (struct remote_drafter *)head;
    d->n_jobs = order->n_jobs;
    draft_wire_put_order(&d->out, order);
    return draft_wire_send(&d->out, d->pair, DRAFT_RANK, err);
}

static enum status collect(struct drafter *head, struct draft_chain *chains, bool all,
                           struct draft_report *report, struct error *err) {
    (void)all;
    struct remote_drafter *d = (struct remote_drafter *)head;
    TRY(expect(d, DRAFT_WIRE_ANSWER, err));
    const struct draft_report *told = draft_wire_take(&d->in, sizeof *told);
    if (report != NULL) *report = *told;
    size_t bytes = (size_t)d->n_jobs * sizeof *chains;
    if (bytes > 0) memcpy(chains, draft_wire_take(&d->in, bytes), bytes);
    return STATUS_OK;
}

static enum status distribution(struct drafter *head, float *q, int slot, int index,
                                struct error *err) {
    struct remote_drafter *d = (struct remote_drafter *)head;
    int32_t which[2] = {slot, index};
    draft_wire_begin(&d->out, DRAFT_WIRE_DISTRIBUTION);
    draft_wire_add(&d->out, which, sizeof which);
    TRY(draft_wire_send(&d->out, d->pair, DRAFT_RANK, err));
    TRY(expect(d, DRAFT_WIRE_DISTRIBUTION, err));
    size_t bytes = (size_t)d->vocab * sizeof *q;
    memcpy(q, draft_wire_take(&d->in, bytes), bytes);
    return STATUS_OK;
}

static enum status stop(struct drafter *head, struct error *err) {
    struct remote_drafter *d = (struct remote_drafter *)head;
    draft_wire_begin(&d->out, DRAFT_WIRE_STOP);
    return draft_wire_send(&d->out, d->pair, DRAFT_RANK, err);
}

static void destroy(struct drafter *head) {
    struct remote_drafter *d = (struct remote_drafter *)head;
    draft_wire_free(&d->out);
    draft_wire_free(&d->in);
    free(d);
}

static const struct drafter_ops ops = {start, collect, distribution, stop, destroy};

/* Half of the quickest round trip: what is left when nobody sleeps. */
static enum status measure(struct remote_drafter *d, int64_t *handoff_ns, struct error *err) {
    *handoff_ns = INT64_MAX;
    for (int i = 0; i < N_PINGS; i++) {
        int64_t begin = clock_now_ns();
        draft_wire_begin(&d->out, DRAFT_WIRE_PING);
        TRY(draft_wire_send(&d->out, d->pair, DRAFT_RANK, err));
        TRY(expect(d, DRAFT_WIRE_PING, err));
        int64_t one_way = (clock_now_ns() - begin) / 2;
        if (one_way < *handoff_ns) *handoff_ns = one_way;
    }
    return STATUS_OK;
}

enum status remote_drafter_create(struct drafter **out, struct comm *pair, int vocab,
                                  int64_t *handoff_ns, struct error *err) {
    struct remote_drafter *d = xcalloc(1, sizeof *d);
    d->head.ops = &ops;
    d->pair = pair;
    d->vocab = vocab;
    enum status status = measure(d, handoff_ns, err);
    if (status == STATUS_OK) *out = &d->head;
    else destroy(&d->head);
    return status;
}
