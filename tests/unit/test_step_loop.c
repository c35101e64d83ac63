/* The one promise, end to end inside one process: what a request draws depends on it alone. Every
 * request of a mixed lot runs by itself first; then the lot runs in every way there is (together,
 * with little KV memory, in small chunks, with and without the prefix cache, on 1, 2 and 4 ranks),
 * and each must bring the same tokens and the same bits of log-probability. */
#include "tests/unit/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/reference/random.h"
#include "worker/local_group.h"
#include "worker/scheduler.h"
#include "worker/step_loop.h"

#define MODEL TANDEM_SOURCE_DIR "/assets/models/llama-tale-target"

enum { N_REQUESTS = 21, MAX_PROMPT = 120, MAX_OUTPUT = 40, VOCAB = 4000, N_TOP = 3 };
enum { MAX_SEQUENCES = 16, MAX_CONTEXT = 256 };

struct lot {
    int32_t prompts[N_REQUESTS][MAX_PROMPT];
    int32_t stop_ids[N_REQUESTS];
    struct step_request requests[N_REQUESTS]; /* keys from 1 */
};

/* What came of a request. */
struct outcome {
    int32_t tokens[MAX_OUTPUT];
    int n_tokens;
    float logprobs[MAX_OUTPUT];
    int32_t top_ids[MAX_OUTPUT * N_TOP];
    float top_logprobs[MAX_OUTPUT * N_TOP];
    int n_logprobs, n_top;
    enum finish_reason reason;
    int n_cached, n_starts, n_ends;
};

struct outcomes {
    struct outcome of[N_REQUESTS];
    uint64_t preemptions, hit_tokens;
    int n_steps;
    bool over_budget;
};

/* A way to run. Zero means what the first run used. */
struct way {
    int degree, n_blocks, max_step_tokens, n_threads;
    bool prefix_cache, one_by_one, without_logprobs;
};

struct house {
    struct local_group *group;
    struct step_loop *loop;
    struct way way;
};

/* --- the lot ---------------------------------------------------------------------------------- */

/* A third of the prompts begin with the same 40 tokens; greedy and drawn ones, with and without
 * penalties, filters, stop tokens and log-probs, are mixed. */
static struct lot *lot_create(uint64_t seed) {
    struct lot *lot = calloc(1, sizeof *lot);
    if (lot == NULL) abort();
    struct test_random random = {seed};
    for (int i = 0; i < N_REQUESTS; i++) {
        struct step_request *request = &lot->requests[i];
        int n_prompt = i % 3 == 0 ? 50 + i : 1 + random_below(&random, MAX_PROMPT);
        for (int p = 0; p < n_prompt; p++) {
            int token = random_below(&random, VOCAB);
            lot->prompts[i][p] = i % 3 == 0 && p < 40 ? 100 + 7 * p : token;
        }
        lot->stop_ids[i] = random_below(&random, VOCAB);
        *request = (struct step_request){
            .key = (uint64_t)i + 1,
            .prompt = lot->prompts[i],
            .n_prompt = n_prompt,
            .sampling = {.temperature = i % 2 == 0 ? 0 : 1,
                         .top_p = i % 4 == 1 ? 0.9f : 1,
                         .top_k = i % 5 == 3 ? 50 : 0,
                         .repetition_penalty = i % 7 == 2 ? 1.2f : 1,
                         .presence_penalty = i % 7 == 3 ? 0.5f : 0,
                         .seed = random_u64(&random),
                         .n_logprobs = i % 3 == 0 ? -1 : i % 3 == 1 ? 0 : N_TOP},
            .stop_token_ids = &lot->stop_ids[i],
            .n_stop_token_ids = 1,
            .ignore_eos = i % 4 == 0,
            .max_tokens = 1 + random_below(&random, MAX_OUTPUT),
            .min_tokens = i % 6 == 5 ? 10 : 0,
        };
    }
    return lot;
}

/* --- running ---------------------------------------------------------------------------------- */

