#include "coordinator/fleet.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "tests/unit/test.h"

enum { MAX_TEST_RANKS = 16 };

static struct placement_wish alone(uint32_t target_ranks) {
    return (struct placement_wish){.target_ranks = target_ranks, .n_ranks = target_ranks};
}

struct hello {
    Tandem__V1__Hello message;
    Tandem__V1__RankHello ranks[MAX_TEST_RANKS], *rows[MAX_TEST_RANKS];
};

static void say_hello(struct hello *hello, const char *id, size_t n_ranks) {
    tandem__v1__hello__init(&hello->message);
    hello->message.protocol = FLEET_PROTOCOL;
    hello->message.replica_id = (char *)id;
    for (size_t i = 0; i < n_ranks; i++) {
        tandem__v1__rank_hello__init(&hello->ranks[i]);
        hello->ranks[i].rank = (uint32_t)i;
        hello->ranks[i].host = "node";
        hello->ranks[i].device = "cpu";
        hello->rows[i] = &hello->ranks[i];
    }
    hello->message.n_ranks = n_ranks;
    hello->message.ranks = hello->rows;
}

static struct replica *join(struct fleet *fleet, const char *id, uint32_t target, struct error *err) {
    struct hello hello;
    struct replica *replica = NULL;
    struct placement_wish wish = alone(target);
    say_hello(&hello, id, target);
    cr_assert_eq(fleet_join(fleet, &replica, &hello.message, &wish, err), STATUS_OK);
    return replica;
}

static Tandem__V1__Ready ready_message(void) {
    Tandem__V1__Ready ready = TANDEM__V1__READY__INIT;
    ready.kv_blocks = 100;
    ready.max_sequences = 8;
    ready.max_context = 512;
    ready.checkpoint_fingerprint = 77;
    return ready;
}

Test(fleet, a_replica_goes_from_joining_to_serving_to_lost_and_back) {
    struct fleet fleet = {0};
    struct error err;
    char words[200];
    fleet_explain(&fleet, words, sizeof words);
    cr_assert_str_eq(words, "no replica is serving: none has joined");
    struct replica *replica = join(&fleet, "r1", 2, &err);
    cr_assert_eq(replica->state, REPLICA_LOADING);
    cr_assert_eq(replica->placement.parts[1].shard, 1);
    cr_assert_eq(replica->placement.parts[1].degree, 2);

    Tandem__V1__LoadProgress progress = TANDEM__V1__LOAD_PROGRESS__INIT;
    progress.bytes_done = 43;
    progress.bytes_total = 100;
    cr_assert_eq(replica_progress(replica, &progress, &err), STATUS_OK);
    fleet_explain(&fleet, words, sizeof words);
    cr_assert_str_eq(words, "no replica is serving: replica r1 is loading, 43 %");

    Tandem__V1__Ready ready = ready_message();
    cr_assert_eq(replica_ready(replica, &ready, 77, &err), STATUS_OK);
    cr_assert_eq(replica->state, REPLICA_SERVING);
    cr_assert_eq(fleet_count(&fleet, REPLICA_SERVING), 1);
    cr_assert_eq(replica_progress(replica, &progress, &err), STATUS_INTERNAL);

    replica_lost(replica, "its stream ended");
    fleet_explain(&fleet, words, sizeof words);
    cr_assert_str_eq(words, "no replica is serving: replica r1 is lost (its stream ended)");
    cr_assert(join(&fleet, "r1", 2, &err) == replica);
    cr_assert_eq(fleet.n_replicas, 1);
    cr_assert_eq(replica->kv_blocks, 0);
    fleet_free(&fleet);
}

