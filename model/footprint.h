/* How many bytes a shard needs, before anything is allocated. Pure. */
#pragma once
#include <stddef.h>

#include "model/config.h"
#include "model/shard.h"

struct footprint {
    size_t weights_bytes;      /* packed weights of this rank in the given format */
    size_t kv_bytes_per_block; /* all layers, K and V, one block of 16 positions, bf16 */
    size_t scratch_bytes;      /* activations and logits for max_rows rows */
};

struct footprint footprint_of(const struct model_config *config, const struct shard *shard,
                              enum dtype weights, int max_rows);
