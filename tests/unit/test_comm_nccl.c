/* Groups of devices, over a double of NCCL (tests/doubles/): every operation against groups of host
 * memory, and each way in which a group fails. */
#include "tests/unit/test.h"

#include <nccl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "tests/doubles/nccl_double.h"
#include "tests/reference/comm_checks.h"
#include "tests/reference/rank_group.h"
#include "worker/comm/comm_links.h"
#include "worker/comm/comm_nccl.h"

enum { MAX_RANKS = 8 };
/* SHORT is waited for where somebody never comes; the others come within it, busy or not. */
static const int64_t LONG_NS = 60000000000, SHORT_NS = 1000000000;

struct rank {
    struct comm *host, *comm;
    void *stream;
    pthread_t thread;
    void (*run)(struct rank *rank);
    int64_t deadline_ns;
    bool comes_alone;
    uint64_t seed;
    int n_rounds;
    const char *wrong; /* NULL: all was right */
    enum status created, status;
    struct error err;
};

static void *rank_main(void *arg) {
    struct rank *rank = arg;
    struct comm_nccl_options options = {"target", 0, rank->deadline_ns};
    CHECK(rank->comes_alone || comm_barrier(rank->host, &rank->err) == STATUS_OK);
    rank->created = comm_nccl_create(&rank->comm, rank->host, rank->stream, &options, &rank->err);
    if (rank->created == STATUS_OK) rank->run(rank);
    return NULL;
}

/* Every rank makes the group and runs; groups live until destroy_ranks. */
static void run_ranks(struct rank *ranks, int n_ranks, int64_t deadline_ns,
                      void (*run)(struct rank *rank)) {
    struct comm *comms[MAX_RANKS];
    struct error err;
    CHECK(comm_threads_create(comms, n_ranks, &err) == STATUS_OK);
    for (int i = 0; i < n_ranks; i++) {
        ranks[i].host = comms[i];
        ranks[i].stream = nccl_double_stream_create();
        ranks[i].deadline_ns = deadline_ns;
        ranks[i].run = run;
        CHECK(pthread_create(&ranks[i].thread, NULL, rank_main, &ranks[i]) == 0);
    }
    for (int i = 0; i < n_ranks; i++) pthread_join(ranks[i].thread, NULL);
}

static void destroy_ranks(struct rank *ranks, int n_ranks) {
    for (int i = 0; i < n_ranks; i++) comm_destroy(ranks[i].comm);
    for (int i = 0; i < n_ranks; i++) {
        comm_destroy(ranks[i].host);
        nccl_double_stream_destroy(ranks[i].stream);
    }
}

static void check_nothing_is_left(int n_ranks, int n_aborted) {
    struct nccl_double_counts counts = nccl_double_counts();
    cr_assert_eq(counts.comms, 0, "%d communicators are left", counts.comms);
    cr_assert_eq(counts.events, 0, "%d events are left", counts.events);
    cr_assert_eq(counts.allocations, 0, "%d allocations are left", counts.allocations);
    cr_assert_eq(counts.aborted, n_aborted, "%d aborted", counts.aborted);
    cr_assert_eq(counts.destroyed, n_ranks - n_aborted, "%d destroyed", counts.destroyed);
}

static void check_right(struct rank *ranks, int n_ranks) {
    for (int i = 0; i < n_ranks; i++) {
        cr_assert_eq(ranks[i].created, STATUS_OK, "rank %d: %s", i, ranks[i].err.text);
        cr_assert_null(ranks[i].wrong, "rank %d of %d, seed %llu: %s", i, n_ranks,
                       (unsigned long long)ranks[i].seed, ranks[i].wrong);
    }
}

static void run_rightly(int n_ranks, uint64_t seed, int n_rounds, void (*run)(struct rank *rank)) {
    struct rank ranks[MAX_RANKS] = {0};
    for (int i = 0; i < n_ranks; i++) {
        ranks[i].seed = seed;
        ranks[i].n_rounds = n_rounds;
    }
    run_ranks(ranks, n_ranks, LONG_NS, run);
    destroy_ranks(ranks, n_ranks);
    check_right(ranks, n_ranks);
    check_nothing_is_left(n_ranks, 0);
}

static void nothing(struct rank *rank) {
    (void)rank;
}

static void use(const struct nccl_double_settings *settings) {
    struct nccl_double_settings usual = nccl_double_usual();
    nccl_double_set(settings != NULL ? settings : &usual);
}

