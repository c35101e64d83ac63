/* The leader's line to the coordinator: one bidirectional stream (tandem.v1.Replica/Attach),
 * dialled from here. Messages that arrive wait in an inbox until the compute thread takes them, so
 * the step loop never waits for the network. */
#pragma once
#include <stdint.h>

#include "common/error.h"
#include "tandem/v1/replica.pb-c.h"

struct link;

/* Dials "host:port" and keeps trying for `patience_ns`; says hello. UNAVAILABLE when nobody
 * answers, FAILED_PRECONDITION with the coordinator's words when it refuses. On success *plan
 * lives as long as the link. Blocks. */
enum status link_dial(struct link **out, Tandem__V1__Plan **plan, const char *target,
                      const Tandem__V1__Hello *hello, int64_t patience_ns, struct error *err);
void link_close(struct link *link);

/* Sending never blocks; a lost line is noticed by link_take. */
void link_send_progress(struct link *link, uint64_t bytes_done, uint64_t bytes_total);
void link_send_ready(struct link *link, Tandem__V1__Ready *ready);
void link_send_step(struct link *link, Tandem__V1__Step *step);
/* Says why this replica ends and gives the words time to leave. */
void link_send_fatal(struct link *link, const char *reason);

/* The next message, or NULL when none comes within wait_ns (0: do not wait). UNAVAILABLE when the
 * line is lost, with why. */
enum status link_take(struct link *link, Tandem__V1__ReplicaDown **message, int64_t wait_ns,
                      struct error *err);
void link_free_message(Tandem__V1__ReplicaDown *message);
