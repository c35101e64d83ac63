#include "worker/step_loop.h"

#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "worker/scheduler.h"
#include "worker/speculation.h"

static_assert((int)FINISH_REFUSED == (int)TANDEM__V1__FINISH_REASON__FINISH_REFUSED, "one list");
static_assert((int)KV_BLOCK == (int)BACKEND_KV_BLOCK, "one block size");

/* Columns of the last step. Sized once for the most that a step can bring; only what a step may
 * bring without bound (finished requests that were waiting) grows. */
struct columns {
    uint64_t *keys; /* [max_sequences] */
    uint32_t *token_counts, *accepted_counts;
    size_t n_keys;
    int32_t *tokens; /* [max_tokens] */
    size_t n_tokens;
    uint64_t *finished_keys;
    uint32_t *finish_reasons, *cached_tokens;
    Tandem__V1__SpecReport *reports;
    Tandem__V1__SpecReport **report_rows;
    uint32_t (*histograms)[SPEC_MAX_WINDOW + 1];
    size_t n_finished, finished_capacity;
    uint64_t *started_keys; /* [max_sequences] */
    size_t n_started;
    float *logprobs; /* [max_tokens] */
    uint32_t *n_top;
    int32_t *top_ids; /* [max_tokens * SAMPLE_MAX_LOGPROBS] */
    float *top_logprobs;
    size_t n_logprobs, n_top_entries;
};

struct step_loop {
    struct step_loop_options options;
    struct kv_blocks *pool;
    struct scheduler *scheduler;
    struct speculation *speculation; /* NULL: no drafter */
    /* The batch of the step. */
    int32_t *tokens;                  /* [max_step_tokens] */
    struct backend_segment *segments; /* [max_sequences] */
    int32_t *logit_rows;              /* [max_logit_rows] */
    struct sample_params *params;     /* [max_logit_rows], as are the next two: this step's draws */
    struct sample_draw *draws;
    struct sample_result *results;
    float *p, *q;                     /* [vocab] sampling rule `rejection`; NULL: `coupled` */
    struct columns columns;
    Tandem__V1__SpecStats spec_stats;
    Tandem__V1__Policy spec_policy;
    int n_rows, n_prefill_rows;
    bool told_idle; /* the stats of an empty replica have been told */
    int64_t step_ns;
    struct step_loop_times times;
};

static void columns_create(struct columns *c, size_t n, size_t max_tokens) {
    c->keys = xcalloc(n, sizeof *c->keys);
    c->token_counts = xcalloc(n, sizeof *c->token_counts);
    c->accepted_counts = xcalloc(n, sizeof *c->accepted_counts);
    c->tokens = xcalloc(max_tokens, sizeof *c->tokens);
    c->started_keys = xcalloc(n, sizeof *c->started_keys);
    c->logprobs = xcalloc(max_tokens, sizeof *c->logprobs);
    c->n_top = xcalloc(max_tokens, sizeof *c->n_top);
    c->top_ids = xcalloc(max_tokens * SAMPLE_MAX_LOGPROBS, sizeof *c->top_ids);
    c->top_logprobs = xcalloc(max_tokens * SAMPLE_MAX_LOGPROBS, sizeof *c->top_logprobs);
}

static void columns_destroy(struct columns *c) {
    void *memory[] = {c->keys,           c->token_counts,  c->accepted_counts, c->tokens,
                      c->finished_keys,  c->finish_reasons, c->cached_tokens,  c->reports,
                      c->report_rows,    c->histograms,    c->started_keys,    c->logprobs,
                      c->n_top,          c->top_ids,       c->top_logprobs};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
}

static void create_speculation(struct step_loop *loop) {
    const struct step_loop_options *options = &loop->options;
    struct speculation_options speculation = {
        .drafter = options->drafter,
        .remote = options->drafter_remote,
        .handoff_ns = options->handoff_ns,
        .max_sequences = options->max_sequences,
        .max_window = options->max_window,
        .trace = options->trace,
    };
    loop->speculation = speculation_create(&speculation);
    if (options->rule != SAMPLING_REJECTION) return;
    size_t vocab = (size_t)options->config->vocab;
    loop->p = xcalloc(vocab, sizeof *loop->p);
    loop->q = xcalloc(vocab, sizeof *loop->q);
}

