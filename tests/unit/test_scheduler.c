/* The scheduler without a model: the token drawn at place i of a request is a function of its key
 * and i, so what every request must become is known beforehand, whatever was preempted. */
#include "tests/unit/test.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/error.h"
#include "tests/reference/random.h"
#include "worker/scheduler.h"

enum { MAX_REQUESTS = 64, N_TOKENS = 24 };

/* What the test knows about a request. */
struct fate {
    struct request *request; /* NULL once it is forgotten */
    int n_prompt, max_tokens, min_tokens, n_stop_ids;
    int32_t stop_ids[2];
    int64_t deadline_ns;
    bool cancelled; /* asked for, before the next plan */
    bool started;
    enum finish_reason reason;
    int n_output;
};

struct simulation {
    struct test_random random;
    struct scheduler_options options;
    struct kv_blocks *pool;
    struct scheduler *scheduler;
    struct fate fates[MAX_REQUESTS]; /* by key */
    int n_requests, n_steps;
    uint64_t last_started;
    int64_t now_ns;
    const char *wrong;
};

static void expect(struct simulation *s, bool holds, const char *what) {
    if (!holds && s->wrong == NULL) s->wrong = what;
}

static int32_t token_of(uint64_t key, int i) {
    struct test_random random = {key * 1000003u + (uint64_t)i};
    return random_below(&random, N_TOKENS);
}

/* Prompts of the same parity of keys begin alike. */
static int32_t prompt_token(uint64_t key, int i) {
    return i < 40 ? (int32_t)(key % 2) : token_of(key + 77, i);
}

static void simulation_init(struct simulation *s, int n_blocks, int max_sequences,
                            int max_step_tokens, int max_context, bool prefix_cache) {
    memset(s, 0, sizeof *s);
    s->pool = kv_blocks_create(n_blocks, prefix_cache);
    s->options = (struct scheduler_options){s->pool, n_blocks, max_sequences, max_step_tokens,
                                            max_context, 0};
    s->scheduler = scheduler_create(&s->options);
}

static void simulation_free(struct simulation *s) {
    scheduler_destroy(s->scheduler);
    kv_blocks_destroy(s->pool);
}

/* Keys count from 1. */
static struct fate *submit(struct simulation *s, int n_prompt, int max_tokens) {
    struct fate *fate = &s->fates[++s->n_requests];
    CHECK(s->n_requests < MAX_REQUESTS);
    struct request *request = xcalloc(1, sizeof *request);
    request->key = (uint64_t)s->n_requests;
    request->n_prompt = request->n_tokens = request->token_capacity = n_prompt;
    request->tokens = xmalloc((size_t)n_prompt * sizeof *request->tokens);
    for (int i = 0; i < n_prompt; i++) request->tokens[i] = prompt_token(request->key, i);
    request->max_tokens = max_tokens;
    *fate = (struct fate){.request = request, .n_prompt = n_prompt, .max_tokens = max_tokens};
    return fate;
}

/* The limits are in the fate by now. */
static void hand_over(struct simulation *s, struct fate *fate) {
    struct request *request = fate->request;
    request->min_tokens = fate->min_tokens;
    request->deadline_ns = fate->deadline_ns;
    request->n_stop_ids = fate->n_stop_ids;
    request->stop_ids = xcalloc(2, sizeof *request->stop_ids);
    memcpy(request->stop_ids, fate->stop_ids, sizeof fate->stop_ids);
    scheduler_submit(s->scheduler, request);
}

/* --- what must become of a request ------------------------------------------------------------ */

static bool is_stop(const struct fate *fate, int32_t token) {
    for (int i = 0; i < fate->n_stop_ids; i++) {
        if (fate->stop_ids[i] == token) return true;
    }
    return false;
}