Test(fleet, refuses_in_words) {
    struct fleet fleet = {0};
    struct hello hello;
    struct replica *replica;
    struct error err;
    const struct placement_wish wish = alone(2);
    say_hello(&hello, "r1", 1);
    cr_assert_eq(fleet_join(&fleet, &replica, &hello.message, &wish, &err), STATUS_FAILED_PRECONDITION);
    cr_assert(strstr(err.text, "has 1 rank, the coordinator was started with --target-ranks 2"));
    cr_assert_eq(fleet_count(&fleet, REPLICA_REFUSED), 1);
    say_hello(&hello, "r1", 2);
    hello.message.protocol = 9;
    cr_assert_eq(fleet_join(&fleet, &replica, &hello.message, &wish, &err), STATUS_FAILED_PRECONDITION);
    cr_assert(strstr(err.text, "protocol 9"));
    say_hello(&hello, "r1", 2);
    hello.ranks[1].rank = 0;
    cr_assert_eq(fleet_join(&fleet, &replica, &hello.message, &wish, &err), STATUS_FAILED_PRECONDITION);
    say_hello(&hello, "", 2);
    cr_assert_eq(fleet_join(&fleet, &replica, &hello.message, &wish, &err), STATUS_FAILED_PRECONDITION);
    join(&fleet, "r1", 2, &err);   /* the refused place is free for its own id */
    say_hello(&hello, "r1", 2);
    cr_assert_eq(fleet_join(&fleet, &replica, &hello.message, &wish, &err), STATUS_ALREADY_EXISTS);
    cr_assert_eq(fleet.n_replicas, 1);
    fleet_free(&fleet);
}

Test(fleet, a_different_checkpoint_is_not_served) {
    struct fleet fleet = {0};
    struct error err;
    struct replica *replica = join(&fleet, "r1", 1, &err);
    Tandem__V1__Ready ready = ready_message();
    cr_assert_eq(replica_ready(replica, &ready, 78, &err), STATUS_FAILED_PRECONDITION);
    cr_assert_eq(replica->state, REPLICA_LOADING);
    ready.max_context = 1;
    cr_assert_eq(replica_ready(replica, &ready, 77, &err), STATUS_INTERNAL);
    fleet_free(&fleet);
}

Test(fleet, dead_replicas_give_their_places_to_new_ones) {
    struct fleet fleet = {0};
    struct hello hello;
    struct replica *replica;
    struct error err;
    const struct placement_wish wish = alone(1);
    char id[16];
    for (int i = 0; i < FLEET_MAX_REPLICAS; i++) {
        snprintf(id, sizeof id, "r%d", i);
        join(&fleet, id, 1, &err);
    }
    say_hello(&hello, "late", 1);
    cr_assert_eq(fleet_join(&fleet, &replica, &hello.message, &wish, &err), STATUS_RESOURCE_EXHAUSTED);
    replica_lost(fleet.replicas[5], "test");
    cr_assert_eq(fleet_join(&fleet, &replica, &hello.message, &wish, &err), STATUS_OK);
    cr_assert(replica == fleet.replicas[5]);
    fleet_free(&fleet);
}

Test(fleet, the_rate_is_that_of_the_last_ten_seconds) {
    struct fleet fleet = {0};
    struct error err;
    struct replica *replica = join(&fleet, "r1", 1, &err);
    Tandem__V1__Step step = TANDEM__V1__STEP__INIT;
    const int64_t second = 1000000000;
    cr_assert(replica_rate(replica, 5 * second) == 0);
    step.n_tokens = 50;
    for (int64_t s = 100; s < 120; s++) replica_step(replica, &step, s * second);
    cr_assert(replica_rate(replica, 120 * second) == 50);
    cr_assert(replica_rate(replica, 125 * second) == 25);
    cr_assert(replica_rate(replica, 140 * second) == 0);
    fleet_free(&fleet);
}

Test(fleet, a_replica_with_a_draft_on_ranks_of_its_own) {
    struct fleet fleet = {0};
    struct hello hello;
    struct replica *replica;
    struct error err;
    const struct placement_wish wish = {PLACEMENT_MODEL, 8, 8, 16};
    say_hello(&hello, "r1", 16);
    cr_assert_eq(fleet_join(&fleet, &replica, &hello.message, &wish, &err), STATUS_OK);
    cr_assert_eq(replica->n_ranks, 16);
    cr_assert_eq(replica->placement.split, PLACEMENT_DISJOINT);
    say_hello(&hello, "r2", 8);
    cr_assert_eq(fleet_join(&fleet, &replica, &hello.message, &wish, &err),
                 STATUS_FAILED_PRECONDITION);
    cr_assert(strstr(err.text, "start mpirun with -n 16"), "%s", err.text);
    fleet_free(&fleet);
}