struct step_loop *step_loop_create(const struct step_loop_options *options) {
    struct step_loop *loop = xcalloc(1, sizeof *loop);
    loop->options = *options;
    loop->told_idle = true;
    if (loop->options.max_logit_rows == 0) loop->options.max_logit_rows = options->max_sequences;
    loop->pool = kv_blocks_create(options->n_blocks, options->prefix_cache);
    struct scheduler_options scheduler = {
        .pool = loop->pool,
        .n_blocks = options->n_blocks,
        .max_sequences = options->max_sequences,
        .max_step_tokens = options->max_step_tokens,
        .max_context = options->max_context,
        .max_logit_rows = loop->options.max_logit_rows,
    };
    loop->scheduler = scheduler_create(&scheduler);
    size_t n = (size_t)options->max_sequences, n_logit_rows = (size_t)loop->options.max_logit_rows;
    loop->tokens = xcalloc((size_t)options->max_step_tokens, sizeof *loop->tokens);
    loop->segments = xcalloc(n, sizeof *loop->segments);
    loop->logit_rows = xcalloc(n_logit_rows, sizeof *loop->logit_rows);
    loop->params = xcalloc(n_logit_rows, sizeof *loop->params);
    loop->draws = xcalloc(n_logit_rows, sizeof *loop->draws);
    loop->results = xcalloc(n_logit_rows, sizeof *loop->results);
    columns_create(&loop->columns, n, n_logit_rows);
    if (options->drafter != NULL) create_speculation(loop);
    return loop;
}

void step_loop_destroy(struct step_loop *loop) {
    if (loop == NULL) return;
    scheduler_destroy(loop->scheduler);
    kv_blocks_destroy(loop->pool);
    speculation_destroy(loop->speculation);
    columns_destroy(&loop->columns);
    void *memory[] = {loop->tokens, loop->segments, loop->logit_rows,
                      loop->p,      loop->q,        loop->params,
                      loop->draws,  loop->results};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
    free(loop);
}

void step_loop_set_policy(struct step_loop *loop, const struct spec_policy *policy) {
    if (loop->speculation == NULL) return;
    struct spec_policy fit = speculation_fit(loop->speculation, policy);
    speculation_set_policy(loop->speculation, &fit);
    scheduler_set_policy(loop->scheduler, &fit);
}

/* --- requests -------------------------------------------------------------------------------- */

static void copy_stop_ids(struct request *out, const struct step_request *in,
                          const struct model_config *config) {
    int n_eos = in->ignore_eos ? 0 : config->n_eos;
    out->stop_ids = xcalloc((size_t)(n_eos + in->n_stop_token_ids), sizeof *out->stop_ids);
    for (int i = 0; i < n_eos; i++) out->stop_ids[out->n_stop_ids++] = config->eos[i];
    for (int i = 0; i < in->n_stop_token_ids; i++) {
        out->stop_ids[out->n_stop_ids++] = in->stop_token_ids[i];
    }
}

/* What the request asks for, as this replica can run it. */
static struct spec_wish wish_of(const struct step_loop *loop, const struct spec_wish *in) {
    struct spec_wish wish = *in;
    if (loop->speculation == NULL) {
        wish.mode = SPEC_PLAIN;
    } else if (wish.mode >= 0) {
        struct spec_policy policy = {.mode = (enum spec_mode)wish.mode, .window = 1};
        wish.mode = speculation_fit(loop->speculation, &policy).mode;
    }
    return wish;
}

