#include "worker/scheduler.h"

#include <stdlib.h>

#include "common/error.h"

struct scheduler {
    struct scheduler_options options;
    struct spec_policy policy;
    int n_logit_rows; /* of the plan being made */
    struct request *waiting, **waiting_tail; /* in order of arrival, preempted ones in front */
    int n_waiting;
    struct request **running; /* [max_sequences], oldest first */
    int n_running;
    struct request **ended; /* grows; reported by the next plan */
    int n_ended, ended_capacity;
    int n_reported; /* of ended, by the last plan */
    struct scheduler_plan plan;
    uint64_t n_preemptions;
};

struct scheduler *scheduler_create(const struct scheduler_options *options) {
    CHECK(options->max_sequences > 0 && options->max_step_tokens > options->max_sequences);
    struct scheduler *s = xcalloc(1, sizeof *s);
    s->options = *options;
    if (s->options.max_logit_rows == 0) s->options.max_logit_rows = options->max_sequences;
    CHECK(s->options.max_logit_rows >= options->max_sequences);
    s->policy = (struct spec_policy){.mode = SPEC_PLAIN};
    s->waiting_tail = &s->waiting;
    size_t n = (size_t)options->max_sequences;
    s->running = xcalloc(n, sizeof *s->running);
    s->plan.items = xcalloc(n, sizeof *s->plan.items);
    s->plan.started = xcalloc(n, sizeof *s->plan.started);
    return s;
}

static void request_free(struct request *request) {
    kv_sequence_free(&request->kv);
    free(request->tokens);
    free(request->bias);
    free(request->stop_ids);
    free(request);
}

void scheduler_destroy(struct scheduler *s) {
    if (s == NULL) return;
    for (int i = 0; i < s->n_running; i++) {
        kv_blocks_release(s->options.pool, &s->running[i]->kv);
        request_free(s->running[i]);
    }
    while (s->waiting != NULL) {
        struct request *request = s->waiting;
        s->waiting = request->next;
        request_free(request);
    }
    for (int i = s->n_reported; i < s->n_ended; i++) request_free(s->ended[i]);
    free(s->running);
    free(s->ended);
    free(s->plan.items);
    free(s->plan.started);
    free(s);
}

/* --- queues ---------------------------------------------------------------------------------- */

static void wait_last(struct scheduler *s, struct request *request) {
    request->state = REQUEST_WAITING;
    request->next = NULL;
    *s->waiting_tail = request;
    s->waiting_tail = &request->next;
    s->n_waiting++;
}

static void wait_first(struct scheduler *s, struct request *request) {
    request->state = REQUEST_WAITING;
    request->next = s->waiting;
    if (s->waiting == NULL) s->waiting_tail = &request->next;
    s->waiting = request;
    s->n_waiting++;
}

static struct request *unwait(struct scheduler *s, struct request **at) {
    struct request *request = *at;
    *at = request->next;
    if (s->waiting_tail == &request->next) s->waiting_tail = at;
    request->next = NULL;
    s->n_waiting--;
    return request;
}

static void unrun(struct scheduler *s, struct request *request) {
    int i = 0;
    while (s->running[i] != request) i++;
    for (s->n_running--; i < s->n_running; i++) s->running[i] = s->running[i + 1];
}

static void end(struct scheduler *s, struct request *request, enum finish_reason reason) {
    kv_blocks_release(s->options.pool, &request->kv);
    request->state = REQUEST_ENDED;
    request->reason = reason;
}

static void end_and_report(struct scheduler *s, struct request *request,
                           enum finish_reason reason) {
    end(s, request, reason);
    if (s->n_ended == s->ended_capacity) {
        s->ended_capacity = s->ended_capacity ? 2 * s->ended_capacity : 16;
        s->ended = xrealloc(s->ended, (size_t)s->ended_capacity * sizeof *s->ended);
    }
    s->ended[s->n_ended++] = request;
}

/* --- coming and going ------------------------------------------------------------------------ */

/* Its last token needs no KV of its own: nothing is drawn after it. */
static bool can_ever_run(const struct scheduler *s, const struct request *request) {
    int64_t blocks = (request->n_prompt + KV_BLOCK - 1) / KV_BLOCK;
    return request->n_prompt < s->options.max_context && blocks <= s->options.n_blocks;
}

