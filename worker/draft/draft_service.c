#include "worker/draft/draft_service.h"

#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "worker/draft/draft_wire.h"
#include "worker/draft/model_drafter.h"
#include "worker/trace.h"

enum { TARGET_RANK = 0 };

struct service {
    const struct draft_service_options *options;
    struct draft_wire in, out;
    struct draft_wire_arrays arrays;
    struct draft_chain *chains; /* [max_sequences] */
    float *distribution;        /* [vocab] */
    /* The slack between an answer and the next order, and what a calibration in it takes. */
    int64_t answered_ns, slack_ns, calibrate_ns;
    bool calibrated; /* in the slack that is going on */
};

/* An order this soon was there before; a pause this long was no slack: there was nothing to do. */
enum { AT_ONCE_NS = 5000, PAUSE_NS = 200 * 1000 * 1000 };

/* A moving average over about eight values. */
static void average(int64_t *mean, int64_t value) {
    *mean = *mean == 0 ? value : *mean + (value - *mean) / 8;
}

static enum status answer(struct service *s, const struct draft_order *order, bool all,
                          struct error *err) {
    struct draft_report report = {0};
    TRY(drafter_collect(s->options->drafter, s->chains, all, &report, err));
    if (report.calibrate_ns == 0) report.calibrate_ns = s->calibrate_ns;
    draft_wire_begin(&s->out, DRAFT_WIRE_ANSWER);
    draft_wire_add(&s->out, &report, sizeof report);
    draft_wire_add(&s->out, s->chains, (size_t)order->n_jobs * sizeof *s->chains);
    return draft_wire_send(&s->out, s->options->pair, TARGET_RANK, err);
}

/* Where the wait for the verdict has lately been long enough, the calibration costs nothing there.
 * The first one is tried to see what it takes. */
static enum status use_slack(struct service *s, struct error *err) {
    if (!model_drafter_is_fuzzy(s->options->drafter)) return STATUS_OK;
    if (s->calibrate_ns > 0 && s->slack_ns < s->calibrate_ns) return STATUS_OK;
    int64_t took_ns;
    TRY(model_drafter_calibrate(s->options->drafter, &took_ns, err));
    s->calibrated = took_ns > 0;
    if (took_ns > 0) average(&s->calibrate_ns, took_ns);
    return STATUS_OK;
}

static enum status serve_order(struct service *s, struct error *err) {
    struct draft_order order;
    draft_wire_get_order(&s->in, &order, &s->arrays);
    TRY(drafter_start(s->options->drafter, &order, err));
    if (order.early) TRY(answer(s, &order, false, err));
    TRY(answer(s, &order, true, err));
    s->answered_ns = clock_now_ns();
    return use_slack(s, err);
}

static enum status serve_distribution(struct service *s, struct error *err) {
    const int32_t *which = draft_wire_take(&s->in, 2 * sizeof *which);
    size_t bytes = (size_t)s->options->vocab * sizeof *s->distribution;
    memset(s->distribution, 0, bytes);
    TRY(drafter_distribution(s->options->drafter, s->distribution, which[0], which[1], err));
    draft_wire_begin(&s->out, DRAFT_WIRE_DISTRIBUTION);
    draft_wire_add(&s->out, s->distribution, bytes);
    return draft_wire_send(&s->out, s->options->pair, TARGET_RANK, err);
}

static enum status serve_ping(struct service *s, struct error *err) {
    draft_wire_begin(&s->out, DRAFT_WIRE_PING);
    return draft_wire_send(&s->out, s->options->pair, TARGET_RANK, err);
}

/* An order that was there when the calibration ended says only that the slack was shorter. */
static void note_slack(struct service *s, int64_t waited_ns, int64_t now_ns) {
    int64_t slack_ns = now_ns - s->answered_ns;
    if (s->calibrated && waited_ns < AT_ONCE_NS) slack_ns = s->calibrate_ns / 2;
    if (s->answered_ns != 0 && slack_ns < PAUSE_NS) average(&s->slack_ns, slack_ns);
    s->calibrated = false;
}

static enum status receive(struct service *s, enum draft_wire_kind *kind, struct error *err) {
    int64_t begin = clock_now_ns();
    TRY(draft_wire_receive(&s->in, kind, s->options->pair, TARGET_RANK, err));
    int64_t now = clock_now_ns();
    trace_add(s->options->trace, "wait", begin, now);
    if (*kind == DRAFT_WIRE_ORDER) note_slack(s, now - begin, now);
    return STATUS_OK;
}

static enum status serve(struct service *s, struct error *err) {
    for (;;) {
        enum draft_wire_kind kind;
        TRY(receive(s, &kind, err));
        switch (kind) {
        case DRAFT_WIRE_ORDER: TRY(serve_order(s, err)); break;
        case DRAFT_WIRE_DISTRIBUTION: TRY(serve_distribution(s, err)); break;
        case DRAFT_WIRE_PING: TRY(serve_ping(s, err)); break;
        case DRAFT_WIRE_STOP: return STATUS_OK;
        default: return error_set(err, STATUS_INTERNAL, "a message of kind %d to the draft", kind);
        }
    }
}

/* The target's leader waits for an answer: it gets the reason instead. */
static void send_failure(struct service *s, enum status status, const struct error *err) {
    struct error ignored;
    draft_wire_begin(&s->out, DRAFT_WIRE_FAILURE);
    draft_wire_add(&s->out, &status, sizeof status);
    draft_wire_add(&s->out, err->text, sizeof err->text);
    draft_wire_send(&s->out, s->options->pair, TARGET_RANK, &ignored);
}

enum status draft_service_run(const struct draft_service_options *options, struct error *err) {
    struct service s = {.options = options};
    s.chains = xcalloc((size_t)options->max_sequences, sizeof *s.chains);
    s.distribution = xcalloc((size_t)options->vocab, sizeof *s.distribution);
    enum status status = serve(&s, err);
    if (status != STATUS_OK) {
        log_error("%s", err->text);
        send_failure(&s, status, err);
    }
    draft_wire_free(&s.in);
    draft_wire_free(&s.out);
    draft_wire_arrays_free(&s.arrays);
    free(s.chains);
    free(s.distribution);
    return status;
}