/* ---- links ----------------------------------------------------------------------------------- */

struct links {
    Tandem__V1__Links message;
    uint32_t latency_ns[MAX_TEST_RANKS * MAX_TEST_RANKS];
    float speeds[MAX_TEST_RANKS * MAX_TEST_RANKS];
};

/* All alike, 1000 ns and 8 GB/s. */
static void add_links(struct hello *hello, struct links *links) {
    size_t n = hello->message.n_ranks;
    tandem__v1__links__init(&links->message);
    for (size_t i = 0; i < n * n; i++) {
        links->latency_ns[i] = i / n == i % n ? 0 : 1000;
        links->speeds[i] = i / n == i % n ? 0 : 8;
    }
    links->message.latency_ns = links->latency_ns;
    links->message.gigabytes_per_second = links->speeds;
    links->message.n_latency_ns = links->message.n_gigabytes_per_second = n * n;
    hello->message.links = &links->message;
}

/* Target on 0 and 1, draft on 2 and 3: what lies inside a group, and between leaders 0 and 2. */
Test(fleet, links_are_kept_by_what_they_carry) {
    struct placement_wish wish = {.drafter = PLACEMENT_MODEL, .target_ranks = 2, .draft_ranks = 2,
                                  .n_ranks = 4};
    struct fleet fleet = {0};
    struct replica *replica = NULL;
    struct hello hello;
    struct links links;
    struct error err;
    say_hello(&hello, "r1", 4);
    add_links(&hello, &links);
    links.latency_ns[1 * 4 + 0] = 3000;  /* target */
    links.speeds[2 * 4 + 3] = 2;         /* draft */
    links.latency_ns[2 * 4 + 0] = 9000;  /* the leaders */
    links.latency_ns[1 * 4 + 3] = 77000; /* nobody's */
    links.speeds[3 * 4 + 0] = 1;
    cr_assert_eq(fleet_join(&fleet, &replica, &hello.message, &wish, &err), STATUS_OK);
    cr_assert_eq(replica->links.latency_us, 3, "%g", replica->links.latency_us);
    cr_assert_eq(replica->links.gigabytes_per_second, 2);
    cr_assert_eq(replica->links.handoff_us, 9, "%g", replica->links.handoff_us);
    replica_lost(replica, "for the test");
    uint32_t host_latency_ns[16] = {[0 * 4 + 2] = 4000, [2 * 4 + 0] = 2000, [1 * 4 + 3] = 9999};
    links.message.host_latency_ns = host_latency_ns;
    links.message.n_host_latency_ns = 16;
    cr_assert_eq(fleet_join(&fleet, &replica, &hello.message, &wish, &err), STATUS_OK);
    cr_assert_eq(replica->links.handoff_us, 4, "%g", replica->links.handoff_us);
    replica_lost(replica, "for the test");
    hello.message.links = NULL;
    cr_assert_eq(fleet_join(&fleet, &replica, &hello.message, &wish, &err), STATUS_OK);
    cr_assert_eq(replica->links.gigabytes_per_second, 0);
    fleet_free(&fleet);
}

Test(fleet, a_hello_with_wrong_links_is_refused) {
    static const float speeds[] = {0, -1, NAN, INFINITY};
    struct placement_wish wish = alone(2);
    struct replica *replica = NULL;
    struct hello hello;
    struct links links;
    struct error err;
    for (int i = 0; i < 7; i++) {
        struct fleet fleet = {0};
        say_hello(&hello, "r1", 2);
        add_links(&hello, &links);
        if (i < 4) links.speeds[1] = speeds[i];
        if (i == 4) links.message.n_latency_ns = 3;
        if (i == 5) links.message.n_gigabytes_per_second = 0;
        if (i == 6) links.message.n_host_latency_ns = 1;
        cr_assert_eq(fleet_join(&fleet, &replica, &hello.message, &wish, &err),
                     STATUS_FAILED_PRECONDITION, "case %d", i);
        cr_assert(strstr(err.text, "link") != NULL, "%s", err.text);
        fleet_free(&fleet);
    }
}