static enum status house_open(struct house *house, const struct way *way, struct error *err) {
    *house = (struct house){.way = *way};
    int n_blocks = way->n_blocks > 0 ? way->n_blocks : 400;
    int max_step_tokens = way->max_step_tokens > 0 ? way->max_step_tokens : 512;
    struct local_group_options options = {
        .model_dir = MODEL,
        .degree = way->degree > 0 ? way->degree : 1,
        .n_threads = way->n_threads > 0 ? way->n_threads : 1,
        .weights = DTYPE_BF16,
        .n_blocks = n_blocks,
        .max_rows = max_step_tokens,
        .max_logit_rows = MAX_SEQUENCES,
        .max_sequences = MAX_SEQUENCES,
        .max_context = MAX_CONTEXT,
    };
    TRY(local_group_create(&house->group, &options, err));
    struct step_loop_options loop = {
        .engine = local_group_engine(house->group),
        .backend = local_group_backend(house->group),
        .config = local_group_config(house->group),
        .n_blocks = n_blocks,
        .max_sequences = MAX_SEQUENCES,
        .max_step_tokens = max_step_tokens,
        .max_context = MAX_CONTEXT,
        .prefix_cache = way->prefix_cache,
    };
    house->loop = step_loop_create(&loop);
    return STATUS_OK;
}

static void house_close(struct house *house) {
    step_loop_destroy(house->loop);
    local_group_destroy(house->group);
}

static void note_logprob(struct outcome *outcome, const Tandem__V1__Step *step, size_t entry,
                         size_t *top) {
    outcome->logprobs[outcome->n_logprobs++] = step->logprobs[entry];
    for (uint32_t k = 0; k < step->n_top[entry]; k++, (*top)++) {
        outcome->top_ids[outcome->n_top] = step->top_ids[*top];
        outcome->top_logprobs[outcome->n_top++] = step->top_logprobs[*top];
    }
}

/* One step, and what it brought. asked: whether a key asked for log-probs. */
static enum status house_step(struct house *house, struct outcomes *out, const bool *asked,
                              int64_t now_ns, struct error *err) {
    TRY(step_loop_step(house->loop, now_ns, err));
    Tandem__V1__Step step;
    Tandem__V1__StepStats stats;
    step_loop_describe(house->loop, &step, &stats);
    size_t entry = 0, top = 0;
    for (size_t i = 0; i < step.n_keys; i++) {
        struct outcome *outcome = &out->of[step.keys[i] - 1];
        outcome->tokens[outcome->n_tokens++] = step.tokens[i];
        if (asked[step.keys[i] - 1]) note_logprob(outcome, &step, entry++, &top);
    }
    for (size_t i = 0; i < step.n_started_keys; i++) out->of[step.started_keys[i] - 1].n_starts++;
    for (size_t i = 0; i < step.n_finished_keys; i++) {
        struct outcome *outcome = &out->of[step.finished_keys[i] - 1];
        outcome->reason = (enum finish_reason)step.finish_reasons[i];
        outcome->n_cached = (int)step.cached_tokens[i];
        outcome->n_ends++;
    }
    out->preemptions = stats.preemptions;
    out->hit_tokens = stats.prefix_hit_tokens;
    if (house->way.max_step_tokens > 0 && stats.rows > (uint32_t)house->way.max_step_tokens) {
        out->over_budget = true;
    }
    out->n_steps++;
    return STATUS_OK;
}

static enum status drain(struct house *house, struct outcomes *out, const bool *asked,
                         struct error *err) {
    while (!step_loop_idle(house->loop)) {
        if (out->n_steps > 20000) return error_set(err, STATUS_INTERNAL, "it never ends");
        TRY(house_step(house, out, asked, 0, err));
    }
    return STATUS_OK;
}

