#include "worker/step_loop.h"

#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "worker/scheduler.h"

static_assert((int)FINISH_REFUSED == (int)TANDEM__V1__FINISH_REASON__FINISH_REFUSED, "one list");
static_assert((int)KV_BLOCK == (int)BACKEND_KV_BLOCK, "one block size");

/* Columns of the last step. Sized once for the most that a step can bring; only what a step may bring
 * without bound (finished requests that were waiting) grows. */
struct columns {
    uint64_t *keys;       /* [max_sequences] one token each */
    uint32_t *token_counts;
    int32_t *tokens;
    size_t n;
    uint64_t *finished_keys;
    uint32_t *finish_reasons, *cached_tokens;
    size_t n_finished, finished_capacity;
    uint64_t *started_keys; /* [max_sequences] */
    size_t n_started;
    float *logprobs; /* [max_sequences] */
    uint32_t *n_top;
    int32_t *top_ids; /* [max_sequences * SAMPLE_MAX_LOGPROBS] */
    float *top_logprobs;
    size_t n_logprobs, n_top_entries;
};

struct step_loop {
    struct step_loop_options options;
    struct kv_blocks *pool;
    struct scheduler *scheduler;
    /* The batch of the step. */
    int32_t *tokens;                  /* [max_step_tokens] */
    struct backend_segment *segments; /* [max_sequences] */
    int32_t *logit_rows;              /* [max_sequences] */
    struct columns columns;
    int n_rows, n_prefill_rows;
    bool told_idle; /* the stats of an empty replica have been told */
    int64_t step_ns;
};

struct step_loop *step_loop_create(const struct step_loop_options *options) {
    struct step_loop *loop = xcalloc(1, sizeof *loop);
    loop->options = *options;
    loop->told_idle = true;
    loop->pool = kv_blocks_create(options->n_blocks, options->prefix_cache);
    struct scheduler_options scheduler = {loop->pool, options->n_blocks, options->max_sequences,
                                          options->max_step_tokens, options->max_context};
    loop->scheduler = scheduler_create(&scheduler);
    size_t n = (size_t)options->max_sequences;
    loop->tokens = xcalloc((size_t)options->max_step_tokens, sizeof *loop->tokens);
    loop->segments = xcalloc(n, sizeof *loop->segments);
    loop->logit_rows = xcalloc(n, sizeof *loop->logit_rows);
    struct columns *c = &loop->columns;
    c->keys = xcalloc(n, sizeof *c->keys);
    c->token_counts = xcalloc(n, sizeof *c->token_counts);
    c->tokens = xcalloc(n, sizeof *c->tokens);
    c->started_keys = xcalloc(n, sizeof *c->started_keys);
    c->logprobs = xcalloc(n, sizeof *c->logprobs);
    c->n_top = xcalloc(n, sizeof *c->n_top);
    c->top_ids = xcalloc(n * SAMPLE_MAX_LOGPROBS, sizeof *c->top_ids);
    c->top_logprobs = xcalloc(n * SAMPLE_MAX_LOGPROBS, sizeof *c->top_logprobs);
    return loop;
}

void step_loop_destroy(struct step_loop *loop) {
    if (loop == NULL) return;
    scheduler_destroy(loop->scheduler);
    kv_blocks_destroy(loop->pool);
    free(loop->tokens);
    free(loop->segments);
    free(loop->logit_rows);
    struct columns *c = &loop->columns;
    void *memory[] = {c->keys,          c->token_counts,     c->tokens,   c->finished_keys,
                      c->finish_reasons, c->cached_tokens, c->started_keys, c->logprobs,
                      c->n_top,         c->top_ids,      c->top_logprobs};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
    free(loop);
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
    c->n = c->n_finished = c->n_started = c->n_logprobs = c->n_top_entries = 0;
}