static enum finish_reason expected_end(const struct simulation *s, const struct fate *fate,
                                       uint64_t key, int *n_output) {
    int positions = s->options.n_blocks * KV_BLOCK;
    *n_output = 0;
    if (fate->n_prompt >= s->options.max_context || fate->n_prompt > positions) {
        return FINISH_REFUSED;
    }
    for (;;) {
        if (fate->n_prompt + *n_output > positions) return FINISH_REFUSED; /* no KV even alone */
        int32_t token = token_of(key, (*n_output)++);
        if (*n_output >= fate->min_tokens && is_stop(fate, token)) return FINISH_STOP_TOKEN;
        if (*n_output >= fate->max_tokens) return FINISH_LENGTH;
        if (fate->n_prompt + *n_output >= s->options.max_context) return FINISH_LENGTH;
    }
}

static void check_tokens(struct simulation *s, const struct request *request) {
    expect(s, request->n_prompt == s->fates[request->key].n_prompt, "the prompt's length changed");
    for (int i = 0; i < request->n_tokens; i++) {
        int32_t token = i < request->n_prompt ? prompt_token(request->key, i)
                                              : token_of(request->key, i - request->n_prompt);
        expect(s, request->tokens[i] == token, "a token changed");
    }
}

/* --- one step --------------------------------------------------------------------------------- */

static void note_end(struct simulation *s, struct request *request, enum finish_reason reason) {
    struct fate *fate = &s->fates[request->key];
    expect(s, fate->request == request && fate->reason == FINISH_NONE, "it ended twice");
    expect(s, reason != FINISH_NONE && request->state == REQUEST_ENDED, "not really ended");
    expect(s, request->kv.n_blocks == 0, "an ended request holds KV");
    check_tokens(s, request);
    fate->reason = reason;
    fate->n_output = request->n_tokens - request->n_prompt;
    fate->request = NULL;
    scheduler_forget(s->scheduler, request);
}

static void check_ended(struct simulation *s, const struct scheduler_plan *plan) {
    for (int i = 0; i < plan->n_ended; i++) {
        struct fate *fate = &s->fates[plan->ended[i]->key];
        enum finish_reason reason = plan->ended[i]->reason;
        bool late = fate->deadline_ns != 0 && s->now_ns >= fate->deadline_ns;
        if (reason == FINISH_CANCELLED) expect(s, fate->cancelled, "cancelled by nobody");
        if (reason == FINISH_DEADLINE) expect(s, late, "its deadline is not over");
        note_end(s, plan->ended[i], reason);
    }
    for (int key = 1; key <= s->n_requests; key++) {
        struct fate *fate = &s->fates[key];
        if (fate->request == NULL) continue;
        expect(s, !fate->cancelled, "cancelled, but goes on");
        expect(s, fate->deadline_ns == 0 || s->now_ns < fate->deadline_ns, "late, but goes on");
    }
}

static void check_started(struct simulation *s, const struct scheduler_plan *plan) {
    for (int i = 0; i < plan->n_started; i++) {
        uint64_t key = plan->started[i]->key;
        expect(s, key > s->last_started, "not in the order of arrival");
        expect(s, !s->fates[key].started, "started twice");
        s->fates[key].started = true;
        s->last_started = key;
        expect(s, plan->started[i]->n_cached % KV_BLOCK == 0, "a part of a block was cached");
        expect(s, plan->started[i]->n_cached < plan->started[i]->n_prompt, "all was cached");
    }
    for (int key = 1; key <= (int)s->last_started; key++) { /* and nobody was overtaken */
        expect(s, s->fates[key].started || s->fates[key].request == NULL, "overtaken");
    }
}

static void check_items(struct simulation *s, const struct scheduler_plan *plan) {
    int n_rows = 0, n_prefill_rows = 0;
    for (int i = 0; i < plan->n_items; i++) {
        const struct scheduler_item *item = &plan->items[i];
        const struct request *request = item->request;
        int left = request->n_tokens - request->n_computed;
        expect(s, request->state == REQUEST_RUNNING, "planned, but not running");
        expect(s, item->position == request->n_computed, "rows at a wrong place");
        expect(s, item->n_rows >= 1 && item->n_rows <= left, "a wrong number of rows");
        expect(s, item->draws == (item->n_rows == left), "draws at the last known token only");
        int covered = request->kv.n_blocks * KV_BLOCK;
        expect(s, covered >= item->position + item->n_rows, "rows without KV");
        n_rows += item->n_rows;
        if (left > 1) n_prefill_rows += item->n_rows;
        for (int j = 0; j < i; j++) {
            expect(s, plan->items[j].request != request, "planned twice");
        }
    }
    expect(s, n_rows == plan->n_rows, "n_rows");
    expect(s, n_prefill_rows == plan->n_prefill_rows, "n_prefill_rows");
    expect(s, plan->n_rows <= s->options.max_step_tokens, "over the token budget");
    expect(s, scheduler_n_running(s->scheduler) <= s->options.max_sequences, "too many run");
}