/* --- what any group does ---------------------------------------------------------------------- */

static void mixed(struct rank *rank) {
    rank->wrong = comm_checks_mixed(rank->comm, rank->seed, rank->n_rounds);
}

static void sizes(struct rank *rank) {
    rank->wrong = comm_checks_sizes(rank->comm);
}

Test(comm_nccl, mixed_operations) {
    static const int n_ranks[] = {1, 2, 4, 8};
    for (int i = 0; i < 4; i++) {
        use(NULL);
        run_rightly(n_ranks[i], 21 + (uint64_t)i, 160 / n_ranks[i], mixed);
    }
}

Test(comm_nccl, mixed_operations_on_streams_that_execute_at_once) {
    struct nccl_double_settings settings = nccl_double_usual();
    settings.immediate = true;
    settings.lazy = 0;
    for (int n_ranks = 1; n_ranks <= 4; n_ranks++) {
        use(&settings);
        run_rightly(n_ranks, 31 + (uint64_t)n_ranks, 60, mixed);
    }
}

Test(comm_nccl, sizes_up_to_three_mebibytes) {
    static const int n_ranks[] = {1, 2, 4, 8};
    for (int i = 0; i < 4; i++) {
        use(NULL);
        run_rightly(n_ranks[i], 0, 0, sizes);
    }
}

/* --- the same bytes as on the host ------------------------------------------------------------ */

enum { PART_BYTES = 3000, BUFFER_BYTES = MAX_RANKS * PART_BYTES };

struct script {
    int op, root, other;
    size_t bytes[MAX_RANKS];
};

static struct script script_of(uint64_t seed, int step, int n_ranks) {
    struct test_random random = {seed * 1000 + (uint64_t)step};
    struct script script = {random_below(&random, 4), random_below(&random, n_ranks),
                            random_below(&random, n_ranks), {0}};
    for (int i = 0; i < n_ranks; i++) script.bytes[i] = (size_t)random_below(&random, PART_BYTES);
    return script;
}

static enum status perform(struct comm *comm, const struct script *script, char *out,
                           const char *in, struct error *err) {
    int rank = comm_rank(comm);
    size_t bytes = script->bytes[0];
    switch (script->op) {
    case 0: return comm_broadcast(comm, out, bytes, script->root, err);
    case 1: return comm_all_gather(comm, out, in, bytes, err);
    case 2: return comm_gather(comm, out, in, script->bytes, script->root, err);
    default: break;
    }
    if (script->root == script->other) return STATUS_OK;
    if (rank == script->root) return comm_send(comm, in, bytes, script->other, err);
    if (rank == script->other) return comm_recv(comm, out, bytes, script->root, err);
    return STATUS_OK;
}

enum { STEPS = 24 };

/* A chain: each step takes what the one before it brought. Waits only at its end. */
static void perform_all(struct rank *rank, struct comm *comm, char *buffers) {
    comm_checks_fill(buffers, BUFFER_BYTES, rank->seed + (uint64_t)comm_rank(comm) * 77);
    for (int step = 0; step < STEPS && rank->wrong == NULL; step++) {
        struct script script = script_of(rank->seed, step, comm_size(comm));
        char *in = buffers + (size_t)step * BUFFER_BYTES, *out = in + BUFFER_BYTES;
        if (perform(comm, &script, out, in, &rank->err) != STATUS_OK) rank->wrong = rank->err.text;
    }
    if (comm_complete(comm, &rank->err) != STATUS_OK) rank->wrong = rank->err.text;
}

static void same_as_host(struct rank *rank) {
    size_t bytes = (STEPS + 1) * BUFFER_BYTES;
    char *on_host = calloc(1, bytes), *on_device = calloc(1, bytes);
    CHECK(on_host != NULL && on_device != NULL);
    perform_all(rank, rank->host, on_host);
    perform_all(rank, rank->comm, on_device);
    if (rank->wrong == NULL && memcmp(on_host, on_device, bytes) != 0) {
        rank->wrong = "device and host differ";
    }
    free(on_host);
    free(on_device);
}

Test(comm_nccl, chains_of_operations_bring_what_the_host_brings) {
    static const int n_ranks[] = {1, 2, 4, 8};
    for (int i = 0; i < 4; i++) {
        for (uint64_t seed = 41; seed < 46; seed++) {
            use(NULL);
            run_rightly(n_ranks[i], seed, 0, same_as_host);
        }
    }
}

