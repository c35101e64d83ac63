/* The host's part of sampling: parameters, biases, banned ids and histories go to the device in one copy
 * from pinned memory; results come back in one. */
#include "kernels/cuda/sampler.h"

#include <cuda_runtime.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/sample.h"

/* Batches on their way: one may be filled while another is being read. */
enum { SLOTS = 4, FIRST_WORDS = 16384 };

struct slot {
    char *host; /* pinned: rows, then words */
    cudaEvent_t sent;
    bool used;
};

struct cuda_sampler {
    cudaStream_t stream;
    int max_draws;
    size_t max_words;
    struct slot slots[SLOTS];
    unsigned n_batches;
    char *device; /* as a slot */
    struct sample_result *results, *host_results; /* [max_draws], device and pinned */
    int n_drawn;
    int32_t *counts;
    float *raw;
    size_t counts_floats, raw_floats;
    float *row; /* one row of logits, and a distribution behind it */
    size_t row_floats;
};

static enum status failed(cudaError_t error, const char *what, struct error *err) {
    return error_set(err, STATUS_INTERNAL, "%s failed: %s", what, cudaGetErrorString(error));
}

static enum status grow(struct cuda_sampler *s, void **memory, size_t *floats, size_t wanted,
                        const char *what, struct error *err) {
    if (wanted <= *floats) return STATUS_OK;
    cudaStreamSynchronize(s->stream);
    cudaFree(*memory);
    *memory = NULL;
    *floats = 0;
    if (cudaMalloc(memory, wanted * sizeof(float)) != cudaSuccess) {
        *memory = NULL;
        cudaGetLastError();
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no device memory for %zu bytes of %s",
                         wanted * sizeof(float), what);
    }
    *floats = wanted;
    return STATUS_OK;
}

static enum status grow_rows(struct cuda_sampler *s, size_t counts_floats, size_t raw_floats,
                             struct error *err) {
    TRY(grow(s, (void **)&s->counts, &s->counts_floats, counts_floats, "token counts", err));
    return grow(s, (void **)&s->raw, &s->raw_floats, raw_floats, "raw logits", err);
}

enum status cuda_sampler_reserve(struct cuda_sampler *s, int n_rows, int vocab, struct error *err) {
    size_t floats = (size_t)n_rows * (size_t)vocab;
    return grow_rows(s, floats, floats, err);
}

static size_t rows_bytes(const struct cuda_sampler *s) {
    return (size_t)s->max_draws * sizeof(struct sample_row);
}

/* --- staging ----------------------------------------------------------------------------------------- */

static void release_staging(struct cuda_sampler *s) {
    for (int i = 0; i < SLOTS; i++) {
        cudaFreeHost(s->slots[i].host);
        s->slots[i].host = NULL;
        s->slots[i].used = false;
    }
    cudaFree(s->device);
    s->device = NULL;
}

static enum status take_staging(struct cuda_sampler *s, size_t n_words, struct error *err) {
    size_t bytes = rows_bytes(s) + n_words * sizeof(int32_t);
    s->max_words = 0;
    for (int i = 0; i < SLOTS; i++) {
        if (cudaHostAlloc((void **)&s->slots[i].host, bytes, cudaHostAllocDefault) != cudaSuccess) {
            return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no pinned memory for %zu bytes", bytes);
        }
    }
    if (cudaMalloc((void **)&s->device, bytes) != cudaSuccess) {
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no device memory for %zu bytes", bytes);
    }
    s->max_words = n_words;
    return STATUS_OK;
}

static bool penalises(const struct sample_params *params) {
    return params->repetition_penalty != 1.0f || params->presence_penalty != 0 ||
           params->frequency_penalty != 0;
}

/* The rows of a chain read one history, each a token more of it than the row before: it is sent once, as
 * long as the longest of them wants it. 0: draw i has the one of the draw before it, or none. */
static size_t history_of(const struct sample_draw *draws, int n, int i) {
    if (!penalises(draws[i].params)) return 0;
    bool shares = i > 0 && draws[i].history == draws[i - 1].history && penalises(draws[i - 1].params);
    if (shares) return 0;
    int longest = draws[i].n_history;
    for (int j = i + 1; j < n && draws[j].history == draws[i].history; j++) {
        if (!penalises(draws[j].params)) break;
        if (draws[j].n_history > longest) longest = draws[j].n_history;
    }
    return (size_t)longest;
}

static size_t words_of(const struct sample_draw *draws, int n, int i) {
    const struct sample_params *params = draws[i].params;
    return 2 * (size_t)params->n_bias + (size_t)params->n_banned + history_of(draws, n, i);
}