void step_loop_submit(struct step_loop *loop, const struct step_request *in) {
    struct request *request = xcalloc(1, sizeof *request);
    request->key = in->key;
    request->n_prompt = request->n_tokens = in->n_prompt;
    request->token_capacity = in->n_prompt + 256;
    request->tokens = xmalloc((size_t)request->token_capacity * sizeof *request->tokens);
    memcpy(request->tokens, in->prompt, (size_t)in->n_prompt * sizeof *request->tokens);
    request->sampling = in->sampling;
    request->bias = xcalloc((size_t)in->n_biases, sizeof *request->bias);
    for (int i = 0; i < in->n_biases; i++) {
        request->bias[i] = (struct sample_bias){in->bias_tokens[i], in->biases[i]};
    }
    request->sampling.bias = request->bias;
    request->sampling.n_bias = in->n_biases;
    copy_stop_ids(request, in, loop->options.config);
    request->max_tokens = in->max_tokens;
    request->min_tokens = in->min_tokens;
    request->deadline_ns = in->deadline_ns;
    request->spec.slot = -1;
    request->spec.wish = wish_of(loop, &in->wish);
    scheduler_submit(loop->scheduler, request);
}

void step_loop_cancel(struct step_loop *loop, uint64_t key) {
    scheduler_cancel(loop->scheduler, key);
}

bool step_loop_idle(const struct step_loop *loop) {
    return scheduler_idle(loop->scheduler) && loop->told_idle;
}

/* --- columns --------------------------------------------------------------------------------- */

static void clear_columns(struct columns *c) {
    c->n_keys = c->n_tokens = c->n_finished = c->n_started = c->n_logprobs = c->n_top_entries = 0;
}

static void grow_finished(struct columns *c) {
    c->finished_capacity = c->finished_capacity ? 2 * c->finished_capacity : 64;
    size_t n = c->finished_capacity;
    c->finished_keys = xrealloc(c->finished_keys, n * sizeof *c->finished_keys);
    c->finish_reasons = xrealloc(c->finish_reasons, n * sizeof *c->finish_reasons);
    c->cached_tokens = xrealloc(c->cached_tokens, n * sizeof *c->cached_tokens);
    c->reports = xrealloc(c->reports, n * sizeof *c->reports);
    c->report_rows = xrealloc(c->report_rows, n * sizeof *c->report_rows);
    c->histograms = xrealloc(c->histograms, n * sizeof *c->histograms);
}

static void add_finished(struct columns *c, const struct request *request) {
    if (c->n_finished == c->finished_capacity) grow_finished(c);
    c->finished_keys[c->n_finished] = request->key;
    c->finish_reasons[c->n_finished] = (uint32_t)request->reason;
    c->cached_tokens[c->n_finished] = (uint32_t)request->n_cached;
    speculation_report(request, &c->reports[c->n_finished]);
    memcpy(c->histograms[c->n_finished], request->spec.histogram, sizeof *c->histograms);
    c->n_finished++;
}

static void begin_key(struct columns *c, const struct request *request) {
    c->keys[c->n_keys] = request->key;
    c->token_counts[c->n_keys] = c->accepted_counts[c->n_keys] = 0;
    c->n_keys++;
}

/* One more token of the last key. */
static void add_token(struct columns *c, const struct request *request,
                      const struct sample_result *result) {
    c->token_counts[c->n_keys - 1]++;
    c->tokens[c->n_tokens++] = result->token;
    if (request->sampling.n_logprobs < 0) return;
    c->logprobs[c->n_logprobs] = result->logprob;
    c->n_top[c->n_logprobs] = (uint32_t)result->n_top;
    c->n_logprobs++;
    for (int i = 0; i < result->n_top; i++) {
        c->top_ids[c->n_top_entries] = result->top_token[i];
        c->top_logprobs[c->n_top_entries] = result->top_logprob[i];
        c->n_top_entries++;
    }
}

/* --- the step -------------------------------------------------------------------------------- */

static void finish_request(struct step_loop *loop, struct request *request) {
    add_finished(&loop->columns, request);
    if (loop->speculation != NULL) speculation_end(loop->speculation, request);
    scheduler_forget(loop->scheduler, request);
}