/* Nothing is there before it was waited for, or the other tests could not tell. */
static void look_too_early(struct rank *rank) {
    char byte = comm_rank(rank->comm) == 0 ? 'x' : '.';
    enum status status = comm_broadcast(rank->comm, &byte, 1, 0, &rank->err);
    bool early = comm_rank(rank->comm) == 1 && byte != '.';
    if (status != STATUS_OK || comm_barrier(rank->host, &rank->err) != STATUS_OK) {
        rank->wrong = "the broadcast failed";
    }
    if (comm_complete(rank->comm, &rank->err) != STATUS_OK) rank->wrong = rank->err.text;
    if (early) rank->wrong = "it was there before anybody waited";
    if (byte != 'x') rank->wrong = "it never came";
}

Test(comm_nccl, a_call_returns_before_it_is_done) {
    struct nccl_double_settings settings = nccl_double_usual();
    settings.lazy = 1000;
    use(&settings);
    run_rightly(2, 0, 0, look_too_early);
}

static void stay_behind(struct rank *rank) {
    char bytes[64] = {0};
    for (int i = 0; i < 20 && rank->wrong == NULL; i++) {
        if (comm_broadcast(rank->comm, bytes, sizeof bytes, 0, &rank->err) != STATUS_OK) {
            rank->wrong = rank->err.text;
        }
    }
    comm_destroy(rank->comm); /* waits for what is still underway into `bytes` */
    rank->comm = NULL;
}

Test(comm_nccl, leaving_waits_for_what_is_underway) {
    use(NULL);
    run_rightly(4, 0, 0, stay_behind);
}

/* --- links ------------------------------------------------------------------------------------ */

static void measure_links(struct rank *rank) {
    struct comm_link links[MAX_RANKS * MAX_RANKS] = {0};
    char buffer[20000];
    int size = comm_size(rank->comm);
    struct comm_links_options options = {rank->comm, rank->host, buffer, sizeof buffer, 20000000};
    if (comm_links_measure(links, &options, &rank->err) != STATUS_OK) rank->wrong = rank->err.text;
    for (int i = 0; i < size * size && comm_rank(rank->comm) == 0; i++) {
        bool there = links[i].latency_ns > 0 && links[i].bytes_per_second > 0;
        if (there != (i / size != i % size)) rank->wrong = "a link was not measured";
    }
}

Test(comm_nccl, links_are_measured) {
    static const int n_ranks[] = {1, 2, 8};
    for (int i = 0; i < 3; i++) {
        use(NULL);
        run_rightly(n_ranks[i], 0, 0, measure_links);
    }
}

/* --- several groups on one stream ------------------------------------------------------------- */

static void two_groups(struct rank *rank) {
    struct comm_nccl_options options = {"pair", 0, LONG_NS};
    struct comm *second;
    int me = comm_rank(rank->comm), size = comm_size(rank->comm);
    if (comm_nccl_create(&second, rank->host, rank->stream, &options, &rank->err) != STATUS_OK) {
        rank->wrong = rank->err.text;
        return;
    }
    uint32_t mine = (uint32_t)me + 1, all[MAX_RANKS] = {0}, sum[MAX_RANKS] = {0};
    if (comm_all_gather(rank->comm, all, &mine, sizeof mine, &rank->err) != STATUS_OK ||
        comm_broadcast(second, all, sizeof all, size - 1, &rank->err) != STATUS_OK ||
        comm_all_gather(rank->comm, sum, &all[size - 1 - me], 4, &rank->err) != STATUS_OK ||
        comm_complete(rank->comm, &rank->err) != STATUS_OK) {
        rank->wrong = rank->err.text;
    }
    for (int i = 0; i < size && rank->wrong == NULL; i++) {
        if (sum[i] != (uint32_t)(size - i)) rank->wrong = "the stream's order was not kept";
    }
    comm_destroy(second);
}

Test(comm_nccl, groups_share_a_stream_in_order) {
    use(NULL);
    struct rank ranks[MAX_RANKS] = {0};
    run_ranks(ranks, 4, LONG_NS, two_groups);
    destroy_ranks(ranks, 4);
    check_right(ranks, 4);
    check_nothing_is_left(8, 0);
}

