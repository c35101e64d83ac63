#include "common/metrics.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "tests/unit/test.h"

static bool has(const char *text, const char *line) {
    return strstr(text, line) != NULL;
}

Test(metrics, renders_counters_and_gauges_with_one_header_for_a_family) {
    size_t n;
    struct metrics *metrics = metrics_create();
    struct metric *a = metrics_counter(metrics, "t_done_total", "reason=\"a\"", "Done.");
    struct metric *b = metrics_counter(metrics, "t_done_total", "reason=\"b\"", "Done.");
    struct metric *level = metrics_gauge(metrics, "t_level", "", "Level.");
    metric_add(a, 2);
    metric_add(a, 3);
    metric_add(b, 7);
    metric_set(level, 0.25);
    char *text = metrics_render(metrics, &n);
    cr_assert_str_eq(text,
                     "# HELP t_done_total Done.\n# TYPE t_done_total counter\n"
                     "t_done_total{reason=\"a\"} 5\nt_done_total{reason=\"b\"} 7\n"
                     "# HELP t_level Level.\n# TYPE t_level gauge\nt_level 0.25\n");
    cr_assert_eq(n, strlen(text));
    free(text);
    metrics_destroy(metrics);
}

Test(metrics, histogram_buckets_are_cumulative_and_bounds_are_inclusive) {
    static const double bounds[] = {1, 2.5};
    size_t n;
    struct metrics *metrics = metrics_create();
    struct metric *plain = metrics_histogram(metrics, "t_s", "", "S.", bounds, 2);
    struct metric *labelled = metrics_histogram(metrics, "u_s", "k=\"v\"", "U.", bounds, 2);
    metric_observe(plain, 1);
    metric_observe(plain, 1.5);
    metric_observe_many(plain, 8, 2);
    metric_observe(labelled, 0.5);
    char *text = metrics_render(metrics, &n);
    cr_assert(has(text, "t_s_bucket{le=\"1\"} 1\nt_s_bucket{le=\"2.5\"} 2\n"
                        "t_s_bucket{le=\"+Inf\"} 4\nt_s_sum 18.5\nt_s_count 4\n"));
    cr_assert(has(text, "u_s_bucket{k=\"v\",le=\"1\"} 1\n"));
    cr_assert(has(text, "u_s_count{k=\"v\"} 1\n"));
    free(text);
    metrics_destroy(metrics);
}

Test(metrics, time_is_counted_in_microseconds_and_shown_in_seconds) {
    size_t n;
    struct metrics *metrics = metrics_create();
    struct metric *wait = metrics_seconds(metrics, "t_wait_seconds_total", "", "Waited.");
    metric_add(wait, 999999);
    metric_add(wait, 2000006);
    char *text = metrics_render(metrics, &n);
    cr_assert_str_eq(text, "# HELP t_wait_seconds_total Waited.\n"
                           "# TYPE t_wait_seconds_total counter\nt_wait_seconds_total 3.000005\n");
    cr_assert_eq(metric_count(wait), 3000005);
    free(text);
    metrics_destroy(metrics);
}

Test(metrics, label_values_are_escaped_and_cut) {
    char label[64], small[10];
    metrics_label(label, sizeof label, "model", "a\"b\\c\nd");
    cr_assert_str_eq(label, "model=\"a\\\"b\\\\c\\nd\"");
    metrics_label(small, sizeof small, "k", "0123456789");
    cr_assert(strlen(small) < sizeof small);
    cr_assert_eq(small[strlen(small) - 1], '"');
}
