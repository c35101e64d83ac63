/* The HTTP port: GET /metrics (Prometheus text), /healthz (200 while the process lives), /readyz (200
 * while a replica serves, else 503). Anything else is a 404 that lists these. A thread of its own. */
#pragma once
#include <stdatomic.h>
#include <stdbool.h>

#include "common/error.h"
#include "common/metrics.h"

struct http;

/* Binds host:port (port 0: any free one). `metrics` and `ready` are borrowed until http_stop.
 * UNAVAILABLE when the address cannot be bound. */
enum status http_start(struct http **out, const char *host, int port, const struct metrics *metrics,
                       const atomic_bool *ready, struct error *err);
int http_port(const struct http *http);
void http_stop(struct http *http);