static void report_ends(struct step_loop *loop, const struct scheduler_plan *plan) {
    for (int i = 0; i < plan->n_ended; i++) finish_request(loop, plan->ended[i]);
    struct columns *c = &loop->columns;
    for (int i = 0; i < plan->n_started; i++) {
        c->started_keys[c->n_started++] = plan->started[i]->key;
    }
}

/* A sequence that decodes wants the logits of all its rows, one that prefills those of the last. */
static int first_logit_row(const struct scheduler_item *item) {
    return round_rows(item->round) == item->n_rows ? 0 : item->n_rows - 1;
}

static struct transformer_batch build_batch(struct step_loop *loop,
                                            const struct scheduler_plan *plan) {
    int row = 0, n_logit_rows = 0;
    for (int i = 0; i < plan->n_items; i++) {
        const struct scheduler_item *item = &plan->items[i];
        memcpy(loop->tokens + row, item->request->tokens + item->position,
               (size_t)item->n_rows * sizeof *loop->tokens);
        loop->segments[i] = (struct backend_segment){row, item->n_rows, item->position,
                                                     item->request->kv.blocks};
        for (int r = first_logit_row(item); r < item->n_rows && item->draws; r++) {
            loop->logit_rows[n_logit_rows++] = row + r;
        }
        row += item->n_rows;
    }
    return (struct transformer_batch){.tokens = loop->tokens,
                                      .n_rows = row,
                                      .segments = loop->segments,
                                      .n_segments = plan->n_items,
                                      .logit_rows = loop->logit_rows,
                                      .n_logit_rows = n_logit_rows};
}

/* End tokens are banned before min_tokens. */
static struct sample_params params_at(const struct request *request, int position) {
    struct sample_params params = request->sampling;
    if (position - request->n_prompt < request->min_tokens) {
        params.banned = request->stop_ids;
        params.n_banned = request->n_stop_ids;
    }
    return params;
}

/* What is told of the draw for row r of an item's logit rows. */
static void add_draw(struct step_loop *loop, const struct scheduler_item *item, int r, int at) {
    const struct request *request = item->request;
    int position = request->n_tokens + r;
    loop->params[at] = params_at(request, position);
    loop->draws[at] = (struct sample_draw){
        .params = &loop->params[at],
        .history = request->tokens,
        .n_prompt = request->n_prompt,
        .n_history = position,
        .position = position,
        .candidate = r < round_judged(item->round) ? request->tokens[position] : -1,
        .continues = r > 0,
    };
}

/* The target's own tokens behind what each request has, along its candidates while they hold. */
static enum status draw_all(struct step_loop *loop, const struct scheduler_plan *plan,
                            float *logits, struct error *err) {
    int vocab = loop->options.config->vocab, n = 0;
    for (int i = 0; i < plan->n_items; i++) {
        const struct scheduler_item *item = &plan->items[i];
        if (!item->draws) continue;
        for (int r = 0; r < round_rows(item->round); r++) add_draw(loop, item, r, n++);
    }
    if (n == 0) return STATUS_OK;
    backend_sample_begin(loop->options.backend, logits, vocab, vocab, loop->draws, n);
    return backend_sample_end(loop->options.backend, loop->results, err);
}

