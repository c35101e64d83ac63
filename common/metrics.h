/* Metrics: counters, gauges and histograms, rendered as Prometheus text (version 0.0.4).
 *
 * Owner: the process that creates the registry; metrics live until metrics_destroy. Registering is
 * for one thread, before anybody updates; updating and rendering may happen on any thread, without
 * locks: a value is one relaxed atomic. A histogram rendered during an update may lack that update
 * in one of its lines. */
#pragma once
#include <stddef.h>
#include <stdint.h>

struct metrics;
struct metric;

struct metrics *metrics_create(void);
void metrics_destroy(struct metrics *metrics);

/* Registers one series and starts it at 0. `labels`: the inside of the braces, already quoted
 * (`reason="stop"`, see metrics_label), "" for none. Series of one name are registered one after the
 * other, with the same kind and help. Strings are copied. */
struct metric *metrics_counter(struct metrics *metrics, const char *name, const char *labels,
                               const char *help);
/* A counter of time: metric_add takes microseconds, the text shows seconds. */
struct metric *metrics_seconds(struct metrics *metrics, const char *name, const char *labels,
                               const char *help);
struct metric *metrics_gauge(struct metrics *metrics, const char *name, const char *labels,
                             const char *help);
/* `bounds` [n_bounds], ascending upper bounds, borrowed; the bucket to +Inf is added. */
struct metric *metrics_histogram(struct metrics *metrics, const char *name, const char *labels,
                                 const char *help, const double *bounds, size_t n_bounds);

/* Writes `key="value"` with quotes, backslashes and line ends escaped; cuts at `size`. */
void metrics_label(char *out, size_t size, const char *key, const char *value);

void metric_add(struct metric *counter, uint64_t n);
void metric_set(struct metric *gauge, double value);
void metric_observe(struct metric *histogram, double value);
/* `times` observations of the same value. */
void metric_observe_many(struct metric *histogram, double value, uint64_t times);

/* A counter's value (of time: microseconds). */
uint64_t metric_count(const struct metric *counter);

/* The text of all metrics, malloc'd for the caller, NUL-terminated; *n_bytes without the NUL. */
char *metrics_render(const struct metrics *metrics, size_t *n_bytes);

/* vLLM's bounds for times of whole requests and for times between tokens (with finer steps below
 * 10 ms), seconds; and for tokens of a step. */
extern const double METRICS_REQUEST_SECONDS[];
extern const size_t METRICS_N_REQUEST_SECONDS;
extern const double METRICS_TOKEN_SECONDS[];
extern const size_t METRICS_N_TOKEN_SECONDS;
extern const double METRICS_STEP_TOKENS[];
extern const size_t METRICS_N_STEP_TOKENS;
