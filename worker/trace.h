/* What a rank did when: spans with round numbers, kept in memory and written at the end as one
 * file in Chrome's trace event format (chrome://tracing, ui.perfetto.dev), one lane per rank.
 *
 * One trace per rank, used by its compute thread. Every function takes NULL for "no trace" and
 * does nothing then. Clocks are those of the hosts, aligned at trace_create by a barrier. */
#pragma once
#include <stdint.h>

#include "common/error.h"
#include "worker/comm/comm.h"

struct trace;

/* Collective over `world`. `lane` names this rank's lane ("rank 0: target 0/1"), up to 63 bytes. */
enum status trace_create(struct trace **out, struct comm *world, const char *lane,
                         struct error *err);
void trace_destroy(struct trace *trace);

/* The round that spans added from now on belong to. */
void trace_set_round(struct trace *trace, uint32_t round);
uint32_t trace_round(const struct trace *trace);

/* A span on clock_now_ns's clock. `name` is a literal. The oldest spans are overwritten when more
 * than TRACE_SPANS have been added. */
enum { TRACE_SPANS = 1 << 18 };
void trace_add(struct trace *trace, const char *name, int64_t start_ns, int64_t end_ns);

/* Collective over `world`: rank 0 gathers all lanes and writes the file. UNAVAILABLE with path and
 * reason when it cannot (at rank 0 only). */
enum status trace_write(struct trace *trace, struct comm *world, const char *path,
                        struct error *err);