/* --- a model over it -------------------------------------------------------------------------- */

enum { N_TOKENS = 40, CHUNK = 11, VOCAB = 4096 };

static float *logits_of(const struct rank_group_options *options) {
    struct rank_group group;
    struct error err;
    int32_t tokens[N_TOKENS];
    for (int i = 0; i < N_TOKENS; i++) tokens[i] = i * 97 % 4000;
    cr_assert(rank_group_create(&group, options, &err) == STATUS_OK, "%s", err.text);
    const size_t vocab = VOCAB;
    CHECK(group.config->vocab == VOCAB);
    float *logits = xcalloc(N_TOKENS * vocab, sizeof *logits);
    for (int first = 0; first < N_TOKENS; first += CHUNK) {
        int n = N_TOKENS - first < CHUNK ? N_TOKENS - first : CHUNK;
        cr_assert(rank_group_feed(&group, logits + (size_t)first * vocab, tokens + first, n, first,
                                  options->max_layer_width, &err) == STATUS_OK, "%s", err.text);
    }
    rank_group_destroy(&group);
    return logits;
}

/* The CPU computes at once, so streams do as well. */
static void check_model(int degree, bool layer_owner) {
    struct rank_group_options options = {
        .dir = TANDEM_SOURCE_DIR "/assets/models/llama-tale-draft", .degree = degree,
        .layer_owner = layer_owner, .max_layer_width = layer_owner ? 2 : 1, .weights = DTYPE_BF16,
        .isa = BACKEND_PORTABLE};
    float *expected = logits_of(&options);
    struct nccl_double_settings settings = nccl_double_usual();
    settings.immediate = true;
    settings.lazy = 0;
    use(&settings);
    struct rank ranks[MAX_RANKS] = {0};
    struct comm *comms[MAX_RANKS];
    run_ranks(ranks, degree, LONG_NS, nothing);
    for (int i = 0; i < degree; i++) comms[i] = ranks[i].comm;
    options.comms = comms;
    float *logits = logits_of(&options);
    for (int i = 0; i < degree; i++) ranks[i].comm = NULL;
    destroy_ranks(ranks, degree);
    check_nothing_is_left(degree, 0);
    bool same = memcmp(logits, expected, N_TOKENS * VOCAB * sizeof *logits) == 0;
    free(logits);
    free(expected);
    cr_assert(same, "%d ranks: other logits than over threads", degree);
}

Test(comm_nccl, a_model_over_it_has_the_bits_of_one_over_threads) {
    check_model(2, false);
    check_model(4, false);
    check_model(2, true);
}

/* --- death ------------------------------------------------------------------------------------ */

static void gather_and_wait(struct rank *rank) {
    char mine = 'm', all[MAX_RANKS];
    rank->status = comm_all_gather(rank->comm, all, &mine, 1, &rank->err);
    if (rank->status == STATUS_OK) rank->status = comm_complete(rank->comm, &rank->err);
}

static void check_words(struct rank *rank, enum status status, const char *words) {
    cr_assert_eq(rank->status, status, "%s: %s", status_name(rank->status), rank->err.text);
    cr_assert_not_null(strstr(rank->err.text, words), "'%s' says nothing of '%s'", rank->err.text,
                       words);
}

/* Dead: every call says so at once, whatever it is, with the first reason. */
static void check_dead(struct rank *rank, enum status status, const char *words) {
    char bytes[MAX_RANKS];
    size_t parts[MAX_RANKS];
    for (int i = 0; i < MAX_RANKS; i++) parts[i] = 1;
    int other = comm_rank(rank->comm) == 0 ? 1 : 0;
    for (int op = 0; op < 8; op++) {
        memset(&rank->err, 0, sizeof rank->err);
        switch (op) {
        case 0: rank->status = comm_broadcast(rank->comm, bytes, 1, 0, &rank->err); break;
        case 1: rank->status = comm_all_gather(rank->comm, bytes, bytes, 1, &rank->err); break;
        case 2: rank->status = comm_gather(rank->comm, bytes, bytes, parts, 0, &rank->err); break;
        case 3: rank->status = comm_send(rank->comm, bytes, 1, other, &rank->err); break;
        case 4: rank->status = comm_recv(rank->comm, bytes, 1, other, &rank->err); break;
        case 5: rank->status = comm_barrier(rank->comm, &rank->err); break;
        case 6: rank->status = comm_complete(rank->comm, &rank->err); break;
        default: rank->status = comm_check(rank->comm, &rank->err); break;
        }
        check_words(rank, status, words);
    }
}