/* The slot that rested longest, with room for n_words; what was sent from it has arrived. */
static enum status next_slot(struct cuda_sampler *s, struct slot **out, size_t n_words,
                             struct error *err) {
    if (n_words > s->max_words || s->device == NULL) {
        cudaStreamSynchronize(s->stream);
        release_staging(s);
        TRY(take_staging(s, 2 * n_words, err));
    }
    struct slot *slot = &s->slots[s->n_batches++ % SLOTS];
    if (slot->used) {
        cudaError_t error = cudaEventSynchronize(slot->sent);
        if (error != cudaSuccess) return failed(error, "sending draws", err);
    }
    *out = slot;
    return STATUS_OK;
}

/* How many rows need counts, and copies of their raw logits; where the last history was put. */
struct needs {
    int n_counts, n_raw;
    int32_t history_at;
};

static int32_t put_words(int32_t *words, int32_t *at, const void *from, size_t n) {
    int32_t begin = *at;
    if (n > 0) memcpy(words + begin, from, n * sizeof *words);
    *at += (int32_t)n;
    return begin;
}

static struct sample_row flatten(const struct sample_draw *draws, int n, int i, int32_t *words,
                                 int32_t *at, struct needs *needs) {
    const struct sample_draw *draw = &draws[i];
    const struct sample_params *p = draw->params;
    bool counts = penalises(p) && draw->n_history > 0;
    bool changes = counts || p->n_bias > 0 || p->n_banned > 0;
    struct sample_row row = {
        .temperature = p->temperature,
        .top_p = p->top_p,
        .min_p = p->min_p,
        .repetition_penalty = p->repetition_penalty,
        .presence_penalty = p->presence_penalty,
        .frequency_penalty = p->frequency_penalty,
        .top_k = p->top_k,
        .n_logprobs = p->n_logprobs,
        .seed = p->seed,
        .position = draw->position,
        .candidate = draw->candidate,
        .continues = draw->continues,
        .n_bias = p->n_bias,
        .n_banned = p->n_banned,
        .n_prompt = draw->n_prompt,
        .n_history = counts ? draw->n_history : 0,
        .counts_slot = counts ? needs->n_counts++ : -1,
        .raw_slot = changes && p->n_logprobs >= 0 ? needs->n_raw++ : -1,
    };
    row.bias_at = put_words(words, at, p->bias, 2 * (size_t)p->n_bias);
    row.banned_at = put_words(words, at, p->banned, (size_t)p->n_banned);
    size_t history = history_of(draws, n, i);
    if (history > 0) needs->history_at = put_words(words, at, draw->history, history);
    row.history_at = needs->history_at;
    return row;
}

/* Sends the draws and makes room for what they need. */
static enum status send(struct cuda_sampler *s, struct sample_batch *batch,
                        const struct sample_draw *draws, int n, int vocab, struct error *err) {
    _Static_assert(sizeof(struct sample_bias) == 2 * sizeof(int32_t), "a bias is two words");
    CHECK(n <= s->max_draws);
    size_t n_words = 0;
    for (int i = 0; i < n; i++) {
        CHECK(draws[i].params->n_logprobs <= SAMPLE_MAX_LOGPROBS);
        n_words += words_of(draws, n, i);
    }
    struct slot *slot = NULL;
    struct needs needs = {0, 0, 0};
    TRY(next_slot(s, &slot, n_words, err));
    struct sample_row *rows = (struct sample_row *)slot->host;
    int32_t *words = (int32_t *)(slot->host + rows_bytes(s)), at = 0;
    for (int i = 0; i < n; i++) rows[i] = flatten(draws, n, i, words, &at, &needs);
    TRY(grow_rows(s, (size_t)needs.n_counts * (size_t)vocab, (size_t)needs.n_raw * (size_t)vocab, err));
    size_t bytes = rows_bytes(s) + (size_t)at * sizeof *words;
    cudaError_t error =
        cudaMemcpyAsync(s->device, slot->host, bytes, cudaMemcpyHostToDevice, s->stream);
    if (error != cudaSuccess) return failed(error, "sending draws", err);
    cudaEventRecord(slot->sent, s->stream);
    slot->used = true;
    batch->vocab = vocab;
    batch->n = n;
    batch->rows = (const struct sample_row *)s->device;
    batch->words = (const int32_t *)(s->device + rows_bytes(s));
    batch->counts = s->counts;
    batch->raw = s->raw;
    batch->results = s->results;
    return STATUS_OK;
}

/* --- the sampler -------------------------------------------------------------------------------------- */

