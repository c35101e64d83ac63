/* Feeding tokens to a model by hand, for tests: sequences hold fixed stretches of KV blocks. */
#pragma once
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "worker/local_group.h"

/* A group with room for 64 rows of logits, or for `max_rows`. */
static inline enum status model_run_open(struct local_group **out, const char *dir, int degree,
                                         enum backend_isa isa, enum dtype weights, int n_threads,
                                         int n_blocks, int max_rows, struct error *err) {
    struct local_group_options options = {
        .model_dir = dir,
        .degree = degree,
        .isa = isa,
        .n_threads = n_threads,
        .weights = weights,
        .n_blocks = n_blocks,
        .max_rows = max_rows,
        .max_logit_rows = max_rows,
        .max_sequences = max_rows,
    };
    return local_group_create(out, &options, err);
}

/* Feeds tokens[0..n_tokens) at positions first.. of the sequence in blocks first_block,
 * first_block + 1, ... in chunks of at most `chunk` rows. Copies the logits of every row to
 * out [n_tokens, vocab] where not NULL. */
static inline enum status model_run_feed(struct local_group *group, float *out,
                                         const int32_t *tokens, int n_tokens, int first,
                                         int first_block, int chunk, struct error *err) {
    int n_blocks = (first + n_tokens + BACKEND_KV_BLOCK - 1) / BACKEND_KV_BLOCK;
    int32_t *blocks = xcalloc((size_t)n_blocks, sizeof *blocks);
    int32_t *rows = xcalloc((size_t)chunk, sizeof *rows);
    for (int i = 0; i < n_blocks; i++) blocks[i] = first_block + i;
    for (int i = 0; i < chunk; i++) rows[i] = i;
    enum status status = STATUS_OK;
    size_t vocab = (size_t)local_group_config(group)->vocab;
    for (int done = 0; done < n_tokens && status == STATUS_OK; done += chunk) {
        int n = n_tokens - done < chunk ? n_tokens - done : chunk;
        struct backend_segment segment = {0, n, first + done, blocks};
        struct transformer_batch batch = {tokens + done, n, &segment, 1, rows, n, 0, false};
        float *logits;
        status = engine_forward(local_group_engine(group), ENGINE_TARGET, &batch, &logits, err);
        if (status == STATUS_OK && out != NULL) {
            memcpy(out + (size_t)done * vocab, logits, (size_t)n * vocab * sizeof *out);
        }
    }
    free(blocks);
    free(rows);
    return status;
}