/* The whole lot, the way the house wants it. */
static enum status run_lot(struct house *house, const struct lot *lot, struct outcomes *out,
                           struct error *err) {
    memset(out, 0, sizeof *out);
    bool asked[N_REQUESTS];
    for (int i = 0; i < N_REQUESTS; i++) {
        struct step_request request = lot->requests[i];
        if (house->way.without_logprobs) request.sampling.n_logprobs = -1;
        asked[i] = request.sampling.n_logprobs >= 0;
        step_loop_submit(house->loop, &request);
        if (house->way.one_by_one) {
            TRY(drain(house, out, asked, err));
        } else if (i % 4 == 3) { /* they do not come all at once */
            TRY(house_step(house, out, asked, 0, err));
        }
    }
    return drain(house, out, asked, err);
}

static enum status run_way(const struct lot *lot, const struct way *way, struct outcomes *out,
                           struct error *err) {
    struct house house;
    TRY(house_open(&house, way, err));
    enum status status = run_lot(&house, lot, out, err);
    house_close(&house);
    return status;
}

/* --- comparing -------------------------------------------------------------------------------- */

/* NULL where both are the same; log-probs only where both have them. */
static const char *compare_one(const struct outcome *a, const struct outcome *b) {
    if (b->n_starts != 1 || b->n_ends != 1) return "not started and ended exactly once";
    if (a->reason != b->reason) return "another reason";
    if (a->n_tokens != b->n_tokens) return "another number of tokens";
    size_t n = (size_t)a->n_tokens;
    if (memcmp(a->tokens, b->tokens, n * sizeof *a->tokens) != 0) return "other tokens";
    if (a->n_logprobs == 0 || b->n_logprobs == 0) return NULL;
    if (a->n_logprobs != a->n_tokens || b->n_logprobs != a->n_tokens) return "log-probs lack";
    if (memcmp(a->logprobs, b->logprobs, n * sizeof *a->logprobs) != 0) return "other log-probs";
    if (a->n_top != b->n_top) return "another number of most likely tokens";
    n = (size_t)a->n_top;
    if (memcmp(a->top_ids, b->top_ids, n * sizeof *a->top_ids) != 0) return "others most likely";
    if (memcmp(a->top_logprobs, b->top_logprobs, n * sizeof *a->top_logprobs) != 0) {
        return "other log-probs of the most likely";
    }
    return NULL;
}

static const char *compare(const struct outcomes *a, const struct outcomes *b, uint64_t *key) {
    for (int i = 0; i < N_REQUESTS; i++) {
        const char *difference = compare_one(&a->of[i], &b->of[i]);
        *key = (uint64_t)i + 1;
        if (difference != NULL) return difference;
    }
    return b->over_budget ? "more rows than the token budget" : NULL;
}

static const struct way alone = {.one_by_one = true};

/* The lot alone, then in a way; tells what the way did. false: a message was printed. */
static bool same_as_alone(uint64_t seed, const struct way *way, struct outcomes *other) {
    struct lot *lot = lot_create(seed);
    static struct outcomes reference;
    struct error err = {0};
    uint64_t key = 0;
    const char *difference = NULL;
    if (run_way(lot, &alone, &reference, &err) != STATUS_OK) difference = err.text;
    else if (run_way(lot, way, other, &err) != STATUS_OK) difference = err.text;
    else difference = compare(&reference, other, &key);
    free(lot);
    if (difference != NULL) {
        printf("seed %llu, request %llu: %s\n", (unsigned long long)seed, (unsigned long long)key,
               difference);
    }
    return difference == NULL;
}

static struct outcomes outcomes; /* too large for a stack */

/* --- the promise ------------------------------------------------------------------------------ */

Test(step_loop, the_lot_is_worth_running) {
    struct lot *lot = lot_create(1);
    struct error err = {0};
    cr_assert_eq(run_way(lot, &alone, &outcomes, &err), STATUS_OK, "%s", err.text);
    int n_tokens = 0, n_logprobs = 0, n_top = 0;
    for (int i = 0; i < N_REQUESTS; i++) {
        const struct outcome *outcome = &outcomes.of[i];
        cr_assert_null(compare_one(outcome, outcome), "request %d: %s", i + 1,
                       compare_one(outcome, outcome));
        cr_assert(outcome->n_tokens >= 1 && outcome->n_tokens <= lot->requests[i].max_tokens);
        n_tokens += outcome->n_tokens;
        n_logprobs += outcome->n_logprobs;
        n_top += outcome->n_top;
    }
    free(lot);
    cr_assert(n_tokens > 200 && n_logprobs > 50 && n_top > 50, "%d %d %d", n_tokens, n_logprobs,
              n_top);
    cr_assert_eq(outcomes.hit_tokens, 0);
    cr_assert_eq(outcomes.preemptions, 0);
}

