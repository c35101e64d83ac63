#include "common/metrics.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/error.h"

enum metric_kind { METRIC_COUNTER, METRIC_GAUGE, METRIC_HISTOGRAM, METRIC_SECONDS };

struct metric {
    struct metric *next;
    enum metric_kind kind;
    char *name, *labels, *help;
    _Atomic uint64_t count;        /* counter; seconds: microseconds; histogram: observations */
    _Atomic uint64_t value_bits;   /* a double: gauge; histogram: sum */
    const double *bounds;
    size_t n_bounds;
    _Atomic uint64_t *buckets;     /* [n_bounds + 1], not cumulative */
};

struct metrics {
    struct metric *first, **end;
};

const double METRICS_REQUEST_SECONDS[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,
                                          0.25,  0.5,   0.75, 1,    2.5,  5,    7.5,  10,
                                          20,    40,    80,   160,  640,  2560};
const size_t METRICS_N_REQUEST_SECONDS =
    sizeof METRICS_REQUEST_SECONDS / sizeof *METRICS_REQUEST_SECONDS;
const double METRICS_TOKEN_SECONDS[] = {0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025,
                                        0.05,   0.075, 0.1,   0.15,  0.2,   0.3,    0.4,  0.5,
                                        0.75,   1,     2.5,   5,     10,    20,     40,   80};
const size_t METRICS_N_TOKEN_SECONDS = sizeof METRICS_TOKEN_SECONDS / sizeof *METRICS_TOKEN_SECONDS;
const double METRICS_STEP_TOKENS[] = {1,   8,    16,   32,   64,   128,  256,
                                      512, 1024, 2048, 4096, 8192, 16384};
const size_t METRICS_N_STEP_TOKENS = sizeof METRICS_STEP_TOKENS / sizeof *METRICS_STEP_TOKENS;

struct metrics *metrics_create(void) {
    struct metrics *metrics = xcalloc(1, sizeof *metrics);
    metrics->end = &metrics->first;
    return metrics;
}

void metrics_destroy(struct metrics *metrics) {
    if (metrics == NULL) return;
    for (struct metric *metric = metrics->first, *next; metric != NULL; metric = next) {
        next = metric->next;
        free(metric->name);
        free(metric->labels);
        free(metric->help);
        free(metric->buckets);
        free(metric);
    }
    free(metrics);
}

static struct metric *register_metric(struct metrics *metrics, enum metric_kind kind,
                                      const char *name, const char *labels, const char *help) {
    struct metric *metric = xcalloc(1, sizeof *metric);
    metric->kind = kind;
    metric->name = xstrdup(name);
    metric->labels = xstrdup(labels);
    metric->help = xstrdup(help);
    *metrics->end = metric;
    metrics->end = &metric->next;
    return metric;
}

struct metric *metrics_counter(struct metrics *metrics, const char *name, const char *labels,
                               const char *help) {
    return register_metric(metrics, METRIC_COUNTER, name, labels, help);
}

struct metric *metrics_seconds(struct metrics *metrics, const char *name, const char *labels,
                               const char *help) {
    return register_metric(metrics, METRIC_SECONDS, name, labels, help);
}

struct metric *metrics_gauge(struct metrics *metrics, const char *name, const char *labels,
                             const char *help) {
    return register_metric(metrics, METRIC_GAUGE, name, labels, help);
}

struct metric *metrics_histogram(struct metrics *metrics, const char *name, const char *labels,
                                 const char *help, const double *bounds, size_t n_bounds) {
    struct metric *metric = register_metric(metrics, METRIC_HISTOGRAM, name, labels, help);
    metric->bounds = bounds;
    metric->n_bounds = n_bounds;
    metric->buckets = xcalloc(n_bounds + 1, sizeof *metric->buckets);
    return metric;
}

void metrics_label(char *out, size_t size, const char *key, const char *value) {
    size_t n = (size_t)snprintf(out, size, "%s=\"", key);
    for (; *value != '\0' && n + 4 < size; value++) {
        if (*value == '"' || *value == '\\' || *value == '\n') out[n++] = '\\';
        out[n++] = *value == '\n' ? 'n' : *value;
    }
    if (n + 2 <= size) memcpy(out + n, "\"", 2);
}

