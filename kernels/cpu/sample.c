/* From a row of logits to a token: bias, penalties, bans, temperature, min-p, top-k, top-p, then the
 * coupled draw. Runs on the leader only, so every rank obeys one decision.
 *
 * The draw looks for argmax of logit + noise. Noise is bounded (GUMBEL_MAX), so a token is passed over
 * without its logarithms when even the best noise its random word can mean would not win; words below
 * a table's step bound that. What is passed over could never have been the argmax. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/gumbel.h"
#include "kernels/cpu/ops.h"

/* NaN loses against everything; all the rest is ordered as numbers. */
static float order_key(float logit) {
    return logit == logit ? logit : -INFINITY;
}

static float *scratch_of(struct backend *backend, int vocab) {
    if (vocab > backend->sample_vocab) {
        size_t n = (size_t)vocab;
        backend->sample_scratch = xrealloc(backend->sample_scratch, n * sizeof(float));
        backend->sample_order = xrealloc(backend->sample_order, n * sizeof(int32_t));
        backend->sample_vocab = vocab;
    }
    return backend->sample_scratch;
}

/* --- log-probabilities of the raw logits ------------------------------------------------------- */

/* log of the sum of exp(logit): sixteen partial sums by id modulo 16, added in order. */
static float log_sum_exp(const float *logits, int vocab) {
    float largest = -INFINITY;
    for (int v = 0; v < vocab; v++) largest = logits[v] > largest ? logits[v] : largest;
    double lanes[16] = {0};
    for (int v = 0; v < vocab; v++) lanes[v & 15] += (double)gumbel_exp(logits[v] - largest);
    double sum = 0;
    for (int i = 0; i < 16; i++) sum += lanes[i];
    return largest + gumbel_log((float)sum);
}

/* What NaN and minus infinity come to: a number that JSON has, far below any real one. */
#define LOGPROB_MIN (-9999.0f)

static float logprob_of(float logit, float total) {
    float logprob = logit - total;
    return logprob > LOGPROB_MIN ? logprob : LOGPROB_MIN;
}

static void take_top(struct sample_result *out, const float *logits, int vocab, int n, float total) {
    out->n_top = 0;
    for (int v = 0; v < vocab; v++) {
        float logprob = logprob_of(logits[v], total);
        int at = out->n_top;
        while (at > 0 && out->top_logprob[at - 1] < logprob) at--;
        if (at >= n) continue;
        if (out->n_top < n) out->n_top++;
        for (int i = out->n_top - 1; i > at; i--) {
            out->top_logprob[i] = out->top_logprob[i - 1];
            out->top_token[i] = out->top_token[i - 1];
        }
        out->top_logprob[at] = logprob;
        out->top_token[at] = v;
    }
}

/* --- what changes the logits ------------------------------------------------------------------- */

static void apply_penalties(struct backend *backend, float *logits, int vocab,
                            const struct sample_params *params, const int32_t *history,
                            int n_prompt, int n_history) {
    bool repeats = params->repetition_penalty != 1.0f;
    if (!repeats && params->presence_penalty == 0 && params->frequency_penalty == 0) return;
    /* counts: how often in the output; -1 marks a token of the prompt alone. */
    scratch_of(backend, vocab);
    int32_t *counts = backend->sample_order;
    for (int i = 0; i < n_history; i++) {
        CHECK(history[i] >= 0 && history[i] < vocab);
        counts[history[i]] = 0;
    }
    for (int i = n_prompt; i < n_history; i++) counts[history[i]]++;
    for (int i = 0; i < n_history; i++) {
        int32_t token = history[i];
        int32_t count = counts[token];
        if (count < 0) continue; /* done */
        if (repeats) {
            logits[token] = logits[token] > 0 ? logits[token] / params->repetition_penalty
                                              : logits[token] * params->repetition_penalty;
        }
        if (count > 0) {
            logits[token] -= params->presence_penalty + params->frequency_penalty * (float)count;
        }
        counts[token] = -1;
    }
}

