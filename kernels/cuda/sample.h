/* What sampler.c tells the kernels of sample.cu. All pointers are the device's. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/sample_draw.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A draw, flat. *_at: where its part begins in `words`. */
struct sample_row {
    float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    int32_t top_k, n_logprobs;
    uint64_t seed;
    int64_t position;
    int32_t candidate;
    int32_t continues;
    int32_t bias_at, n_bias; /* pairs of token and float bits */
    int32_t banned_at, n_banned;
    int32_t history_at, n_prompt, n_history; /* 0: no penalties */
    int32_t counts_slot; /* of the counts of its history; -1: no penalties */
    int32_t raw_slot;    /* where its raw logits are kept; -1: they stay as they are */
};

struct sample_batch {
    float *logits;
    size_t stride;
    int vocab, n;
    const struct sample_row *rows;
    const int32_t *words;
    int32_t *counts; /* [slots][vocab] */
    float *raw;      /* [slots][vocab] */
    struct sample_result *results;
    int32_t *tokens; /* [n], NULL: not wanted */
};

/* Draws and verdict walk. */
void launch_sample(void *stream, const struct sample_batch *batch);
/* The distribution of row 0 to out[vocab]. */
void launch_distribution(void *stream, const struct sample_batch *batch, float *out);
/* Log-probabilities of row 0: of `token`, and of the n_top likeliest. */
void launch_logprobs(void *stream, const struct sample_batch *batch, int n_top, int32_t token);

#ifdef __cplusplus
}
#endif