static void add_finished(struct columns *c, const struct request *request) {
    if (c->n_finished == c->finished_capacity) {
        c->finished_capacity = c->finished_capacity ? 2 * c->finished_capacity : 64;
        size_t n = c->finished_capacity;
        c->finished_keys = xrealloc(c->finished_keys, n * sizeof *c->finished_keys);
        c->finish_reasons = xrealloc(c->finish_reasons, n * sizeof *c->finish_reasons);
        c->cached_tokens = xrealloc(c->cached_tokens, n * sizeof *c->cached_tokens);
    }
    c->finished_keys[c->n_finished] = request->key;
    c->finish_reasons[c->n_finished] = (uint32_t)request->reason;
    c->cached_tokens[c->n_finished] = (uint32_t)request->n_cached;
    c->n_finished++;
}

static void add_token(struct columns *c, const struct request *request,
                      const struct sample_result *result) {
    c->keys[c->n] = request->key;
    c->token_counts[c->n] = 1;
    c->tokens[c->n] = result->token;
    c->n++;
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

static void report_ends(struct step_loop *loop, const struct scheduler_plan *plan) {
    struct columns *c = &loop->columns;
    for (int i = 0; i < plan->n_ended; i++) {
        add_finished(c, plan->ended[i]);
        scheduler_forget(loop->scheduler, plan->ended[i]);
    }
    for (int i = 0; i < plan->n_started; i++) {
        c->started_keys[c->n_started++] = plan->started[i]->key;
    }
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
        row += item->n_rows;
        if (item->draws) loop->logit_rows[n_logit_rows++] = row - 1;
    }
    return (struct transformer_batch){loop->tokens,  row,
                                      loop->segments, plan->n_items,
                                      loop->logit_rows, n_logit_rows};
}

/* The token that follows the request's last one. */
static struct sample_result draw(struct step_loop *loop, const struct request *request,
                                 float *logits) {
    struct sample_params params = request->sampling;
    if (request->n_tokens - request->n_prompt < request->min_tokens) {
        params.banned = request->stop_ids;
        params.n_banned = request->n_stop_ids;
    }
    struct sample_result result;
    backend_sample(loop->options.backend, &result, logits, loop->options.config->vocab, &params,
                   request->tokens, request->n_prompt, request->n_tokens, request->n_tokens);
    return result;
}

static void settle(struct step_loop *loop, const struct scheduler_plan *plan, float *logits) {
    size_t vocab = (size_t)loop->options.config->vocab;
    for (int i = 0; i < plan->n_items; i++) {
        const struct scheduler_item *item = &plan->items[i];
        struct request *request = item->request;
        scheduler_computed(loop->scheduler, item);
        if (!item->draws) continue;
        struct sample_result result = draw(loop, request, logits);
        logits += vocab;
        enum finish_reason reason = scheduler_commit(loop->scheduler, request, result.token);
        add_token(&loop->columns, request, &result);
        if (reason == FINISH_NONE) continue;
        request->reason = reason;
        add_finished(&loop->columns, request);
        scheduler_forget(loop->scheduler, request);
    }
}

enum status step_loop_step(struct step_loop *loop, int64_t now_ns, struct error *err) {
    int64_t start = clock_now_ns();
    clear_columns(&loop->columns);
    const struct scheduler_plan *plan = scheduler_plan(loop->scheduler, now_ns);
    report_ends(loop, plan);
    loop->n_rows = plan->n_rows;
    loop->n_prefill_rows = plan->n_prefill_rows;
    if (plan->n_items > 0) {
        struct transformer_batch batch = build_batch(loop, plan);
        float *logits;
        TRY(engine_forward(loop->options.engine, &batch, &logits, err));
        settle(loop, plan, logits);
    }
    loop->told_idle = scheduler_idle(loop->scheduler);
    loop->step_ns = clock_now_ns() - start;
    return STATUS_OK;
}

void step_loop_describe(const struct step_loop *loop, Tandem__V1__Step *step,
                        Tandem__V1__StepStats *stats) {
    const struct columns *c = &loop->columns;
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
    step->n_keys = step->n_token_counts = step->n_tokens = c->n;
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