static void apply_changes(struct backend *backend, float *logits, int vocab,
                          const struct sample_params *params, const int32_t *history, int n_prompt,
                          int n_history) {
    for (int i = 0; i < params->n_bias; i++) {
        int32_t token = params->bias[i].token;
        if (token >= 0 && token < vocab) logits[token] += params->bias[i].bias;
    }
    apply_penalties(backend, logits, vocab, params, history, n_prompt, n_history);
    for (int i = 0; i < params->n_banned; i++) {
        int32_t token = params->banned[i];
        if (token >= 0 && token < vocab) logits[token] = -INFINITY;
    }
}

/* The first of the largest; 0 when there are only NaN and minus infinity. */
static int32_t argmax(const struct backend *backend, const float *logits, int vocab) {
    float largest = backend->ops->row_max(logits, vocab);
    int32_t v = 0;
    while (v < vocab && logits[v] != largest) v++;
    return v < vocab ? v : 0;
}

/* --- filters: which ids may be drawn ----------------------------------------------------------- */

/* By logit, largest first; among equals the lower id. */
static bool before(const float *logits, int32_t a, int32_t b) {
    float x = order_key(logits[a]), y = order_key(logits[b]);
    return x != y ? x > y : a < b;
}

/* Puts the first n of the order in front (in no order): quickselect. */
static void select_first(int32_t *ids, int n_ids, int n, const float *logits) {
    int low = 0, high = n_ids - 1;
    while (low < high) {
        int32_t pivot = ids[low + (high - low) / 2];
        int i = low, j = high;
        while (i <= j) {
            while (before(logits, ids[i], pivot)) i++;
            while (before(logits, pivot, ids[j])) j--;
            if (i <= j) {
                int32_t swap = ids[i];
                ids[i++] = ids[j];
                ids[j--] = swap;
            }
        }
        if (n - 1 <= j) high = j;
        else if (n - 1 >= i) low = i;
        else return;
    }
}

/* Heap sort into the order: no recursion, no library comparator with hidden state. */
static void sift(int32_t *ids, int root, int n, const float *logits) {
    for (;;) {
        int child = 2 * root + 1;
        if (child >= n) return;
        if (child + 1 < n && before(logits, ids[child], ids[child + 1])) child++;
        if (!before(logits, ids[root], ids[child])) return;
        int32_t swap = ids[root];
        ids[root] = ids[child];
        ids[child] = swap;
        root = child;
    }
}

static void sort_ids(int32_t *ids, int n, const float *logits) {
    for (int i = n / 2 - 1; i >= 0; i--) sift(ids, i, n, logits);
    for (int end = n - 1; end > 0; end--) {
        int32_t swap = ids[0];
        ids[0] = ids[end];
        ids[end] = swap;
        sift(ids, 0, end, logits);
    }
}

/* Drops ids too unlikely to matter: all that have less than (1 - top_p) / n together have less than
 * 1 - top_p, so top_p is reached before any of them. Half of that, for the rounding. */
static int drop_tail(int32_t *ids, int n, const float *logits, float largest, double floor) {
    if (floor < 1e-37) return n;
    float least = largest + gumbel_log((float)floor);
    int kept = 0;
    for (int i = 0; i < n; i++) {
        if (logits[ids[i]] >= least) ids[kept++] = ids[i];
    }
    return kept;
}

/* The shortest run of the sorted ids whose probability, among all n, reaches top_p. Ids are sorted in
 * growing stretches, since the run is usually short. */
static int keep_top_p(int32_t *ids, int n, const float *logits, float largest, float top_p) {
    double total = 0;
    for (int i = 0; i < n; i++) total += (double)gumbel_exp(logits[ids[i]] - largest);
    n = drop_tail(ids, n, logits, largest, 0.5 * (1.0 - (double)top_p) * total / n);
    double sum = 0;
    for (int done = 0, stretch = 64; done < n; stretch *= 4) {
        int left = n - done;
        int now = stretch < left ? stretch : left;
        select_first(ids + done, left, now, logits);
        sort_ids(ids + done, now, logits);
        for (int i = done; i < done + now; i++) {
            sum += (double)gumbel_exp(logits[ids[i]] - largest);
            if (sum >= (double)top_p * total) return i + 1;
        }
        done += now;
    }
    return n;
}

/* Fills ids with what passes min-p, top-k and top-p, over logits already divided by the temperature.
 * Returns how many. */
