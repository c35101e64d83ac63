#include "worker/trace.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"

/* Fixed size, so that lanes can be gathered as bytes. */
struct span {
    char name[16];
    int64_t start_ns, end_ns; /* since the barrier */
    uint32_t round;
    uint32_t unused;
};

struct lane {
    char name[64];
    uint64_t n_spans;
};

struct trace {
    struct lane lane;
    int64_t zero_ns;
    uint32_t round;
    uint64_t n_added;
    struct span *spans; /* [TRACE_SPANS] a ring */
};

enum status trace_create(struct trace **out, struct comm *world, const char *lane,
                         struct error *err) {
    struct trace *trace = xcalloc(1, sizeof *trace);
    snprintf(trace->lane.name, sizeof trace->lane.name, "%s", lane);
    trace->spans = xcalloc(TRACE_SPANS, sizeof *trace->spans);
    enum status status = comm_barrier(world, err);
    trace->zero_ns = clock_now_ns();
    if (status == STATUS_OK) *out = trace;
    else trace_destroy(trace);
    return status;
}

void trace_destroy(struct trace *trace) {
    if (trace == NULL) return;
    free(trace->spans);
    free(trace);
}

void trace_set_round(struct trace *trace, uint32_t round) {
    if (trace != NULL) trace->round = round;
}

uint32_t trace_round(const struct trace *trace) {
    return trace != NULL ? trace->round : 0;
}

void trace_add(struct trace *trace, const char *name, int64_t start_ns, int64_t end_ns) {
    if (trace == NULL) return;
    struct span *span = &trace->spans[trace->n_added++ % TRACE_SPANS];
    *span = (struct span){.start_ns = start_ns - trace->zero_ns,
                          .end_ns = end_ns - trace->zero_ns,
                          .round = trace->round};
    snprintf(span->name, sizeof span->name, "%s", name);
}

/* --- the file -------------------------------------------------------------------------------- */

static void write_lane(FILE *file, int rank, const struct lane *lane, const struct span *spans) {
    fprintf(file,
            "%s{\"ph\":\"M\",\"pid\":0,\"tid\":%d,\"name\":\"thread_name\",\"args\":{\"name\":\"%s\"}}",
            rank > 0 ? ",\n" : "", rank, lane->name);
    fprintf(file,
            ",\n{\"ph\":\"M\",\"pid\":0,\"tid\":%d,\"name\":\"thread_sort_index\","
            "\"args\":{\"sort_index\":%d}}", rank, rank);
    for (uint64_t i = 0; i < lane->n_spans; i++) {
        const struct span *span = &spans[i];
        fprintf(file,
                ",\n{\"ph\":\"X\",\"pid\":0,\"tid\":%d,\"name\":\"%s\",\"ts\":%.3f,\"dur\":%.3f,"
                "\"args\":{\"round\":%" PRIu32 "}}", rank, span->name,
                (double)span->start_ns / 1e3, (double)(span->end_ns - span->start_ns) / 1e3,
                span->round);
    }
}

/* The ring in order of time, at the beginning of a new array. */
static struct span *unroll(const struct trace *trace, uint64_t n_spans) {
    struct span *spans = xcalloc(n_spans + 1, sizeof *spans);
    for (uint64_t i = 0; i < n_spans; i++) {
        spans[i] = trace->spans[(trace->n_added - n_spans + i) % TRACE_SPANS];
    }
    return spans;
}

static enum status open_file(FILE **out, const char *path, struct error *err) {
    *out = fopen(path, "w");
    if (*out != NULL) return STATUS_OK;
    return error_set(err, STATUS_UNAVAILABLE, "--trace %s: %s", path, strerror(errno));
}

enum status trace_write(struct trace *trace, struct comm *world, const char *path,
                        struct error *err) {
    int n_ranks = comm_size(world), rank = comm_rank(world);
    uint64_t n = trace->n_added < TRACE_SPANS ? trace->n_added : TRACE_SPANS;
    trace->lane.n_spans = n;
    struct lane *lanes = xcalloc((size_t)n_ranks, sizeof *lanes);
    struct span *spans = unroll(trace, n);
    FILE *file = NULL;
    enum status status = comm_all_gather(world, lanes, &trace->lane, sizeof trace->lane, err);
    enum status opened = STATUS_OK;
    if (status == STATUS_OK && rank == 0) {
        opened = open_file(&file, path, err);
        if (file != NULL) fprintf(file, "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n");
    }
    for (int i = 0; i < n_ranks && status == STATUS_OK; i++) {
        struct span *part = i == rank ? spans : xcalloc(lanes[i].n_spans + 1, sizeof *part);
        status = comm_broadcast(world, part, lanes[i].n_spans * sizeof *part, i, err);
        if (status == STATUS_OK && file != NULL) write_lane(file, i, &lanes[i], part);
        if (i != rank) free(part);
    }
    if (file != NULL) {
        fprintf(file, "\n]}\n");
        if (fclose(file) != 0 && status == STATUS_OK) {
            status = error_set(err, STATUS_UNAVAILABLE, "--trace %s: %s", path, strerror(errno));
        }
    }
    free(lanes);
    free(spans);
    return status == STATUS_OK ? opened : status;
}