void scheduler_submit(struct scheduler *s, struct request *request) {
    CHECK(request->n_prompt > 0 && request->n_tokens == request->n_prompt);
    if (can_ever_run(s, request)) wait_last(s, request);
    else end_and_report(s, request, FINISH_REFUSED);
}

bool scheduler_cancel(struct scheduler *s, uint64_t key) {
    for (int i = 0; i < s->n_running; i++) {
        if (s->running[i]->key == key) return s->running[i]->cancelled = true;
    }
    for (struct request *request = s->waiting; request != NULL; request = request->next) {
        if (request->key == key) return request->cancelled = true;
    }
    return false;
}

static enum finish_reason reason_to_drop(const struct request *request, int64_t now_ns) {
    if (request->cancelled) return FINISH_CANCELLED;
    if (request->deadline_ns != 0 && now_ns >= request->deadline_ns) return FINISH_DEADLINE;
    return FINISH_NONE;
}

static void drop(struct scheduler *s, int64_t now_ns) {
    for (int i = 0; i < s->n_running;) {
        struct request *request = s->running[i];
        enum finish_reason reason = reason_to_drop(request, now_ns);
        if (reason == FINISH_NONE) {
            i++;
            continue;
        }
        unrun(s, request);
        end_and_report(s, request, reason);
    }
    for (struct request **at = &s->waiting; *at != NULL;) {
        enum finish_reason reason = reason_to_drop(*at, now_ns);
        if (reason == FINISH_NONE) at = &(*at)->next;
        else end_and_report(s, unwait(s, at), reason);
    }
}

void scheduler_forget(struct scheduler *s, struct request *request) {
    (void)s;
    CHECK(request->state == REQUEST_ENDED);
    request_free(request);
}

void scheduler_set_policy(struct scheduler *s, const struct spec_policy *policy) {
    s->policy = *policy;
}

/* --- planning -------------------------------------------------------------------------------- */

static void drop_candidates(struct request *request) {
    if (request->spec.n_tail > 0) request->spec.abandon = true;
    request->spec.n_tail = 0;
}

static void preempt(struct scheduler *s, struct request *request) {
    unrun(s, request);
    drop_candidates(request);
    kv_blocks_release(s->options.pool, &request->kv);
    request->n_computed = 0;
    request->n_preemptions++;
    s->n_preemptions++;
    wait_first(s, request);
}

/* Makes room for the request's positions, at the cost of younger ones; false: it was itself the
 * youngest and had to go. The oldest always finds room: it fits alone. */
static bool make_room(struct scheduler *s, struct request *request, int n_positions) {
    while (!kv_blocks_extend(s->options.pool, &request->kv, n_positions)) {
        struct request *youngest = s->running[s->n_running - 1];
        bool itself = youngest == request;
        if (itself && s->n_running == 1) {
            /* Alone and still too long for all the memory there is. */
            unrun(s, request);
            end_and_report(s, request, FINISH_REFUSED);
            return false;
        }
        preempt(s, youngest);
        if (itself) return false;
    }
    return true;
}

static int tokens_left(const struct scheduler *s, const struct request *request) {
    int output = request->max_tokens - (request->n_tokens - request->n_prompt);
    int context = s->options.max_context - request->n_tokens;
    return output < context ? output : context;
}

static int rows_left(const struct scheduler *s) {
    return s->options.max_step_tokens - s->plan.n_rows;
}

static void plan_item(struct scheduler *s, struct scheduler_item item) {
    struct request *request = item.request;
    s->plan.items[s->plan.n_items++] = item;
    s->plan.n_rows += item.n_rows;
    if (request->started) return;
    request->started = true;
    s->plan.started[s->plan.n_started++] = request;
}

/* Prefill: as many of the rows that are left as the budget allows. */
static void plan_prefill(struct scheduler *s, struct request *request, int n_rows) {
    int left = request->n_tokens - request->n_computed;
    bool draws = n_rows == left;
    if (left > 1) s->plan.n_prefill_rows += n_rows;
    s->n_logit_rows += draws;
    plan_item(s, (struct scheduler_item){request, request->n_computed, n_rows, draws, {0}});
}

