/* The trace file: lanes of all ranks, rounds, and what is left when more was added than is kept. */
#include "tests/unit/test.h"

#include <jansson.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/clock.h"
#include "worker/trace.h"

enum { N_RANKS = 3 };

struct rank_thread {
    struct comm *world;
    const char *path;
    int n_spans;
    enum status status;
    pthread_t thread;
};

static void *record(void *arg) {
    struct rank_thread *rank = arg;
    struct error err;
    struct trace *trace;
    char lane[32];
    snprintf(lane, sizeof lane, "rank %d", comm_rank(rank->world));
    rank->status = trace_create(&trace, rank->world, lane, &err);
    if (rank->status != STATUS_OK) return NULL;
    int64_t now = clock_now_ns();
    for (int i = 0; i < rank->n_spans; i++) {
        trace_set_round(trace, (uint32_t)i + 1);
        trace_add(trace, i % 2 ? "verify" : "wait", now + i * 1000, now + i * 1000 + 500);
    }
    rank->status = trace_write(trace, rank->world, rank->path, &err);
    trace_destroy(trace);
    return NULL;
}

static void record_all(const char *path, int n_spans, enum status *leader) {
    struct comm *worlds[N_RANKS];
    struct rank_thread ranks[N_RANKS];
    struct error err;
    cr_assert_eq(comm_threads_create(worlds, N_RANKS, &err), STATUS_OK);
    for (int i = 0; i < N_RANKS; i++) {
        ranks[i] = (struct rank_thread){.world = worlds[i], .path = path, .n_spans = n_spans * (i + 1)};
        pthread_create(&ranks[i].thread, NULL, record, &ranks[i]);
    }
    for (int i = 0; i < N_RANKS; i++) pthread_join(ranks[i].thread, NULL);
    for (int i = 0; i < N_RANKS; i++) comm_destroy(worlds[i]);
    *leader = ranks[0].status;
    for (int i = 1; i < N_RANKS; i++) cr_assert_eq(ranks[i].status, STATUS_OK);
}

/* Spans of each lane, and whether rounds and times are those that were added. */
static void check(const char *path, int n_spans, int kept_of_last) {
    json_error_t problem;
    json_t *root = json_load_file(path, 0, &problem), *event;
    cr_assert_not_null(root, "%s", problem.text);
    int counts[N_RANKS] = {0}, names[N_RANKS] = {0};
    size_t i;
    json_array_foreach(json_object_get(root, "traceEvents"), i, event) {
        int lane = (int)json_integer_value(json_object_get(event, "tid"));
        const char *name = json_string_value(json_object_get(event, "name"));
        names[lane] += strcmp(name, "thread_name") == 0;
        if (strcmp(json_string_value(json_object_get(event, "ph")), "X") != 0) continue;
        int total = n_spans * (lane + 1), kept = lane == N_RANKS - 1 ? kept_of_last : total;
        int round = (int)json_integer_value(
            json_object_get(json_object_get(event, "args"), "round"));
        cr_assert_eq(round, total - kept + counts[lane] + 1);
        cr_assert_str_eq(name, (round - 1) % 2 ? "verify" : "wait");
        cr_assert(json_number_value(json_object_get(event, "dur")) == 0.5);
        counts[lane]++;
    }
    for (int lane = 0; lane < N_RANKS; lane++) cr_assert_eq(names[lane], 1);
    cr_assert(counts[0] == n_spans && counts[1] == 2 * n_spans && counts[2] == kept_of_last);
    json_decref(root);
}

Test(trace, lanes_of_all_ranks) {
    char path[] = "/tmp/tandem_trace_XXXXXX";
    enum status leader;
    close(mkstemp(path));
    record_all(path, 7, &leader);
    cr_assert_eq(leader, STATUS_OK);
    check(path, 7, 21);
    unlink(path);
}

Test(trace, keeps_the_latest) {
    char path[] = "/tmp/tandem_trace_XXXXXX";
    enum status leader;
    close(mkstemp(path));
    record_all(path, TRACE_SPANS / 2 - 100, &leader);
    cr_assert_eq(leader, STATUS_OK);
    check(path, TRACE_SPANS / 2 - 100, TRACE_SPANS);
    unlink(path);
}

Test(trace, a_path_that_cannot_be_written) {
    enum status leader;
    record_all("/nowhere/at/all.json", 3, &leader);
    cr_assert_eq(leader, STATUS_UNAVAILABLE);
    trace_add(NULL, "nothing", 0, 1);
    cr_assert_eq(trace_round(NULL), 0);
}