static int filter(int32_t *ids, const float *logits, float largest, int vocab,
                  const struct sample_params *params) {
    float floor = params->min_p > 0 ? largest + gumbel_log(params->min_p) : -INFINITY;
    int n = 0;
    for (int32_t v = 0; v < vocab; v++) {
        if (logits[v] >= floor && logits[v] > -INFINITY) ids[n++] = v;
    }
    if (params->top_k > 0 && params->top_k < n) {
        select_first(ids, n, params->top_k, logits);
        n = params->top_k;
        sort_ids(ids, n, logits); /* top-p adds probabilities in an order that is defined */
    }
    if (params->top_p < 1) n = keep_top_p(ids, n, logits, largest, params->top_p);
    return n;
}

/* --- the draw ---------------------------------------------------------------------------------- */

enum { BOUND_STEPS = 256 };

/* The most noise that a random word beginning with these 8 bits can mean. */
static void fill_bounds(float bounds[BOUND_STEPS]) {
    for (uint32_t i = 0; i < BOUND_STEPS; i++) {
        bounds[i] = gumbel_noise(i << 24 | 0x00ffffffu) + 1e-5f;
    }
}

struct draw {
    const float *logits;
    uint64_t seed;
    int64_t position;
    const float *bounds;
    int32_t token;
    float best;
};

static void consider(struct draw *draw, int32_t token, uint32_t word) {
    float logit = draw->logits[token];
    if (!(logit + draw->bounds[word >> 24] >= draw->best)) return; /* NaN and -inf leave here */
    float perturbed = logit + gumbel_noise(word);
    bool wins = perturbed > draw->best || (perturbed == draw->best && token < draw->token);
    if (!wins) return;
    draw->best = perturbed;
    draw->token = token;
}

static void consider_one(struct draw *draw, int32_t token) {
    uint32_t words[4];
    gumbel_words(words, draw->seed, draw->position, (uint32_t)token / 4);
    consider(draw, token, words[token % 4]);
}

static void consider_all(struct draw *draw, int vocab) {
    for (int32_t first = 0; first < vocab; first += 4) {
        int n = vocab - first < 4 ? vocab - first : 4;
        bool hopeful = false;
        for (int i = 0; i < n; i++) {
            hopeful |= draw->logits[first + i] + GUMBEL_MAX >= draw->best;
        }
        if (!hopeful) continue;
        uint32_t words[4];
        gumbel_words(words, draw->seed, draw->position, (uint32_t)first / 4);
        for (int i = 0; i < n; i++) consider(draw, first + i, words[i]);
    }
}

/* Relative to the largest: a tiny temperature then cannot overflow to infinity minus infinity. */
static void divide_by_temperature(float *logits, int vocab, float largest, float temperature) {
    for (int v = 0; v < vocab; v++) logits[v] = (logits[v] - largest) / temperature;
}

static bool filters(const struct sample_params *params) {
    return params->min_p > 0 || params->top_k > 0 || params->top_p < 1;
}

static int32_t draw_token(struct backend *backend, float *logits, int vocab,
                          const struct sample_params *params, int64_t position) {
    int32_t likeliest = argmax(backend, logits, vocab);
    if (params->temperature == 0 || !isfinite(logits[likeliest])) return likeliest;
    divide_by_temperature(logits, vocab, logits[likeliest], params->temperature);

    float bounds[BOUND_STEPS];
    fill_bounds(bounds);
    struct draw draw = {logits, params->seed, position, bounds, likeliest, -INFINITY};
    consider_one(&draw, likeliest);
    if (!filters(params)) {
        consider_all(&draw, vocab);
        return draw.token;
    }
    scratch_of(backend, vocab);
    int n = filter(backend->sample_order, logits, logits[likeliest], vocab, params);
    for (int i = 0; i < n; i++) consider_one(&draw, backend->sample_order[i]);
    return draw.token;
}