enum status cuda_sampler_create(struct cuda_sampler **out, void *stream, int max_draws,
                                struct error *err) {
    enum status status;
    struct cuda_sampler *s = xcalloc(1, sizeof *s);
    s->stream = stream;
    s->max_draws = max_draws;
    size_t bytes = (size_t)max_draws * sizeof *s->results;
    for (int i = 0; i < SLOTS; i++) {
        cudaEventCreateWithFlags(&s->slots[i].sent, cudaEventDisableTiming);
    }
    TRY_OR_FAIL(take_staging(s, FIRST_WORDS, err));
    if (cudaMalloc((void **)&s->results, bytes) != cudaSuccess ||
        cudaHostAlloc((void **)&s->host_results, bytes, cudaHostAllocDefault) != cudaSuccess) {
        status = error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for %d drawn tokens", max_draws);
        goto fail;
    }
    *out = s;
    return STATUS_OK;

fail:
    cuda_sampler_destroy(s);
    return status;
}

void cuda_sampler_destroy(struct cuda_sampler *s) {
    if (s == NULL) return;
    cudaStreamSynchronize(s->stream);
    release_staging(s);
    for (int i = 0; i < SLOTS; i++) {
        if (s->slots[i].sent != NULL) cudaEventDestroy(s->slots[i].sent);
    }
    void *memory[] = {s->results, s->counts, s->raw, s->row};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) cudaFree(memory[i]);
    cudaFreeHost(s->host_results);
    free(s);
}

enum status cuda_sampler_enqueue(struct cuda_sampler *s, float *logits, size_t stride, int vocab,
                                 const struct sample_draw *draws, int n, int32_t *tokens_out,
                                 struct error *err) {
    struct sample_batch batch = {.logits = logits, .stride = stride, .tokens = tokens_out};
    s->n_drawn = n;
    if (n == 0) return STATUS_OK;
    TRY(send(s, &batch, draws, n, vocab, err));
    launch_sample(s->stream, &batch);
    return STATUS_OK;
}

/* The first n results, waited for. */
static enum status fetch(struct cuda_sampler *s, struct sample_result *out, int n,
                         struct error *err) {
    cudaError_t error = cudaMemcpyAsync(s->host_results, s->results, (size_t)n * sizeof *out,
                                        cudaMemcpyDeviceToHost, s->stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(s->stream);
    if (error != cudaSuccess) return failed(error, "drawing tokens", err);
    memcpy(out, s->host_results, (size_t)n * sizeof *out);
    return STATUS_OK;
}

enum status cuda_sampler_collect(struct cuda_sampler *s, struct sample_result *results,
                                 struct error *err) {
    return s->n_drawn == 0 ? STATUS_OK : fetch(s, results, s->n_drawn, err);
}

/* A copy of the row that may be changed, with room for another behind it. */
static enum status copy_row(struct cuda_sampler *s, const float *logits, int vocab,
                            struct error *err) {
    size_t bytes = (size_t)vocab * sizeof *logits;
    TRY(grow(s, (void **)&s->row, &s->row_floats, 2 * (size_t)vocab, "a row of logits", err));
    cudaError_t error =
        cudaMemcpyAsync(s->row, logits, bytes, cudaMemcpyDeviceToDevice, s->stream);
    return error == cudaSuccess ? STATUS_OK : failed(error, "copying logits", err);
}

enum status cuda_sampler_distribution(struct cuda_sampler *s, float *out, const float *logits,
                                      int vocab, const struct sample_draw *draw, struct error *err) {
    TRY(copy_row(s, logits, vocab, err));
    struct sample_batch batch = {.logits = s->row, .stride = (size_t)vocab};
    TRY(send(s, &batch, draw, 1, vocab, err));
    launch_distribution(s->stream, &batch, s->row + vocab);
    cudaError_t error = cudaMemcpyAsync(out, s->row + vocab, (size_t)vocab * sizeof *out,
                                        cudaMemcpyDeviceToHost, s->stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(s->stream);
    return error == cudaSuccess ? STATUS_OK : failed(error, "a distribution", err);
}

enum status cuda_sampler_logprobs(struct cuda_sampler *s, struct sample_result *out,
                                  const float *logits, int vocab, int n_top, int32_t token,
                                  struct error *err) {
    TRY(copy_row(s, logits, vocab, err));
    struct sample_batch batch = {
        .logits = s->row, .stride = (size_t)vocab, .vocab = vocab, .n = 1, .results = s->results};
    launch_logprobs(s->stream, &batch, n_top, token);
    return fetch(s, out, 1, err);
}
