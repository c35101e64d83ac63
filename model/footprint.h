/* How many bytes a shard needs, before anything is allocated. Pure. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

#include "model/config.h"
#include "model/shard.h"

struct footprint {
    size_t weights_bytes;      /* this rank's packed weights in the given format (bf16 or int8), f32
                                  norms and biases; the embedding is read in place from the file */
    size_t kv_bytes_per_block; /* all layers, K and V, one block of 16 positions, bf16 */
    size_t scratch_bytes;      /* f32 activations of max_rows rows, logits of max_logit_rows */
};

struct footprint footprint_of(const struct model_config *config, const struct shard *shard,
                              enum dtype weights, int max_rows, int max_logit_rows);

/* The same for a draft's shard. layer_owner: every layer's attention lives whole on its owner
 * (shard_layer_owner); max_layer_width: layers whose attention outputs are kept at once. */
struct footprint footprint_of_draft(const struct model_config *config, const struct shard *shard,
                                    enum dtype weights, int max_rows, int max_logit_rows,
                                    bool layer_owner, int max_layer_width);