static void sample_one(struct backend *backend, struct sample_result *out, float *logits, int vocab,
                       const struct sample_draw *draw) {
    const struct sample_params *params = draw->params;
    CHECK(params->n_logprobs <= SAMPLE_MAX_LOGPROBS);
    bool wants_logprob = params->n_logprobs >= 0;
    float *raw = NULL;
    float total = 0;
    *out = (struct sample_result){.made = true};
    if (wants_logprob) {
        raw = scratch_of(backend, vocab);
        memcpy(raw, logits, (size_t)vocab * sizeof *raw);
        total = log_sum_exp(raw, vocab);
        int n_top = params->n_logprobs < vocab ? params->n_logprobs : vocab;
        take_top(out, raw, vocab, n_top, total);
    }
    apply_changes(backend, logits, vocab, params, draw->history, draw->n_prompt, draw->n_history);
    out->token = draw_token(backend, logits, vocab, params, draw->position);
    out->logprob = wants_logprob ? logprob_of(raw[out->token], total) : 0;
}

/* What a chain's end makes useless is not drawn. */
void cpu_sample_begin(struct backend *backend, float *logits, int stride, int vocab,
                      const struct sample_draw *draws, int n) {
    if (n > backend->drawn_capacity) {
        backend->drawn = xrealloc(backend->drawn, (size_t)n * sizeof *backend->drawn);
        backend->drawn_capacity = n;
    }
    backend->n_drawn = n;
    bool goes_on = false;
    for (int i = 0; i < n; i++) {
        struct sample_result *result = &backend->drawn[i];
        *result = (struct sample_result){.token = 0};
        if (draws[i].continues && !goes_on) continue;
        sample_one(backend, result, logits + (size_t)i * (size_t)stride, vocab, &draws[i]);
        goes_on = result->token == draws[i].candidate;
    }
    int32_t *fed = backend->fed[backend->n_batches++ % BACKEND_FED_BATCHES];
    for (int i = 0; i < n && i < BACKEND_MAX_FED; i++) fed[i] = backend->drawn[i].token;
}

enum status cpu_fed_tokens(struct backend *backend, int32_t *tokens, int n_batches,
                           struct error *err) {
    (void)err;
    CHECK(n_batches <= BACKEND_FED_BATCHES && n_batches <= backend->n_batches);
    for (int i = 0; i < n_batches; i++) {
        int64_t batch = (backend->n_batches - n_batches + i) % BACKEND_FED_BATCHES;
        memcpy(tokens + (size_t)i * BACKEND_MAX_FED, backend->fed[batch], sizeof backend->fed[batch]);
    }
    return STATUS_OK;
}

enum status cpu_sample_end(struct backend *backend, struct sample_result *results,
                           struct error *err) {
    (void)err;
    memcpy(results, backend->drawn, (size_t)backend->n_drawn * sizeof *results);
    return STATUS_OK;
}

enum status cpu_logprobs(struct backend *backend, struct sample_result *out, const float *logits,
                         int vocab, int n_top, int32_t token, struct error *err) {
    (void)backend;
    (void)err;
    float total = log_sum_exp(logits, vocab);
    *out = (struct sample_result){.made = true, .token = token};
    take_top(out, logits, vocab, n_top < vocab ? n_top : vocab, total);
    out->logprob = logprob_of(logits[token], total);
    return STATUS_OK;
}

enum status cpu_distribution(struct backend *backend, float *out, const float *given, int vocab,
                             const struct sample_draw *draw, struct error *err) {
    (void)err;
    const struct sample_params *params = draw->params;
    float *logits = scratch_of(backend, vocab);
    memcpy(logits, given, (size_t)vocab * sizeof *logits);
    apply_changes(backend, logits, vocab, params, draw->history, draw->n_prompt, draw->n_history);
    memset(out, 0, (size_t)vocab * sizeof *out);
    int32_t likeliest = argmax(backend, logits, vocab);
    if (params->temperature == 0 || !isfinite(logits[likeliest])) {
        out[likeliest] = 1;
        return STATUS_OK;
    }
    divide_by_temperature(logits, vocab, logits[likeliest], params->temperature);
    int32_t *ids = backend->sample_order;
    int n = vocab;
    if (filters(params)) n = filter(ids, logits, logits[likeliest], vocab, params);
    else for (int32_t v = 0; v < vocab; v++) ids[v] = v;
    double sum = 0;
    for (int i = 0; i < n; i++) {
        float logit = logits[ids[i]];
        out[ids[i]] = logit == logit ? gumbel_exp(logit) : 0;
        sum += (double)out[ids[i]];
    }
    for (int i = 0; i < n; i++) out[ids[i]] = (float)((double)out[ids[i]] / sum);
    return STATUS_OK;
}