/* Whoever runs and has one row left is never passed over. */
static void check_decoding(struct simulation *s, const struct scheduler_plan *plan) {
    for (int key = 1; key <= s->n_requests; key++) {
        const struct request *request = s->fates[key].request;
        if (request == NULL || request->state != REQUEST_RUNNING) continue;
        if (request->n_tokens - request->n_computed != 1) continue;
        bool planned = false;
        for (int i = 0; i < plan->n_items; i++) planned |= plan->items[i].request == request;
        expect(s, planned, "a decoding sequence was passed over");
    }
}

static void run_step(struct simulation *s) {
    bool idle = scheduler_idle(s->scheduler);
    const struct scheduler_plan *plan = scheduler_plan(s->scheduler, s->now_ns);
    s->n_steps++;
    check_ended(s, plan);
    check_started(s, plan);
    check_items(s, plan);
    check_decoding(s, plan);
    expect(s, idle || plan->n_items > 0 || plan->n_ended > 0, "a step without progress");
    for (int i = 0; i < plan->n_items; i++) {
        const struct scheduler_item *item = &plan->items[i];
        struct request *request = item->request;
        scheduler_computed(s->scheduler, item);
        if (!item->draws) continue;
        int32_t token = token_of(request->key, request->n_tokens - request->n_prompt);
        enum finish_reason reason = scheduler_commit(s->scheduler, request, token);
        if (reason != FINISH_NONE) note_end(s, request, reason);
    }
    kv_blocks_check(s->pool);
}

/* Runs until nothing is left, and compares every end with what it must be. */
static void run_all(struct simulation *s, int max_steps) {
    while (!scheduler_idle(s->scheduler) && s->wrong == NULL) {
        expect(s, s->n_steps < max_steps, "it never ends");
        run_step(s);
    }
    for (int key = 1; key <= s->n_requests && s->wrong == NULL; key++) {
        const struct fate *fate = &s->fates[key];
        int n_output;
        enum finish_reason reason = expected_end(s, fate, (uint64_t)key, &n_output);
        expect(s, fate->request == NULL, "not ended");
        if (fate->reason == FINISH_CANCELLED || fate->reason == FINISH_DEADLINE) {
            expect(s, fate->n_output <= n_output, "went on after its end");
            continue;
        }
        expect(s, fate->reason == reason, "ended for another reason");
        expect(s, fate->n_output == n_output, "another number of tokens");
    }
    expect(s, kv_blocks_available(s->pool) == s->options.n_blocks, "KV was lost");
}

/* --- random lives ----------------------------------------------------------------------------- */

static void random_request(struct simulation *s) {
    int n_prompt = 1 + random_below(&s->random, s->options.max_context + 2);
    struct fate *fate = submit(s, n_prompt, 1 + random_below(&s->random, 60));
    if (random_below(&s->random, 3) == 0) fate->min_tokens = random_below(&s->random, 20);
    fate->n_stop_ids = random_below(&s->random, 3);
    for (int i = 0; i < 2; i++) fate->stop_ids[i] = random_below(&s->random, N_TOKENS);
    if (random_below(&s->random, 6) == 0) {
        fate->deadline_ns = s->now_ns + 1 + random_below(&s->random, 60);
    }
    hand_over(s, fate);
}