Test(step_loop, among_others_as_alone) {
    struct way way = {0};
    cr_assert(same_as_alone(1, &way, &outcomes));
    cr_assert(outcomes.n_steps < 200, "they did not run together: %d steps", outcomes.n_steps);
}

Test(step_loop, preempted_as_alone) {
    struct way way = {.n_blocks = 12};
    cr_assert(same_as_alone(2, &way, &outcomes));
    cr_assert(outcomes.preemptions > 0, "KV was never short");
    way.prefix_cache = true;
    cr_assert(same_as_alone(3, &way, &outcomes));
    cr_assert(outcomes.preemptions > 0, "KV was never short");
}

Test(step_loop, in_small_chunks_as_alone) {
    struct way way = {.max_step_tokens = MAX_SEQUENCES + 1};
    cr_assert(same_as_alone(4, &way, &outcomes));
}

Test(step_loop, with_prefix_cache_as_alone) {
    struct way way = {.prefix_cache = true};
    cr_assert(same_as_alone(5, &way, &outcomes));
    cr_assert(outcomes.hit_tokens > 0, "nothing was found");
}

/* The second time everything but the last part of each prompt is found. */
Test(step_loop, a_second_time_as_alone) {
    struct lot *lot = lot_create(6);
    static struct outcomes reference;
    struct error err = {0};
    cr_assert_eq(run_way(lot, &alone, &reference, &err), STATUS_OK, "%s", err.text);
    struct way way = {.prefix_cache = true};
    struct house house;
    cr_assert_eq(house_open(&house, &way, &err), STATUS_OK, "%s", err.text);
    const char *difference[2] = {NULL, NULL};
    uint64_t key;
    int n_uncached = 0;
    for (int time = 0; time < 2; time++) {
        enum status status = run_lot(&house, lot, &outcomes, &err);
        difference[time] = status != STATUS_OK ? err.text : compare(&reference, &outcomes, &key);
    }
    for (int i = 0; i < N_REQUESTS; i++) {
        n_uncached += outcomes.of[i].n_cached != (lot->requests[i].n_prompt - 1) / 16 * 16;
    }
    house_close(&house);
    free(lot);
    cr_assert_null(difference[0], "%s", difference[0]);
    cr_assert_null(difference[1], "%s", difference[1]);
    cr_assert_eq(n_uncached, 0);
}

Test(step_loop, on_several_ranks_as_alone) {
    for (int degree = 2; degree <= 4; degree *= 2) {
        struct way way = {.degree = degree, .n_blocks = 30, .max_step_tokens = 40,
                          .prefix_cache = degree == 4};
        cr_assert(same_as_alone(7, &way, &outcomes), "degree %d", degree);
    }
}

Test(step_loop, with_two_threads_as_alone) {
    struct way way = {.n_threads = 2};
    cr_assert(same_as_alone(8, &way, &outcomes));
}

Test(step_loop, logprobs_change_nothing) {
    struct way way = {.without_logprobs = true};
    cr_assert(same_as_alone(9, &way, &outcomes));
    for (int i = 0; i < N_REQUESTS; i++) cr_assert_eq(outcomes.of[i].n_logprobs, 0);
}

/* --- ends ------------------------------------------------------------------------------------- */

static struct step_request greedy(uint64_t key, const int32_t *prompt, int n_prompt) {
    return (struct step_request){
        .key = key,
        .prompt = prompt,
        .n_prompt = n_prompt,
        .sampling = {.top_p = 1, .repetition_penalty = 1, .n_logprobs = -1},
        .ignore_eos = true,
        .max_tokens = MAX_OUTPUT,
    };
}