/* Sampling rule `rejection`: the candidate, or what replaces it; without one the coupled draw. */
static enum status draw_by_rejection(struct step_loop *loop, struct sample_result *out,
                                     const struct scheduler_item *item, int row, float *logits,
                                     struct error *err) {
    const struct request *request = item->request;
    struct backend *backend = loop->options.backend;
    int vocab = loop->options.config->vocab, position = request->n_tokens;
    add_draw(loop, item, 0, 0);
    if (row >= round_judged(item->round)) {
        loop->draws[0].candidate = -1;
        backend_sample_begin(backend, logits, vocab, vocab, loop->draws, 1);
        return backend_sample_end(backend, out, err);
    }
    const struct sample_params *params = loop->draws[0].params;
    int32_t token = request->tokens[position];
    TRY(backend_distribution(backend, loop->p, logits, vocab, &loop->draws[0], err));
    float q = request->spec.candidates[row].q;
    if (!accept_by_rejection(loop->p[token], q, params->seed, position)) {
        memset(loop->q, 0, (size_t)vocab * sizeof *loop->q);
        TRY(speculation_distribution(loop->speculation, loop->q, request, position, err));
        token = accept_residual(loop->p, loop->q, vocab, params->seed, position);
    }
    *out = (struct sample_result){.made = true, .token = token};
    if (params->n_logprobs < 0) return STATUS_OK;
    return backend_logprobs(backend, out, logits, vocab, params->n_logprobs, token, err);
}

/* Walks along the candidates while they are what the target wants; commits them and one token of
 * the target's own, until the round or the request ends. `drawn`: of the item's rows, by draw_all. */
static enum status judge(struct step_loop *loop, const struct scheduler_item *item, float *logits,
                         const struct sample_result *drawn, struct error *err) {
    struct request *request = item->request;
    size_t vocab = (size_t)loop->options.config->vocab;
    int judged = round_judged(item->round), accepted = 0;
    begin_key(&loop->columns, request);
    for (int row = 0; row < round_rows(item->round); row++) {
        int32_t candidate = row < judged ? request->tokens[request->n_tokens] : -1;
        struct sample_result result;
        if (loop->options.rule == SAMPLING_REJECTION) {
            TRY(draw_by_rejection(loop, &result, item, row, logits + (size_t)row * vocab, err));
        } else {
            result = drawn[row];
        }
        CHECK(result.made);
        bool holds = row < judged && result.token == candidate;
        accepted += holds;
        loop->columns.accepted_counts[loop->columns.n_keys - 1] = (uint32_t)accepted;
        add_token(&loop->columns, request, &result);
        enum finish_reason reason = scheduler_commit(loop->scheduler, request, result.token);
        if (reason != FINISH_NONE) {
            request->reason = reason;
            if (loop->speculation != NULL) {
                speculation_settle(loop->speculation, item, accepted, holds);
            }
            finish_request(loop, request);
            return STATUS_OK;
        }
        if (!holds) break;
    }
    int n_tail = 0;
    if (loop->speculation != NULL) {
        n_tail = speculation_settle(loop->speculation, item, accepted, false);
    }
    scheduler_settle(loop->scheduler, request, n_tail);
    return STATUS_OK;
}

static enum status settle(struct step_loop *loop, const struct scheduler_plan *plan, float *logits,
                          struct error *err) {
    size_t vocab = (size_t)loop->options.config->vocab;
    const struct sample_result *drawn = loop->results;
    if (loop->options.rule != SAMPLING_REJECTION) TRY(draw_all(loop, plan, logits, err));
    for (int i = 0; i < plan->n_items; i++) {
        const struct scheduler_item *item = &plan->items[i];
        scheduler_computed(loop->scheduler, item);
        if (!item->draws) continue;
        int n_rows = item->n_rows - first_logit_row(item);
        TRY(judge(loop, item, logits, drawn, err));
        logits += (size_t)n_rows * vocab;
        drawn += n_rows;
    }
    return STATUS_OK;
}

static enum status compute(struct step_loop *loop, struct scheduler_plan *plan, int64_t now_ns,
                           struct error *err) {
    struct step_loop_times *times = &loop->times;
    int64_t start = clock_now_ns();
    if (loop->speculation != NULL) TRY(speculation_start(loop->speculation, plan, now_ns, err));
    int64_t started = clock_now_ns();
    struct transformer_batch batch = build_batch(loop, plan);
    float *logits;
    TRY(engine_forward(loop->options.engine, ENGINE_TARGET, &batch, &logits, err));
    int64_t passed = clock_now_ns();
    if (loop->speculation != NULL) {
        TRY(speculation_finish(loop->speculation, plan, passed - started, err));
    }
    int64_t finished = clock_now_ns();
    TRY(settle(loop, plan, logits, err));
    times->steps++;
    times->pass_ns += passed - started;
    times->draft_ns += started - start + finished - passed;
    times->sample_ns += clock_now_ns() - finished;
    return STATUS_OK;
}

