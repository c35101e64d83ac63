/* Sampling as plain loops: every step in the order of backend.h, the draw as the argmax over all
 * ids that remain, filters by a full sort. */
#pragma once
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#include "common/gumbel.h"
#include "kernels/backend.h"

static inline void reference_changes(float *logits, int vocab, const struct sample_params *params,
                                     const int32_t *history, int n_prompt, int n_history) {
    for (int i = 0; i < params->n_bias; i++) logits[params->bias[i].token] += params->bias[i].bias;
    for (int v = 0; v < vocab; v++) {
        int seen = 0, count = 0;
        for (int i = 0; i < n_history; i++) {
            seen += history[i] == v;
            count += i >= n_prompt && history[i] == v;
        }
        if (seen && params->repetition_penalty != 1) {
            logits[v] = logits[v] > 0 ? logits[v] / params->repetition_penalty
                                      : logits[v] * params->repetition_penalty;
        }
        if (count) logits[v] -= params->presence_penalty + params->frequency_penalty * (float)count;
    }
    for (int i = 0; i < params->n_banned; i++) logits[params->banned[i]] = -INFINITY;
}

/* Ids by logit, largest first, lower id first among equals: insertion sort. */
static inline void reference_sort(int32_t *ids, const float *logits, int vocab) {
    for (int v = 0; v < vocab; v++) {
        int at = v;
        for (; at > 0 && logits[v] > logits[ids[at - 1]]; at--) ids[at] = ids[at - 1];
        ids[at] = v;
    }
}

/* allowed[v]: whether v passes min-p, then top-k, then top-p. logits: after the temperature. */
static inline void reference_filter(bool *allowed, const float *logits, int vocab,
                                    const struct sample_params *params) {
    int32_t *ids = calloc((size_t)vocab, sizeof *ids);
    if (ids == NULL) abort();
    reference_sort(ids, logits, vocab);
    double largest = logits[ids[0]];
    int n = 0; /* a run of the sorted ids remains throughout */
    while (n < vocab && logits[ids[n]] > -INFINITY &&
           exp(logits[ids[n]] - largest) >= (double)params->min_p) {
        n++;
    }
    if (params->top_k > 0 && params->top_k < n) n = params->top_k;
    double total = 0, sum = 0;
    for (int i = 0; i < n; i++) total += exp(logits[ids[i]] - largest);
    for (int v = 0; v < vocab; v++) allowed[v] = false;
    for (int i = 0; i < n; i++) {
        if (params->top_p < 1 && i > 0 && sum >= (double)params->top_p * total) break;
        allowed[ids[i]] = true;
        sum += exp(logits[ids[i]] - largest);
    }
    free(ids);
}

static inline int32_t reference_argmax(const float *logits, int vocab) {
    int32_t best = 0;
    for (int v = 1; v < vocab; v++) {
        if (logits[v] > logits[best]) best = v;
    }
    return best;
}

/* The drawn token. Destroys logits; fills allowed[vocab] where the temperature is not 0. */
static inline int32_t reference_sample(bool *allowed, float *logits, int vocab,
                                       const struct sample_params *params, const int32_t *history,
                                       int n_prompt, int n_history, int64_t position) {
    reference_changes(logits, vocab, params, history, n_prompt, n_history);
    int32_t likeliest = reference_argmax(logits, vocab);
    if (params->temperature == 0) return likeliest;
    float largest = logits[likeliest];
    for (int v = 0; v < vocab; v++) logits[v] = (logits[v] - largest) / params->temperature;
    reference_filter(allowed, logits, vocab, params);
    int32_t best = -1;
    float best_value = 0;
    for (int v = 0; v < vocab; v++) {
        if (!allowed[v]) continue;
        uint32_t words[4];
        gumbel_words(words, params->seed, position, (uint32_t)v / 4);
        float value = logits[v] + gumbel_noise(words[v % 4]);
        if (best >= 0 && value <= best_value) continue;
        best = v;
        best_value = value;
    }
    return best;
}