static void check_all_die(const struct nccl_double_settings *settings, int n_ranks,
                          int64_t deadline_ns, const char *words) {
    struct rank ranks[MAX_RANKS] = {0};
    use(settings);
    run_ranks(ranks, n_ranks, deadline_ns, gather_and_wait);
    for (int i = 0; i < n_ranks; i++) {
        check_words(&ranks[i], STATUS_UNAVAILABLE, words);
        check_dead(&ranks[i], STATUS_UNAVAILABLE, words);
    }
    destroy_ranks(ranks, n_ranks);
    check_nothing_is_left(n_ranks, n_ranks);
}

Test(comm_nccl, a_rank_whose_part_never_arrives) {
    struct nccl_double_settings settings = nccl_double_usual();
    settings.silent_rank = 1;
    check_all_die(&settings, 4, SHORT_NS, "s for all-gather of 1 bytes");
    check_all_die(&settings, 2, SHORT_NS, "another rank is stuck or lost");
    settings.immediate = true;
    check_all_die(&settings, 2, SHORT_NS, "s for all-gather of 1 bytes");
}

static void all_but_two(struct rank *rank) {
    if (comm_rank(rank->comm) != 2) gather_and_wait(rank);
}

Test(comm_nccl, a_rank_that_does_not_call) {
    struct rank ranks[MAX_RANKS] = {0};
    use(NULL);
    run_ranks(ranks, 3, SHORT_NS, all_but_two);
    check_words(&ranks[0], STATUS_UNAVAILABLE, "target group, rank 0 of 3: waited ");
    check_words(&ranks[1], STATUS_UNAVAILABLE, "target group, rank 1 of 3: waited ");
    struct error err;
    enum status alive = comm_check(ranks[2].comm, &err);
    destroy_ranks(ranks, 3);
    cr_assert_eq(alive, STATUS_OK);
    check_nothing_is_left(3, 2);
}

Test(comm_nccl, an_asynchronous_error_of_all) {
    struct nccl_double_settings settings = nccl_double_usual();
    settings.fail_code = ncclSystemError;
    settings.fail_call = 1;
    check_all_die(&settings, 4, LONG_NS, "all-gather of 1 bytes failed: NCCL: unhandled system "
                                         "error: the double was told so");
}

static void many_gathers(struct rank *rank) {
    for (int i = 0; i < 10 && rank->status == STATUS_OK; i++, rank->n_rounds++) {
        gather_and_wait(rank);
    }
}

Test(comm_nccl, an_asynchronous_error_after_some_calls) {
    struct nccl_double_settings settings = nccl_double_usual();
    settings.fail_code = ncclInternalError;
    settings.fail_rank = 1;
    settings.fail_call = 6;
    settings.abort_is_seen = true;
    struct rank ranks[MAX_RANKS] = {0};
    use(&settings);
    run_ranks(ranks, 2, LONG_NS, many_gathers);
    check_words(&ranks[1], STATUS_UNAVAILABLE, "rank 1 of 2: all-gather of 1 bytes failed: NCCL: "
                                               "internal error");
    check_words(&ranks[0], STATUS_UNAVAILABLE, "NCCL: remote process exited");
    cr_assert_eq(ranks[1].n_rounds, 6);
    destroy_ranks(ranks, 2);
    check_nothing_is_left(2, 2);
}

Test(comm_nccl, a_call_that_is_refused) {
    struct nccl_double_settings settings = nccl_double_usual();
    settings.refuse_code = ncclInvalidUsage;
    settings.refuse_call = 1;
    check_all_die(&settings, 2, LONG_NS, "all-gather of 1 bytes failed: NCCL: invalid usage");
}

Test(comm_nccl, a_device_that_fails) {
    struct nccl_double_settings settings = nccl_double_usual();
    settings.query_code = cudaErrorIllegalAddress;
    check_all_die(&settings, 2, LONG_NS, "failed: CUDA: an illegal memory access");
}