static int chunk_of(const struct scheduler *s, const struct request *request) {
    int left = request->n_tokens - request->n_computed;
    bool may_draw = s->n_logit_rows < s->options.max_logit_rows;
    if (left == 1 && !may_draw) return 0;
    if (!may_draw) left--;
    return left < rows_left(s) ? left : rows_left(s);
}

/* The windows that leave every running sequence its rows. */
static int most_window(const struct scheduler *s) {
    int rows = s->options.max_logit_rows < s->options.max_step_tokens
                   ? s->options.max_logit_rows
                   : s->options.max_step_tokens;
    int most = s->n_running > 0 ? rows / s->n_running - 1 : 0;
    return most > SPEC_MAX_WINDOW ? SPEC_MAX_WINDOW : most;
}

/* Decoding: the rows of the sequence's round. It is a plain one where memory does not reach;
 * nobody is preempted for candidates. False: the sequence had to go. */
static bool plan_round(struct scheduler *s, struct request *request, int window, bool any_tails) {
    struct round_plan round =
        spec_policy_round(&s->policy, &request->spec.wish, request->spec.n_tail, any_tails, window,
                          tokens_left(s, request));
    int logit_rows = s->options.max_logit_rows - s->n_logit_rows;
    if (round_rows(round) > rows_left(s) || round_rows(round) > logit_rows) {
        if (rows_left(s) < 1 || logit_rows < 1) return true; /* its turn comes */
        drop_candidates(request);
        round = (struct round_plan){0};
    }
    int end = request->n_computed + round_rows(round);
    if (round_rows(round) > 1 && !kv_blocks_extend(s->options.pool, &request->kv, end)) {
        drop_candidates(request);
        round = (struct round_plan){0};
    }
    if (!make_room(s, request, request->n_computed + round_rows(round))) return false;
    s->n_logit_rows += round_rows(round);
    plan_item(s, (struct scheduler_item){request, request->n_computed, round_rows(round), true,
                                         round});
    return true;
}

/* Running sequences, oldest first: those that decode (one row left), or those that prefill. */
static void plan_running(struct scheduler *s, bool decoding) {
    bool any_tails = false;
    for (int i = 0; i < s->n_running; i++) any_tails |= s->running[i]->spec.n_tail > 0;
    int window = most_window(s);
    for (int i = 0; i < s->n_running; i++) {
        struct request *request = s->running[i];
        if ((request->n_tokens - request->n_computed == 1) != decoding) continue;
        if (decoding) {
            if (!plan_round(s, request, window, any_tails)) i--;
            continue;
        }
        int n_rows = chunk_of(s, request);
        if (n_rows == 0) return;
        if (make_room(s, request, request->n_computed + n_rows)) {
            plan_prefill(s, request, n_rows);
        } else {
            i--;
        }
    }
}

/* A preempted sequence may stand in the plan already (decode rows come before prefill). */
static void forget_preempted_items(struct scheduler *s) {
    int n = 0;
    s->plan.n_rows = 0;
    for (int i = 0; i < s->plan.n_items; i++) {
        if (s->plan.items[i].request->state != REQUEST_RUNNING) continue;
        s->plan.items[n++] = s->plan.items[i];
        s->plan.n_rows += s->plan.items[i].n_rows;
    }
    s->plan.n_items = n;
}

/* Room for the whole sequence now, and a block for each running one, so that whoever is admitted is
 * not preempted at once. */
static bool admit(struct scheduler *s, struct request *request) {
    struct kv_blocks *pool = s->options.pool;
    int found = kv_blocks_match(pool, &request->kv, request->tokens, request->n_tokens);
    int blocks = (request->n_tokens + KV_BLOCK - 1) / KV_BLOCK - request->kv.n_blocks;
    if (s->n_running > 0 && blocks + s->n_running > kv_blocks_available(pool)) {
        kv_blocks_unmatch(pool, &request->kv, request->n_tokens);
        return false;
    }
    request->n_computed = found;
    if (!request->started) request->n_cached = found;
    return true;
}