static double double_of(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint64_t bits_of(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

void metric_add(struct metric *metric, uint64_t n) {
    atomic_fetch_add_explicit(&metric->count, n, memory_order_relaxed);
}

void metric_set(struct metric *metric, double value) {
    atomic_store_explicit(&metric->value_bits, bits_of(value), memory_order_relaxed);
}

void metric_observe(struct metric *metric, double value) {
    metric_observe_many(metric, value, 1);
}

void metric_observe_many(struct metric *metric, double value, uint64_t times) {
    size_t bucket = 0;
    while (bucket < metric->n_bounds && value > metric->bounds[bucket]) bucket++;
    atomic_fetch_add_explicit(&metric->buckets[bucket], times, memory_order_relaxed);
    atomic_fetch_add_explicit(&metric->count, times, memory_order_relaxed);
    uint64_t seen = atomic_load_explicit(&metric->value_bits, memory_order_relaxed), next;
    do {
        next = bits_of(double_of(seen) + value * (double)times);
    } while (!atomic_compare_exchange_weak(&metric->value_bits, &seen, next));
}

uint64_t metric_count(const struct metric *metric) {
    return atomic_load_explicit(&metric->count, memory_order_relaxed);
}

static void render_histogram(FILE *out, const struct metric *metric) {
    const char *comma = metric->labels[0] != '\0' ? "," : "";
    uint64_t total = 0;
    for (size_t i = 0; i <= metric->n_bounds; i++) {
        total += atomic_load_explicit(&metric->buckets[i], memory_order_relaxed);
        char bound[32] = "+Inf";
        if (i < metric->n_bounds) snprintf(bound, sizeof bound, "%g", metric->bounds[i]);
        fprintf(out, "%s_bucket{%s%sle=\"%s\"} %" PRIu64 "\n", metric->name, metric->labels, comma,
                bound, total);
    }
    const char *open = comma[0] ? "{" : "", *close = comma[0] ? "}" : "";
    double sum = double_of(atomic_load_explicit(&metric->value_bits, memory_order_relaxed));
    fprintf(out, "%s_sum%s%s%s %.17g\n", metric->name, open, metric->labels, close, sum);
    /* The total of the buckets above, so that the lines of one reading agree. */
    fprintf(out, "%s_count%s%s%s %" PRIu64 "\n", metric->name, open, metric->labels, close, total);
}

static void render_metric(FILE *out, const struct metric *metric) {
    if (metric->kind == METRIC_HISTOGRAM) {
        render_histogram(out, metric);
        return;
    }
    const char *open = metric->labels[0] ? "{" : "", *close = metric->labels[0] ? "}" : "";
    fprintf(out, "%s%s%s%s ", metric->name, open, metric->labels, close);
    if (metric->kind == METRIC_COUNTER) {
        fprintf(out, "%" PRIu64 "\n", metric_count(metric));
    } else if (metric->kind == METRIC_SECONDS) {
        uint64_t us = metric_count(metric);
        fprintf(out, "%" PRIu64 ".%06" PRIu64 "\n", us / 1000000, us % 1000000);
    } else {
        uint64_t bits = atomic_load_explicit(&metric->value_bits, memory_order_relaxed);
        fprintf(out, "%.17g\n", double_of(bits));
    }
}

char *metrics_render(const struct metrics *metrics, size_t *n_bytes) {
    static const char *const kinds[] = {"counter", "gauge", "histogram", "counter"};
    char *text = NULL;
    FILE *out = open_memstream(&text, n_bytes);
    CHECK(out != NULL);
    const char *family = "";
    for (const struct metric *metric = metrics->first; metric != NULL; metric = metric->next) {
        if (strcmp(family, metric->name) != 0) {
            fprintf(out, "# HELP %s %s\n# TYPE %s %s\n", metric->name, metric->help, metric->name,
                    kinds[metric->kind]);
        }
        family = metric->name;
        render_metric(out, metric);
    }
    CHECK(fclose(out) == 0);
    return text;
}