static void other_sizes(struct rank *rank) {
    char bytes[MAX_RANKS * 4];
    int me = comm_rank(rank->comm);
    size_t parts[2] = {1, 2};
    if (rank->seed == 0) {
        rank->status = comm_broadcast(rank->comm, bytes, me == 0 ? 3 : 4, 0, &rank->err);
    }
    if (rank->seed == 1) {
        rank->status = comm_all_gather(rank->comm, bytes, bytes, me == 0 ? 3 : 4, &rank->err);
    }
    if (rank->seed == 2) {
        parts[1] += (size_t)me;
        rank->status = comm_gather(rank->comm, bytes, bytes, parts, 0, &rank->err);
    }
    if (rank->seed == 3) {
        rank->status = me == 0 ? comm_send(rank->comm, bytes, 3, 1, &rank->err)
                               : comm_recv(rank->comm, bytes, 4, 0, &rank->err);
    }
    if (rank->status == STATUS_OK) rank->status = comm_complete(rank->comm, &rank->err);
}

Test(comm_nccl, sizes_that_differ_between_ranks) {
    for (uint64_t op = 0; op < 4; op++) {
        struct rank ranks[MAX_RANKS] = {0};
        use(NULL);
        ranks[0].seed = ranks[1].seed = op;
        run_ranks(ranks, 2, LONG_NS, other_sizes);
        for (int i = 0; i < 2; i++) {
            check_words(&ranks[i], STATUS_UNAVAILABLE, "NCCL: invalid argument");
        }
        destroy_ranks(ranks, 2);
        check_nothing_is_left(2, 2);
    }
}

/* --- abort ------------------------------------------------------------------------------------ */

static _Atomic int n_waiting;

static void wait_for_rank_0(struct rank *rank) {
    char byte = 0, all[MAX_RANKS];
    int me = comm_rank(rank->comm);
    atomic_fetch_add(&n_waiting, 1);
    if (me == 0) return;
    if (me == 1) rank->status = comm_broadcast(rank->comm, &byte, 1, 0, &rank->err);
    if (me == 2) rank->status = comm_all_gather(rank->comm, all, &byte, 1, &rank->err);
    if (me == 3) rank->status = comm_recv(rank->comm, &byte, 1, 0, &rank->err);
    if (me == 4) rank->status = comm_barrier(rank->comm, &rank->err);
    if (me == 5) rank->status = comm_send(rank->comm, &byte, 1, 0, &rank->err);
    if (rank->status == STATUS_OK) rank->status = comm_complete(rank->comm, &rank->err);
}

struct ender {
    struct rank *ranks;
    int n_ranks, by;
    int64_t after_ns;
};

/* From a thread that is no rank's. */
static void *end_group(void *arg) {
    struct ender *ender = arg;
    while (atomic_load(&n_waiting) < ender->n_ranks) clock_sleep_ns(100000);
    clock_sleep_ns(ender->after_ns);
    comm_abort(ender->ranks[ender->by].comm, "the test wants it");
    comm_abort(ender->ranks[ender->by].comm, "a second reason");
    return NULL;
}

static void check_abort(int by, int64_t after_ns) {
    enum { N = 6 };
    struct rank ranks[MAX_RANKS] = {0};
    struct ender ender = {ranks, N, by, after_ns};
    pthread_t thread;
    use(NULL);
    atomic_store(&n_waiting, 0);
    CHECK(pthread_create(&thread, NULL, end_group, &ender) == 0);
    run_ranks(ranks, N, LONG_NS, wait_for_rank_0);
    pthread_join(thread, NULL);
    for (int i = 0; i < N; i++) {
        if (i != 0) check_words(&ranks[i], STATUS_ABORTED, "the test wants it");
        comm_check(ranks[i].comm, &ranks[i].err);
        if (i != 0 || by == 0) check_dead(&ranks[i], STATUS_ABORTED, "the test wants it");
    }
    destroy_ranks(ranks, N);
    check_nothing_is_left(N, N);
}

Test(comm_nccl, abort_ends_the_waits_of_all_ranks) {
    check_abort(0, 0);
    check_abort(3, 30000000);
}

static struct comm *to_end;

static void end_in_between(void) {
    comm_abort(to_end, "in between");
}

static void wait_and_be_ended(struct rank *rank) {
    to_end = rank->comm;
    gather_and_wait(rank);
}