static void plan_waiting(struct scheduler *s) {
    while (s->waiting != NULL && s->n_running < s->options.max_sequences) {
        if (rows_left(s) == 0 || s->n_logit_rows == s->options.max_logit_rows) return;
        if (!admit(s, s->waiting)) return;
        struct request *request = unwait(s, &s->waiting);
        request->state = REQUEST_RUNNING;
        s->running[s->n_running++] = request;
        int n_rows = chunk_of(s, request);
        if (!make_room(s, request, request->n_computed + n_rows)) return;
        plan_prefill(s, request, n_rows);
    }
}

struct scheduler_plan *scheduler_plan(struct scheduler *s, int64_t now_ns) {
    for (int i = s->n_reported; i < s->n_ended; i++) s->ended[i - s->n_reported] = s->ended[i];
    s->n_ended -= s->n_reported;
    s->plan.n_items = s->plan.n_rows = s->plan.n_prefill_rows = s->plan.n_started = 0;
    s->n_logit_rows = 0;

    drop(s, now_ns);
    uint64_t preemptions = s->n_preemptions;
    plan_running(s, true);
    plan_running(s, false);
    forget_preempted_items(s);
    /* Whoever had to make room must not be let in again at once. */
    if (s->n_preemptions == preemptions) plan_waiting(s);

    s->plan.ended = s->ended;
    s->plan.n_ended = s->n_reported = s->n_ended;
    return &s->plan;
}

/* --- after the pass -------------------------------------------------------------------------- */

void scheduler_made(struct scheduler_item *item, int made) {
    item->round = round_made(item->round, made);
    item->n_rows = round_rows(item->round);
}

/* Candidates' KV is not published: they may fall. */
void scheduler_computed(struct scheduler *s, const struct scheduler_item *item) {
    struct request *request = item->request;
    request->n_computed = item->position + item->n_rows;
    int n = request->n_computed < request->n_tokens ? request->n_computed : request->n_tokens;
    kv_blocks_publish(s->options.pool, &request->kv, request->tokens, n);
}

void scheduler_reserve(struct request *request, int n_tokens) {
    if (n_tokens <= request->token_capacity) return;
    request->token_capacity = 2 * n_tokens;
    request->tokens =
        xrealloc(request->tokens, (size_t)request->token_capacity * sizeof *request->tokens);
}

static void append(struct request *request, int32_t token) {
    scheduler_reserve(request, request->n_tokens + 1);
    request->tokens[request->n_tokens++] = token;
}

void scheduler_settle(struct scheduler *s, struct request *request, int n_tail) {
    CHECK(request->state == REQUEST_RUNNING && request->n_computed >= request->n_tokens - 1);
    request->spec.n_tail = n_tail;
    request->n_computed = request->n_tokens - 1;
    kv_blocks_truncate(s->options.pool, &request->kv, request->n_computed);
}

static enum finish_reason reason_to_finish(const struct scheduler *s,
                                           const struct request *request, int32_t token) {
    int n_output = request->n_tokens - request->n_prompt;
    if (n_output >= request->min_tokens) {
        for (int i = 0; i < request->n_stop_ids; i++) {
            if (request->stop_ids[i] == token) return FINISH_STOP_TOKEN;
        }
    }
    if (n_output >= request->max_tokens) return FINISH_LENGTH;
    if (request->n_tokens >= s->options.max_context) return FINISH_LENGTH;
    return FINISH_NONE;
}

enum finish_reason scheduler_commit(struct scheduler *s, struct request *request, int32_t token) {
    CHECK(request->state == REQUEST_RUNNING && request->n_computed >= request->n_tokens);
    append(request, token);
    enum finish_reason reason = reason_to_finish(s, request, token);
    if (reason == FINISH_NONE) return reason;
    unrun(s, request);
    end(s, request, reason);
    return reason;
}

bool scheduler_idle(const struct scheduler *s) {
    return s->n_running == 0 && s->waiting == NULL && s->n_ended == s->n_reported;
}

int scheduler_n_running(const struct scheduler *s) {
    return s->n_running;
}

int scheduler_n_waiting(const struct scheduler *s) {
    return s->n_waiting;
}

uint64_t scheduler_n_preemptions(const struct scheduler *s) {
    return s->n_preemptions;
}
