/* What a client asked for, checked and resolved: every parameter has its value. Pure.
 *
 * Place: the preparing thread, before tokenizing. Anything out of range is INVALID_ARGUMENT naming
 * field, value seen and range; nothing is ignored. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/error.h"
#include "tandem/v1/generation.pb-c.h"

struct params {
    float temperature, top_p, min_p;
    int32_t top_k;               /* 0: off */
    uint32_t max_tokens;         /* 0: what the context still holds */
    uint32_t min_tokens;
    bool ignore_eos;
    bool has_seed;
    uint64_t seed;
    float repetition_penalty, presence_penalty, frequency_penalty;
    int32_t logprobs;            /* -1: none */
    bool skip_special, include_stop;
    const char *speculation;     /* "" (the replica's policy), or a mode by name: a constant */
    uint32_t num_speculative_tokens; /* at most so many drafted in a round; 0: the policy's window */
    /* Borrowed from the request, which must outlive this: */
    const ProtobufCBinaryData *stops;
    size_t n_stops;
    const int32_t *stop_token_ids;
    size_t n_stop_token_ids;
    Tandem__V1__LogitBias *const *biases;
    size_t n_biases;
};

/* Checks all of the request but its prompt's content. `vocab`: token ids are 0 .. vocab - 1;
 * `modes`: bit per enum spec_mode that can be run. */
enum status params_resolve(struct params *out, const Tandem__V1__GenerateRequest *request,
                           int32_t vocab, uint32_t modes, struct error *err);

/* Checks a prompt given as ids. */
enum status params_check_tokens(const int32_t *ids, size_t n_ids, int32_t vocab, struct error *err);

/* After tokenizing: the prompt must leave room for a token in a context of `context` tokens;
 * max_tokens, a ceiling, is brought down to what is left. */
enum status params_fit_context(struct params *params, size_t n_prompt, uint32_t context,
                               struct error *err);