enum status step_loop_step(struct step_loop *loop, int64_t now_ns, struct error *err) {
    int64_t start = clock_now_ns();
    clear_columns(&loop->columns);
    struct scheduler_plan *plan = scheduler_plan(loop->scheduler, now_ns);
    report_ends(loop, plan);
    loop->n_rows = plan->n_rows;
    loop->n_prefill_rows = plan->n_prefill_rows;
    if (plan->n_items > 0) TRY(compute(loop, plan, now_ns, err));
    loop->told_idle = scheduler_idle(loop->scheduler);
    loop->step_ns = clock_now_ns() - start;
    if (plan->n_items > 0) loop->times.total_ns += loop->step_ns;
    if (loop->speculation != NULL) {
        if (scheduler_idle(loop->scheduler)) TRY(speculation_flush(loop->speculation, err));
        speculation_note_step(loop->speculation, (int)loop->columns.n_tokens, loop->step_ns);
    }
    return STATUS_OK;
}

/* The reports' addresses may have moved while they were gathered. */
static void describe_reports(struct columns *c, Tandem__V1__Step *step) {
    for (size_t i = 0; i < c->n_finished; i++) {
        c->reports[i].histogram = c->histograms[i];
        c->report_rows[i] = &c->reports[i];
    }
    step->spec_reports = c->report_rows;
    step->n_spec_reports = c->n_finished;
}

void step_loop_describe(struct step_loop *loop, Tandem__V1__Step *step,
                        Tandem__V1__StepStats *stats) {
    struct columns *c = &loop->columns;
    struct kv_blocks_stats kv = kv_blocks_stats(loop->pool);
    tandem__v1__step_stats__init(stats);
    stats->running = (uint32_t)scheduler_n_running(loop->scheduler);
    stats->waiting = (uint32_t)scheduler_n_waiting(loop->scheduler);
    stats->kv_blocks_used = (uint32_t)kv.n_held;
    stats->rows = (uint32_t)loop->n_rows;
    stats->prefill_rows = (uint32_t)loop->n_prefill_rows;
    stats->preemptions = scheduler_n_preemptions(loop->scheduler);
    stats->prefix_query_tokens = kv.query_tokens;
    stats->prefix_hit_tokens = kv.hit_tokens;
    stats->step_us = (uint32_t)(loop->step_ns / 1000);

    tandem__v1__step__init(step);
    step->keys = c->keys;
    step->token_counts = c->token_counts;
    step->tokens = c->tokens;
    step->n_keys = step->n_token_counts = c->n_keys;
    step->n_tokens = c->n_tokens;
    if (loop->speculation != NULL) {
        step->accepted_counts = c->accepted_counts;
        step->n_accepted_counts = c->n_keys;
        describe_reports(c, step);
        speculation_describe(loop->speculation, &loop->spec_stats, &loop->spec_policy);
        stats->spec = &loop->spec_stats;
    }
    step->finished_keys = c->finished_keys;
    step->finish_reasons = c->finish_reasons;
    step->cached_tokens = c->cached_tokens;
    step->n_finished_keys = step->n_finish_reasons = step->n_cached_tokens = c->n_finished;
    step->started_keys = c->started_keys;
    step->n_started_keys = c->n_started;
    step->logprobs = c->logprobs;
    step->n_top = c->n_top;
    step->n_logprobs = step->n_n_top = c->n_logprobs;
    step->top_ids = c->top_ids;
    step->top_logprobs = c->top_logprobs;
    step->n_top_ids = step->n_top_logprobs = c->n_top_entries;
    step->stats = stats;
}

struct step_loop_times step_loop_times(const struct step_loop *loop) {
    return loop->times;
}