static void random_cancel(struct simulation *s) {
    int key = 1 + random_below(&s->random, s->n_requests + 1);
    struct fate *fate = &s->fates[key];
    bool waits_or_runs = fate->request != NULL && fate->request->state != REQUEST_ENDED;
    bool found = scheduler_cancel(s->scheduler, (uint64_t)key);
    expect(s, found == waits_or_runs, "cancel found nobody, or somebody who is gone");
    if (found) fate->cancelled = true;
}

static void random_life(struct simulation *s, uint64_t seed) {
    struct test_random random = {seed};
    int max_sequences = 1 + random_below(&random, 8);
    int max_step_tokens = max_sequences + 1 + random_below(&random, 40);
    int max_context = 2 + random_below(&random, 200);
    simulation_init(s, 1 + random_below(&random, 30), max_sequences, max_step_tokens, max_context,
                    random_below(&random, 2) == 0);
    s->random = random;
    for (int i = 0; i < 400 && s->wrong == NULL; i++) {
        s->now_ns++;
        if (s->n_requests < MAX_REQUESTS - 1 && random_below(&s->random, 5) == 0) random_request(s);
        if (s->n_requests < MAX_REQUESTS - 1 && random_below(&s->random, 40) == 0) random_cancel(s);
        run_step(s);
    }
    run_all(s, 20000);
}

static struct simulation simulation;

Test(scheduler, random_lives_end_as_they_must) {
    uint64_t preemptions = 0, hits = 0;
    int steps = 0;
    int reasons[FINISH_REFUSED + 1] = {0};
    for (uint64_t seed = 1; seed <= 1200; seed++) {
        random_life(&simulation, seed);
        preemptions += scheduler_n_preemptions(simulation.scheduler);
        hits += kv_blocks_stats(simulation.pool).hit_tokens;
        steps += simulation.n_steps;
        for (int key = 1; key <= simulation.n_requests; key++) {
            reasons[simulation.fates[key].reason]++;
        }
        if (simulation.wrong != NULL) {
            printf("seed %llu, step %d: %s\n", (unsigned long long)seed, simulation.n_steps,
                   simulation.wrong);
        }
        cr_assert_null(simulation.wrong, "seed %llu: %s", (unsigned long long)seed,
                       simulation.wrong);
        simulation_free(&simulation);
    }
    cr_assert(preemptions > 500 && hits > 100000 && steps > 100000, "%llu %llu %d",
              (unsigned long long)preemptions, (unsigned long long)hits, steps);
    for (int reason = FINISH_STOP_TOKEN; reason <= FINISH_REFUSED; reason++) {
        cr_assert(reasons[reason] > 100, "only %d ended for reason %d", reasons[reason], reason);
    }
}

/* Every mixture of three requests around the edges of blocks and budgets. */
Test(scheduler, small_cases_all_of_them) {
    static const int prompts[] = {1, 15, 16, 17, 33}, outputs[] = {1, 2, 17};
    int n_cases = 5 * 5 * 5 * 3 * 3;
    for (int config = 0; config < 3 * 2 * 2; config++) {
        int n_blocks = 1 + config % 3 * 2, max_sequences = 1 + config / 3 % 2;
        int max_step_tokens = config / 6 == 0 ? max_sequences + 1 : 64;
        for (int i = 0; i < n_cases; i++) {
            simulation_init(&simulation, n_blocks, max_sequences, max_step_tokens, 48, i % 2 == 0);
            int output[3] = {outputs[i / 125 % 3], outputs[i / 375], outputs[i % 3]};
            int prompt[3] = {prompts[i % 5], prompts[i / 5 % 5], prompts[i / 25 % 5]};
            for (int r = 0; r < 3; r++) {
                hand_over(&simulation, submit(&simulation, prompt[r], output[r]));
            }
            run_all(&simulation, 1000);
            cr_assert_null(simulation.wrong, "config %d, case %d: %s", config, i,
                           simulation.wrong);
            simulation_free(&simulation);
        }
    }
}

/* --- by hand ---------------------------------------------------------------------------------- */

