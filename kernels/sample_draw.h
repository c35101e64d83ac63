/* What a draw from a row of logits is told and answers: the data of backend_sample_begin and its kin
 * (backend.h), in plain C for kernels as well. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

enum { SAMPLE_MAX_LOGPROBS = 20 };

struct sample_bias {
    int32_t token;
    float bias;
};

/* The parameters of one request, checked and resolved. */
struct sample_params {
    float temperature;        /* 0: greedy */
    float top_p;              /* (0, 1]; 1: off */
    int top_k;                /* 0: off */
    float min_p;              /* [0, 1]; 0: off */
    float repetition_penalty; /* > 0; 1: off; over prompt and output */
    float presence_penalty;   /* over output */
    float frequency_penalty;  /* over output */
    uint64_t seed;
    const struct sample_bias *bias;
    int n_bias;
    const int32_t *banned;    /* ids that may not be drawn here (EOS before min_tokens) */
    int n_banned;
    int n_logprobs;           /* -1: none; 0: of the drawn token; n: also the n most likely */
};

struct sample_result {
    int32_t token;
    bool made;                /* false: the chain ended before it; nothing else is set */
    float logprob;            /* log softmax of the raw logits at `token` */
    int n_top;
    int32_t top_token[SAMPLE_MAX_LOGPROBS];
    float top_logprob[SAMPLE_MAX_LOGPROBS];
};

/* One draw. history: prompt, then output, then candidates before it; the first n_prompt are the prompt.
 * Only penalties read it. position: of the drawn token in its sequence, from 0. */
struct sample_draw {
    const struct sample_params *params;
    const int32_t *history;
    int n_prompt, n_history;
    int64_t position;
    int32_t candidate; /* what stands at the position already; -1: nothing */
    bool continues;    /* made only if the draw before it was made and hit its candidate */
};
