#include "model/footprint.h"

#include <stdint.h>

/* As the kernels pack weights and keep the cache (kernels/backend.h). */
enum { PANEL_ROWS = 16, PANEL_COLUMNS = 64, KV_BLOCK = 16, KV_DIM_UNIT = 32 };

static size_t round_up(size_t value, size_t unit) {
    return (value + unit - 1) / unit * unit;
}

/* A packed weight: rows padded to whole panels, every leaf's columns padded by itself, and for int8
 * one scale (f32) and one sum of weights (int32, for unsigned activations) per row and leaf; for fp8
 * the scale. */
static size_t packed_bytes(int n, const int *leaf_begin, int n_leaves, enum dtype weights) {
    size_t columns = 0, rows = round_up((size_t)n, PANEL_ROWS);
    for (int i = 0; i < n_leaves; i++) {
        columns += round_up((size_t)(leaf_begin[i + 1] - leaf_begin[i]), PANEL_COLUMNS);
    }
    size_t scales = weights == DTYPE_I8   ? rows * (size_t)n_leaves * 8
                    : weights == DTYPE_F8 ? rows * (size_t)n_leaves * 4
                                          : 0;
    return rows * columns * dtype_bytes(weights) + scales;
}

static size_t column_bytes(int n, int k, enum dtype weights) {
    const int leaf[2] = {0, k};
    return n > 0 ? packed_bytes(n, leaf, 1, weights) : 0;
}

/* Vectors of every layer, wherever its attention is. */
static size_t layer_vector_floats(const struct model_config *config) {
    size_t floats = 2 * (size_t)config->hidden;
    return config->o_bias ? floats + (size_t)config->hidden : floats;
}

/* Vectors where the layer's attention is. */
static size_t attention_vector_floats(const struct model_config *config, int qkv_width) {
    size_t floats = config->qkv_bias ? (size_t)qkv_width : 0;
    return config->qk_norm ? floats + 2 * (size_t)config->head_dim : floats;
}

/* What of a model's attention a rank holds. */
struct attention_part {
    int heads, kv_heads, qkv_width;
    const int *head_leaf;
    int n_leaves;
    int n_layers; /* that it holds */
};

static size_t weights_bytes(const struct model_config *config, const struct shard *shard,
                            const struct attention_part *part, enum dtype weights) {
    int hidden = config->hidden, inter = shard->inter_end - shard->inter_begin;
    size_t attention = column_bytes(part->qkv_width, hidden, weights);
    if (part->qkv_width > 0) {
        attention += packed_bytes(hidden, part->head_leaf, part->n_leaves, weights);
        attention += attention_vector_floats(config, part->qkv_width) * sizeof(float);
    }
    size_t layer = column_bytes(2 * inter, hidden, weights);
    if (inter > 0) layer += packed_bytes(hidden, shard->inter_leaf, shard->n_leaves, weights);
    layer += layer_vector_floats(config) * sizeof(float);
    size_t head = column_bytes(shard->vocab_end - shard->vocab_begin, hidden, weights);
    return attention * (size_t)part->n_layers + layer * (size_t)config->n_layers + head +
           (size_t)hidden * sizeof(float);
}

/* One term per buffer of a forward pass. */
static size_t row_floats(const struct model_config *config, const struct shard *shard,
                         const struct attention_part *part) {
    size_t hidden = (size_t)config->hidden;
    size_t inter = (size_t)(shard->inter_end - shard->inter_begin);
    size_t floats = 2 * hidden;      /* residual, normed */
    floats += (size_t)part->qkv_width;
    floats += (size_t)part->heads * (size_t)config->head_dim;
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

static struct footprint sum_up(const struct model_config *config, const struct shard *shard,
                               const struct attention_part *part, enum dtype weights,
                               int max_rows, int max_logit_rows, size_t more_row_floats) {
    size_t padded_dim = round_up((size_t)config->head_dim, KV_DIM_UNIT);
    size_t position_bytes = 2 * (size_t)part->kv_heads * padded_dim * sizeof(uint16_t);
    size_t scratch = (size_t)max_rows * (row_floats(config, shard, part) + more_row_floats) +
                     (size_t)max_logit_rows * logit_row_floats(config, shard);
    return (struct footprint){
        .weights_bytes = weights_bytes(config, shard, part, weights),
        .kv_bytes_per_block = KV_BLOCK * position_bytes * (size_t)part->n_layers,
        .scratch_bytes = scratch * sizeof(float),
    };
}

static struct attention_part part_of(const struct model_config *config, const struct shard *shard,
                                     int n_layers) {
    int heads = shard->head_end - shard->head_begin;
    int kv_heads = shard->kv_head_end - shard->kv_head_begin;
    return (struct attention_part){heads, kv_heads, (heads + 2 * kv_heads) * config->head_dim,
                                   shard->head_leaf, shard->n_leaves, n_layers};
}

struct footprint footprint_of(const struct model_config *config, const struct shard *shard,
                              enum dtype weights, int max_rows, int max_logit_rows) {
    struct attention_part part = part_of(config, shard, config->n_layers);
    return sum_up(config, shard, &part, weights, max_rows, max_logit_rows, 0);
}

/* Attention outputs that a group of layers exchanges: one for each layer in whole rounds of owners,
 * or the roots of all ranks for each layer. */
static int stale_slots(int degree, bool layer_owner, int max_layer_width) {
    if (max_layer_width <= 1) return 0;
    int rounds = layer_owner ? (max_layer_width + degree - 1) / degree : max_layer_width;
    return rounds * degree;
}

struct footprint footprint_of_draft(const struct model_config *config, const struct shard *shard,
                                    enum dtype weights, int max_rows, int max_logit_rows,
                                    bool layer_owner, int max_layer_width) {
    struct shard whole = *shard;
    int n_layers = config->n_layers, degree = shard->degree;
    if (layer_owner) {
        CHECK(shard_make(&whole, config, 0, 1, NULL) == STATUS_OK);
        n_layers = 0;
        for (int i = 0; i < config->n_layers; i++) {
            n_layers += shard_layer_owner(i, config->n_layers, degree) == shard->rank;
        }
    }
    struct attention_part part = part_of(config, &whole, n_layers);
    size_t stale = (size_t)stale_slots(degree, layer_owner, max_layer_width);
    return sum_up(config, shard, &part, weights, max_rows, max_logit_rows,
                  stale * (size_t)config->hidden);
}
