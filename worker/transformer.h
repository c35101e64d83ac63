/* One rank's part of a decoder-only transformer: its packed weights, its KV memory, and the forward
 * pass. Llama, Mistral, Qwen2 and Qwen3 are one text with options (biases, QK norm, window).
 *
 * Collective over the group: every rank calls transformer_forward with the same batch. Owned and
 * called by the rank's compute thread. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/error.h"
#include "kernels/backend.h"
#include "model/checkpoint.h"
#include "model/shard.h"
#include "worker/comm/comm.h"

struct transformer;

struct transformer_options {
    const struct checkpoint *checkpoint; /* outlives it: embeddings are read in place */
    struct backend *backend;
    struct comm *group;  /* rank and size are the shard and the tensor-parallel degree */
    enum dtype weights;  /* DTYPE_BF16 or DTYPE_I8 */
    int n_blocks;        /* KV blocks of 16 positions */
    int max_rows;        /* rows of one forward pass */
    int max_logit_rows;  /* of which logits can be asked */
    int max_context;     /* positions the rope table covers */
    bool layer_owner;    /* attention of a decoder layer lives whole on one rank, its owner
                            (shard_layer_owner); false: every layer is tensor-parallel */
    int max_layer_width; /* of any pass; 0 or 1: exact passes only */
    /* Called while weights load; bytes are this rank's packed weights. May be NULL. */
    void (*progress)(void *user, size_t bytes_done, size_t bytes_total);
    void *progress_user;
};

/* RESOURCE_EXHAUSTED when memory runs out. Not collective. On failure nothing stays allocated. */
enum status transformer_create(struct transformer **out, const struct transformer_options *options,
                               struct error *err);
void transformer_destroy(struct transformer *transformer);

/* What one pass computes: rows of several sequences, grouped in segments. */
struct transformer_batch {
    const int32_t *tokens; /* [n_rows] */
    int n_rows;
    const struct backend_segment *segments;
    int n_segments;
    const int32_t *logit_rows; /* rows whose logits are wanted, increasing */
    int n_logit_rows;
    int layer_width; /* layers whose attention runs at once on one stale input; 0 or 1: exact */
    bool runs_on;    /* a device may still be computing at return: the next pass is fed by it */
};

/* Writes the KV of all rows and computes the wanted logits. On rank 0 *logits is
 * [n_logit_rows, vocab] f32, raw, in memory of the backend, owned by the transformer until the next
 * call; elsewhere NULL.
 * UNAVAILABLE or ABORTED when the group is lost: then the transformer is of no more use. */
enum status transformer_forward(struct transformer *transformer,
                                const struct transformer_batch *batch, float **logits,
                                struct error *err);

/* This rank's KV of one position in one layer, see backend_kv_read; k and v have room for all
 * heads. False: the layer's KV is on other ranks. */
bool transformer_kv_read(const struct transformer *transformer, int layer, const int32_t *blocks,
                         int position, float *k, float *v);

/* Where the time of all passes so far went. */
struct transformer_times {
    int64_t kernels_ns; /* in backend ops, and in collectives that are recorded with them */
    int64_t comm_ns;    /* in other collectives, waiting for slower ranks included */
};
struct transformer_times transformer_times(const struct transformer *transformer);

/* Bytes allocated by this rank; KV as backend_kv_block_bytes counts it. */
struct transformer_memory {
    size_t weights_bytes, kv_bytes, scratch_bytes;
};
struct transformer_memory transformer_memory(const struct transformer *transformer);