Test(step_loop, cancelled_in_the_next_step) {
    static const int32_t prompt[20] = {1, 2, 3};
    static const bool asked[N_REQUESTS];
    struct error err = {0};
    struct house house;
    struct way way = {0};
    cr_assert_eq(house_open(&house, &way, &err), STATUS_OK, "%s", err.text);
    memset(&outcomes, 0, sizeof outcomes);
    for (uint64_t key = 1; key <= 2; key++) {
        struct step_request request = greedy(key, prompt, 20);
        step_loop_submit(house.loop, &request);
    }
    enum status status = STATUS_OK;
    for (int i = 0; i < 5; i++) status |= house_step(&house, &outcomes, asked, 0, &err);
    int before = outcomes.of[0].n_tokens;
    step_loop_cancel(house.loop, 1);
    step_loop_cancel(house.loop, 77); /* nobody */
    status |= house_step(&house, &outcomes, asked, 0, &err);
    int n_ends = outcomes.of[0].n_ends, n_others = outcomes.of[1].n_tokens;
    status |= drain(&house, &outcomes, asked, &err);
    house_close(&house);
    cr_assert_eq(status, STATUS_OK, "%s", err.text);
    cr_assert_eq(before, 5);
    cr_assert_eq(n_ends, 1);
    cr_assert_eq(outcomes.of[0].reason, FINISH_CANCELLED);
    cr_assert_eq(outcomes.of[0].n_tokens, before);
    cr_assert_eq(n_others, 6); /* the other one does not notice */
    cr_assert_eq(outcomes.of[1].n_tokens, MAX_OUTPUT);
    cr_assert_eq(outcomes.of[1].reason, FINISH_LENGTH);
}

Test(step_loop, deadline_and_refusal) {
    static const int32_t prompt[MAX_CONTEXT] = {1, 2, 3};
    static const bool asked[N_REQUESTS];
    struct error err = {0};
    struct house house;
    struct way way = {0};
    cr_assert_eq(house_open(&house, &way, &err), STATUS_OK, "%s", err.text);
    memset(&outcomes, 0, sizeof outcomes);
    struct step_request late = greedy(1, prompt, 20), long_one = greedy(2, prompt, MAX_CONTEXT);
    late.deadline_ns = 1000;
    step_loop_submit(house.loop, &late);
    step_loop_submit(house.loop, &long_one);
    enum status status = house_step(&house, &outcomes, asked, 998, &err);
    enum finish_reason refused = outcomes.of[1].reason;
    status |= house_step(&house, &outcomes, asked, 999, &err);
    bool idle_before = step_loop_idle(house.loop);
    status |= house_step(&house, &outcomes, asked, 1000, &err);
    bool idle_after = step_loop_idle(house.loop);
    house_close(&house);
    cr_assert_eq(status, STATUS_OK, "%s", err.text);
    cr_assert_eq(refused, FINISH_REFUSED);
    cr_assert_eq(outcomes.of[1].n_tokens, 0);
    cr_assert_eq(outcomes.of[0].reason, FINISH_DEADLINE);
    cr_assert_eq(outcomes.of[0].n_tokens, 2);
    cr_assert_not(idle_before);
    cr_assert(idle_after);
}

/* A request that is cut off with everything else: nothing of it may be lost. */
Test(step_loop, destroyed_in_the_middle) {
    struct lot *lot = lot_create(10);
    struct error err = {0};
    struct house house;
    struct way way = {.degree = 2};
    cr_assert_eq(house_open(&house, &way, &err), STATUS_OK, "%s", err.text);
    for (int i = 0; i < N_REQUESTS; i++) step_loop_submit(house.loop, &lot->requests[i]);
    cr_assert_eq(step_loop_step(house.loop, 0, &err), STATUS_OK, "%s", err.text);
    step_loop_cancel(house.loop, 1);
    house_close(&house);
    free(lot);
}