Test(scheduler, decoding_goes_before_prefill) {
    struct simulation *s = &simulation;
    simulation_init(s, 40, 4, 20, 400, true);
    hand_over(s, submit(s, 10, 50));
    run_step(s);
    hand_over(s, submit(s, 100, 5));
    for (int step = 0; step < 5; step++) {
        const struct request *second = s->fates[2].request;
        int before = s->fates[1].request->n_tokens, computed = second->n_computed;
        run_step(s);
        cr_assert_null(s->wrong, "%s", s->wrong);
        cr_assert_eq(s->fates[1].request->n_tokens, before + 1);
        cr_assert_eq(second->n_computed, computed + 19);
    }
    run_all(s, 1000);
    cr_assert_null(s->wrong, "%s", s->wrong);
    simulation_free(s);
}

Test(scheduler, the_youngest_is_preempted_and_comes_back) {
    struct simulation *s = &simulation;
    simulation_init(s, 4, 2, 64, 65, false);
    hand_over(s, submit(s, 16, 30));
    hand_over(s, submit(s, 16, 30));
    struct request *first = s->fates[1].request, *second = s->fates[2].request;
    while (scheduler_n_preemptions(s->scheduler) == 0 && s->wrong == NULL) run_step(s);
    cr_assert_null(s->wrong, "%s", s->wrong);
    cr_assert_eq(first->n_preemptions, 0);
    cr_assert_eq(second->n_preemptions, 1);
    cr_assert_eq(second->state, REQUEST_WAITING);
    cr_assert(second->n_tokens > second->n_prompt, "its tokens are kept");
    cr_assert_eq(second->n_computed, 0);
    cr_assert_eq(scheduler_n_waiting(s->scheduler), 1);
    run_all(s, 1000);
    cr_assert_null(s->wrong, "%s", s->wrong);
    cr_assert_eq(s->fates[2].n_output, 30);
    simulation_free(s);
}

Test(scheduler, cancel_and_deadline_end_in_the_next_plan) {
    struct simulation *s = &simulation;
    simulation_init(s, 40, 1, 64, 400, true);
    s->now_ns = 100;
    hand_over(s, submit(s, 16, 30)); /* runs */
    hand_over(s, submit(s, 16, 30)); /* waits */
    struct fate *third = submit(s, 16, 30), *fourth = submit(s, 16, 30);
    third->deadline_ns = 200;
    fourth->deadline_ns = 201;
    hand_over(s, third);
    hand_over(s, fourth);
    run_step(s);
    for (uint64_t key = 1; key <= 2; key++) {
        cr_assert(scheduler_cancel(s->scheduler, key));
        s->fates[key].cancelled = true;
    }
    cr_assert_not(scheduler_cancel(s->scheduler, 99));
    s->now_ns = 199;
    run_step(s);
    cr_assert_eq(s->fates[1].reason, FINISH_CANCELLED);
    cr_assert_eq(s->fates[2].reason, FINISH_CANCELLED);
    cr_assert_eq(s->fates[2].n_output, 0);
    cr_assert_eq(third->reason, FINISH_NONE);
    s->now_ns = 200;
    run_step(s); /* the third ran, the fourth waits */
    cr_assert_eq(third->reason, FINISH_DEADLINE);
    cr_assert_eq(third->n_output, 1);
    cr_assert_eq(fourth->reason, FINISH_NONE);
    s->now_ns = 201;
    run_step(s);
    cr_assert_eq(fourth->reason, FINISH_DEADLINE);
    cr_assert(scheduler_idle(s->scheduler));
    cr_assert_null(s->wrong, "%s", s->wrong);
    simulation_free(s);
}

Test(scheduler, refused_in_the_next_plan) {
    struct simulation *s = &simulation;
    simulation_init(s, 4, 2, 64, 100, true);
    hand_over(s, submit(s, 64, 1));  /* fits exactly */
    hand_over(s, submit(s, 65, 1));  /* more KV than there is */
    hand_over(s, submit(s, 100, 1)); /* no place for a token in the context */
    cr_assert_not(scheduler_cancel(s->scheduler, 2), "it has ended already");
    cr_assert_not(scheduler_idle(s->scheduler));
    run_step(s);
    cr_assert_eq(s->fates[1].reason, FINISH_LENGTH);
    cr_assert_eq(s->fates[2].reason, FINISH_REFUSED);
    cr_assert_eq(s->fates[3].reason, FINISH_REFUSED);
    cr_assert(scheduler_idle(s->scheduler));
    cr_assert_null(s->wrong, "%s", s->wrong);
    simulation_free(s);
}

