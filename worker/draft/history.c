#include "worker/draft/history.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct draft_history *draft_history_create(int n_slots, int vocab) {
    struct draft_history *history = xcalloc(1, sizeof *history);
    history->n_slots = n_slots;
    history->vocab = vocab;
    history->sequences = xcalloc((size_t)n_slots, sizeof *history->sequences);
    return history;
}

static void clear(struct draft_sequence *sequence) {
    free(sequence->tokens);
    free(sequence->bias);
    free(sequence->stop_ids);
    *sequence = (struct draft_sequence){0};
}

void draft_history_destroy(struct draft_history *history) {
    if (history == NULL) return;
    for (int i = 0; i < history->n_slots; i++) clear(&history->sequences[i]);
    free(history->sequences);
    free(history);
}

uint64_t draft_history_hash(uint64_t hash, int32_t token) {
    /* Steele, Lea and Flood's mixer (SplitMix64, OOPSLA 2014) over the running value. */
    uint64_t x = hash + 0x9e3779b97f4a7c15u + (uint32_t)token;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static void *copy_of(const void *data, size_t bytes) {
    void *copy = xmalloc(bytes > 0 ? bytes : 1);
    if (bytes > 0) memcpy(copy, data, bytes);
    return copy;
}

static void reserve(struct draft_sequence *sequence, int n_tokens) {
    if (n_tokens <= sequence->token_capacity) return;
    sequence->token_capacity = 2 * n_tokens + 64;
    sequence->tokens = xrealloc(sequence->tokens,
                                (size_t)sequence->token_capacity * sizeof *sequence->tokens);
}

static void commit(const struct draft_history *history, struct draft_sequence *sequence,
                   int32_t token) {
    reserve(sequence, sequence->n_committed + 1);
    sequence->tokens[sequence->n_committed++] = token < history->vocab ? token : 0;
    sequence->hash = draft_history_hash(sequence->hash, token);
}

struct draft_sequence *draft_history_begin(struct draft_history *history,
                                           const struct draft_begin *begin) {
    CHECK(begin->slot >= 0 && begin->slot < history->n_slots);
    struct draft_sequence *sequence = &history->sequences[begin->slot];
    CHECK(!sequence->live);
    sequence->live = true;
    sequence->n_prompt = begin->n_prompt;
    sequence->sampling = begin->sampling;
    sequence->sampling.n_logprobs = -1;
    sequence->sampling.n_banned = 0;
    sequence->bias = copy_of(begin->sampling.bias,
                             (size_t)begin->sampling.n_bias * sizeof *sequence->bias);
    sequence->sampling.bias = sequence->bias;
    sequence->stop_ids = copy_of(begin->stop_ids,
                                 (size_t)begin->n_stop_ids * sizeof *sequence->stop_ids);
    sequence->n_stop_ids = begin->n_stop_ids;
    sequence->min_tokens = begin->min_tokens;
    reserve(sequence, begin->n_tokens);
    for (int i = 0; i < begin->n_tokens; i++) commit(history, sequence, begin->tokens[i]);
    return sequence;
}

void draft_history_end(struct draft_history *history, int slot) {
    CHECK(slot >= 0 && slot < history->n_slots && history->sequences[slot].live);
    clear(&history->sequences[slot]);
}

/* The last tokens of a sequence, for the words of an error. */
static void write_tail(char *out, size_t size, const struct draft_sequence *sequence) {
    int begin = sequence->n_committed > 16 ? sequence->n_committed - 16 : 0;
    size_t used = 0;
    out[0] = '\0';
    for (int i = begin; i < sequence->n_committed && used + 16 < size; i++) {
        used += (size_t)snprintf(out + used, size - used, " %" PRId32, sequence->tokens[i]);
    }
}

static enum status out_of_step(const struct draft_sequence *sequence, const struct draft_job *job,
                               struct error *err) {
    char tail[256];
    write_tail(tail, sizeof tail, sequence);
    return error_set(err, STATUS_ABORTED,
                     "draft and target are out of step in slot %d: the draft has %d committed tokens, "
                     "hash %016" PRIx64 ", and %d candidates; the target %d, hash %016" PRIx64
                     ", and %d; the draft's last tokens:%s",
                     job->slot, sequence->n_committed, sequence->hash, sequence->n_candidates,
                     job->n_committed, job->hash, job->plan.tail, tail);
}

enum status draft_history_apply(struct draft_history *history, const struct draft_job *job,
                                bool *dropped, struct error *err) {
    CHECK(job->slot >= 0 && job->slot < history->n_slots);
    struct draft_sequence *sequence = &history->sequences[job->slot];
    CHECK(sequence->live);
    if (job->accepted > sequence->n_candidates) return out_of_step(sequence, job, err);
    for (int i = 0; i < job->accepted; i++) {
        sequence->hash = draft_history_hash(sequence->hash, sequence->tokens[sequence->n_committed]);
        sequence->n_committed++;
        sequence->n_candidates--;
    }
    *dropped = sequence->n_candidates > 0 && (job->n_own > 0 || job->abandon);
    if (*dropped) sequence->n_candidates = 0;
    for (int i = 0; i < job->n_own; i++) commit(history, sequence, job->own[i]);
    bool agrees = sequence->n_committed == job->n_committed && sequence->hash == job->hash &&
                  sequence->n_candidates == job->plan.tail;
    return agrees ? STATUS_OK : out_of_step(sequence, job, err);
}

void draft_history_append(struct draft_sequence *sequence, int32_t token) {
    int n = draft_sequence_length(sequence);
    reserve(sequence, n + 1);
    sequence->tokens[n] = token;
    sequence->n_candidates++;
}

struct sample_params draft_sequence_params(const struct draft_sequence *sequence) {
    struct sample_params params = sequence->sampling;
    if (draft_sequence_length(sequence) - sequence->n_prompt < sequence->min_tokens) {
        params.banned = sequence->stop_ids;
        params.n_banned = sequence->n_stop_ids;
    }
    return params;
}

bool draft_sequence_ends_with(const struct draft_sequence *sequence, int32_t token) {
    for (int i = 0; i < sequence->n_stop_ids; i++) {
        if (sequence->stop_ids[i] == token) return true;
    }
    return false;
}
