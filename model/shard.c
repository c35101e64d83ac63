#include "model/shard.h"

enum { UNIT = 32 };

/* Border i of n nearly equal runs of whole units over 0..size. */
static int unit_border(int size, int i, int n) {
    int units = (size + UNIT - 1) / UNIT;
    int64_t border = (int64_t)i * units / n * UNIT;
    return border < size ? (int)border : size;
}

static void cut_heads(struct shard *shard, const struct model_config *config, int first_leaf) {
    int heads = config->n_heads, group = heads / config->n_kv_heads;
    shard->head_begin = first_leaf * heads / SHARD_LEAVES;
    shard->head_end = (first_leaf + shard->n_leaves) * heads / SHARD_LEAVES;
    shard->kv_head_begin = shard->head_begin / group;
    shard->kv_head_end = shard->head_end > shard->head_begin ? (shard->head_end - 1) / group + 1
                                                             : shard->kv_head_begin;
    for (int i = 0; i <= shard->n_leaves; i++) {
        int head = (first_leaf + i) * heads / SHARD_LEAVES;
        shard->head_leaf[i] = (head - shard->head_begin) * config->head_dim;
    }
}

static void cut_mlp(struct shard *shard, const struct model_config *config, int first_leaf) {
    int size = config->intermediate;
    shard->inter_begin = unit_border(size, first_leaf, SHARD_LEAVES);
    shard->inter_end = unit_border(size, first_leaf + shard->n_leaves, SHARD_LEAVES);
    for (int i = 0; i <= shard->n_leaves; i++) {
        shard->inter_leaf[i] = unit_border(size, first_leaf + i, SHARD_LEAVES) - shard->inter_begin;
    }
}

enum status shard_make(struct shard *out, const struct model_config *config, int rank, int degree,
                       struct error *err) {
    if (degree != 1 && degree != 2 && degree != 4 && degree != 8) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "tensor-parallel degree is %d; expected 1, 2, 4 or 8 ranks", degree);
    }
    if (rank < 0 || rank >= degree) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "tensor-parallel rank is %d; expected 0 to %d", rank, degree - 1);
    }
    *out = (struct shard){.rank = rank, .degree = degree, .n_leaves = SHARD_LEAVES / degree};
    int first_leaf = rank * out->n_leaves;
    cut_heads(out, config, first_leaf);
    cut_mlp(out, config, first_leaf);
    out->vocab_begin = unit_border(config->vocab, rank, degree);
    out->vocab_end = unit_border(config->vocab, rank + 1, degree);
    return STATUS_OK;
}

int shard_layer_owner(int layer, int n_layers, int degree) {
    if (layer == 0) return 0;
    if (layer == n_layers - 1) return degree - 1;
    return (layer - 1) % degree;
}