Test(scheduler, ends_of_an_output) {
    struct simulation *s = &simulation;
    simulation_init(s, 40, 8, 400, 50, true);
    for (int key = 1; key <= 4; key++) submit(s, 20, 25);
    for (int i = 0; i < 4; i++) { /* their third token stops the first three */
        struct fate *fate = &s->fates[i + 1];
        fate->stop_ids[0] = token_of((uint64_t)i + 1, 2);
        fate->stop_ids[1] = -1;
        fate->n_stop_ids = i < 3 ? 2 : 0;
        fate->min_tokens = i == 1 ? 3 : i == 2 ? 4 : 0;
        hand_over(s, fate);
    }
    hand_over(s, submit(s, 20, 1000));
    run_all(s, 1000);
    cr_assert_null(s->wrong, "%s", s->wrong);
    cr_assert_eq(s->fates[1].reason, FINISH_STOP_TOKEN);
    cr_assert(s->fates[1].n_output <= 3);
    cr_assert_eq(s->fates[2].n_output, 3);
    cr_assert(s->fates[3].n_output > 3, "too early a stop token is passed over");
    cr_assert_eq(s->fates[4].reason, FINISH_LENGTH);
    cr_assert_eq(s->fates[4].n_output, 25);
    cr_assert_eq(s->fates[5].reason, FINISH_LENGTH);
    cr_assert_eq(s->fates[5].n_output, 30); /* the context is full */
    simulation_free(s);
}

/* The cached part of a prompt is reported, and is not computed again. */
Test(scheduler, prefix_hits_are_reported) {
    struct simulation *s = &simulation;
    simulation_init(s, 40, 1, 400, 400, true);
    hand_over(s, submit(s, 70, 1)); /* keys 1 and 3 share 40 tokens, key 2 begins otherwise */
    hand_over(s, submit(s, 70, 1));
    hand_over(s, submit(s, 70, 2));
    int cached[3];
    for (int i = 0; i < 3; i++) {
        const struct scheduler_plan *plan = scheduler_plan(s->scheduler, 0);
        cr_assert_eq(plan->n_items, 1);
        cached[i] = plan->items[0].request->n_cached;
        cr_assert_eq(plan->items[0].position, cached[i]);
        cr_assert_eq(plan->items[0].n_rows, 70 - cached[i]);
        scheduler_computed(s->scheduler, &plan->items[0]);
        struct request *request = plan->items[0].request;
        enum finish_reason reason = scheduler_commit(s->scheduler, request, 0);
        if (reason != FINISH_NONE) scheduler_forget(s->scheduler, request);
    }
    cr_assert_eq(cached[0], 0);
    cr_assert_eq(cached[1], 0);
    cr_assert_eq(cached[2], 32);
    simulation_free(s); /* with one still running: destroy gives its memory back */
}

/* A request that waits for room asks the prefix cache in every plan; it counts once. */
Test(scheduler, waiting_does_not_count_as_queries) {
    struct simulation *s = &simulation;
    simulation_init(s, 6, 2, 100, 90, true);
    hand_over(s, submit(s, 64, 20));
    hand_over(s, submit(s, 63, 1));
    for (int i = 0; i < 10; i++) run_step(s);
    cr_assert_eq(scheduler_n_waiting(s->scheduler), 1);
    cr_assert_eq(kv_blocks_stats(s->pool).query_tokens, 64);
    run_all(s, 1000);
    cr_assert_null(s->wrong, "%s", s->wrong);
    cr_assert_eq(kv_blocks_stats(s->pool).query_tokens, 64 + 63);
    simulation_free(s);
}
