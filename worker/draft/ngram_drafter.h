/* Prompt look-up (Saxena, "Prompt Lookup Decoding", 2023; vLLM's "ngram"): proposes what followed
 * the latest earlier occurrence of the sequence's last few tokens. No model, no memory on the
 * device, a few microseconds a sequence. */
#pragma once
#include "worker/draft/drafter.h"

/* The longest and the shortest suffix that is looked for. */
enum { NGRAM_MAX = 4, NGRAM_MIN = 2 };

struct drafter *ngram_drafter_create(int max_sequences);

/* Where the tokens that follow the latest earlier occurrence of the longest suffix begin; -1:
 * there is no such occurrence. Pure. */
int ngram_find(const int32_t *tokens, int n_tokens);
