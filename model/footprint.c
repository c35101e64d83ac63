#include "model/footprint.h"

#include <stdint.h>

/* As the kernels pack weights and keep the cache (kernels/backend.h). */
enum { PANEL_ROWS = 16, PANEL_COLUMNS = 64, KV_BLOCK = 16, KV_DIM_UNIT = 16 };

static size_t round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

/* A packed weight: rows padded to whole panels, every leaf's columns padded by itself, and for int8
 * one scale (f32) and one sum of weights (int32, for unsigned activations) per row and leaf. */
static size_t packed_bytes(int n, const int *leaf_begin, int n_leaves, enum dtype weights) {
    size_t columns = 0, rows = round_up((size_t)n, PANEL_ROWS);
    for (int i = 0; i < n_leaves; i++) {
        columns += round_up((size_t)(leaf_begin[i + 1] - leaf_begin[i]), PANEL_COLUMNS);
    }
    size_t scales = weights == DTYPE_I8 ? rows * (size_t)n_leaves * 8 : 0;
    return rows * columns * dtype_bytes(weights) + scales;
}

static size_t column_bytes(int n, int k, enum dtype weights) {
    const int leaf[2] = {0, k};
    return n > 0 ? packed_bytes(n, leaf, 1, weights) : 0;
}

static size_t layer_vector_floats(const struct model_config *config, int qkv_width) {
    size_t floats = 2 * (size_t)config->hidden;
    if (config->qkv_bias) floats += (size_t)qkv_width;
    if (config->o_bias) floats += (size_t)config->hidden;
    if (config->qk_norm) floats += 2 * (size_t)config->head_dim;
    return floats;
}

static size_t weights_bytes(const struct model_config *config, const struct shard *shard,
                            int qkv_width, enum dtype weights) {
    int hidden = config->hidden, inter = shard->inter_end - shard->inter_begin;
    size_t layer = column_bytes(qkv_width, hidden, weights);
    if (qkv_width > 0) layer += packed_bytes(hidden, shard->head_leaf, shard->n_leaves, weights);
    layer += column_bytes(2 * inter, hidden, weights);
    if (inter > 0) layer += packed_bytes(hidden, shard->inter_leaf, shard->n_leaves, weights);
    layer += layer_vector_floats(config, qkv_width) * sizeof(float);
    size_t head = column_bytes(shard->vocab_end - shard->vocab_begin, hidden, weights);
    return layer * (size_t)config->n_layers + head + (size_t)hidden * sizeof(float);
}

/* One term per buffer of a forward pass. */
static size_t row_floats(const struct model_config *config, const struct shard *shard,
                         int qkv_width) {
    size_t hidden = (size_t)config->hidden;
    size_t inter = (size_t)(shard->inter_end - shard->inter_begin);
    size_t floats = 2 * hidden;      /* residual, normed */
    floats += (size_t)qkv_width;
    floats += (size_t)(shard->head_end - shard->head_begin) * (size_t)config->head_dim;
    floats += 3 * inter;             /* gate and up, their product */
    floats += hidden;                /* this rank's subtree root */
    if (shard->degree > 1) floats += (size_t)shard->degree * hidden; /* everybody's roots */
    return floats;
}

static size_t logit_row_floats(const struct model_config *config, const struct shard *shard) {
    size_t floats = (size_t)(shard->vocab_end - shard->vocab_begin);
    bool gathers = shard->degree > 1 && shard->rank == 0;
    return gathers ? floats + 2 * (size_t)config->vocab : floats; /* gathered, interleaved */
}

struct footprint footprint_of(const struct model_config *config, const struct shard *shard,
                              enum dtype weights, int max_rows, int max_logit_rows) {
    int heads = shard->head_end - shard->head_begin;
    int kv_heads = shard->kv_head_end - shard->kv_head_begin;
    int qkv_width = (heads + 2 * kv_heads) * config->head_dim;
    size_t padded_dim = round_up((size_t)config->head_dim, KV_DIM_UNIT);
    size_t position_bytes = 2 * (size_t)kv_heads * padded_dim * sizeof(uint16_t);
    size_t scratch = (size_t)max_rows * row_floats(config, shard, qkv_width) +
                     (size_t)max_logit_rows * logit_row_floats(config, shard);
    return (struct footprint){
        .weights_bytes = weights_bytes(config, shard, qkv_width, weights),
        .kv_bytes_per_block = KV_BLOCK * position_bytes * (size_t)config->n_layers,
        .scratch_bytes = scratch * sizeof(float),
    };
}