/* An abort takes the group's part off the stream, which then looks as if all were done. */
Test(comm_nccl, an_aborted_wait_is_no_success) {
    struct nccl_double_settings settings = nccl_double_usual();
    settings.lazy = 0;
    settings.on_query = end_in_between;
    struct rank ranks[MAX_RANKS] = {0};
    use(&settings);
    run_ranks(ranks, 1, LONG_NS, wait_and_be_ended);
    check_words(&ranks[0], STATUS_ABORTED, "in between");
    destroy_ranks(ranks, 1);
    check_nothing_is_left(1, 1);
}

/* --- births that fail ------------------------------------------------------------------------- */

static void check_stillborn(const struct nccl_double_settings *settings, int n_ranks,
                            int64_t deadline_ns, enum status status, const char *words) {
    struct rank ranks[MAX_RANKS] = {0};
    use(settings);
    run_ranks(ranks, n_ranks, deadline_ns, nothing);
    for (int i = 0; i < n_ranks; i++) {
        cr_assert_null(ranks[i].comm, "rank %d", i);
        cr_assert_eq(ranks[i].created, status, "rank %d: %s", i, ranks[i].err.text);
        cr_assert_not_null(strstr(ranks[i].err.text, words), "%s", ranks[i].err.text);
    }
    destroy_ranks(ranks, n_ranks);
    struct nccl_double_counts counts = nccl_double_counts();
    cr_assert_eq(counts.comms + counts.events + counts.allocations, 0);
}

Test(comm_nccl, births_that_fail) {
    struct nccl_double_settings settings = nccl_double_usual();
    settings.id_code = ncclSystemError;
    check_stillborn(&settings, 4, LONG_NS, STATUS_UNAVAILABLE,
                    "rank 0 of 4 has no id to share: NCCL: un");
    settings = nccl_double_usual();
    settings.init_code = ncclInternalError;
    check_stillborn(&settings, 2, LONG_NS, STATUS_UNAVAILABLE,
                    "meeting the others");
    settings = nccl_double_usual();
    settings.device_code = cudaErrorNoDevice;
    check_stillborn(&settings, 2, LONG_NS, STATUS_UNAVAILABLE,
                    "opening device 0 failed: CUDA: no CUDA-");
    settings = nccl_double_usual();
    settings.memory_code = cudaErrorMemoryAllocation;
    check_stillborn(&settings, 2, LONG_NS, STATUS_RESOURCE_EXHAUSTED,
                    "no 2 bytes of device memory");
    settings = nccl_double_usual();
    settings.init_polls = 1 << 30;
    check_stillborn(&settings, 2, SHORT_NS, STATUS_UNAVAILABLE,
                    "for meeting the others");
}

Test(comm_nccl, a_slow_birth_is_waited_for) {
    struct nccl_double_settings settings = nccl_double_usual();
    settings.init_polls = 6000;
    use(&settings);
    run_rightly(4, 51, 10, mixed);
}

/* One that fails, or never comes, leaves the others waiting no longer than their deadline. */
Test(comm_nccl, a_birth_that_fails_at_one_rank) {
    struct nccl_double_settings settings = nccl_double_usual();
    settings.init_code = ncclSystemError;
    settings.init_code_rank = 1;
    struct rank ranks[MAX_RANKS] = {0};
    use(&settings);
    run_ranks(ranks, 2, SHORT_NS, gather_and_wait);
    cr_assert_eq(ranks[1].created, STATUS_UNAVAILABLE);
    cr_assert(ranks[0].created == STATUS_UNAVAILABLE || ranks[0].status == STATUS_UNAVAILABLE);
    destroy_ranks(ranks, 2);
    struct nccl_double_counts counts = nccl_double_counts();
    cr_assert_eq(counts.comms + counts.events + counts.allocations, 0);
}

Test(comm_nccl, a_rank_that_never_comes) {
    struct comm *hosts[2];
    struct error err;
    use(NULL);
    CHECK(comm_threads_create(hosts, 2, &err) == STATUS_OK);
    struct rank rank = {.host = hosts[0], .stream = nccl_double_stream_create(),
                        .deadline_ns = SHORT_NS, .comes_alone = true, .run = nothing};
    rank_main(&rank);
    comm_destroy(hosts[0]);
    comm_destroy(hosts[1]);
    nccl_double_stream_destroy(rank.stream);
    cr_assert_eq(rank.created, STATUS_UNAVAILABLE);
    cr_assert_not_null(strstr(rank.err.text, "gave up"), "%s", rank.err.text);
    cr_assert_eq(nccl_double_counts().aborted, 1);
}
