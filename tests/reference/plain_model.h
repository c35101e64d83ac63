/* A whole model as one straight text over the backend's ops: one rank, one sequence, one row at a
 * time, its groups of layers as speculation.md section 3 writes them down. The transformer must
 * equal it bit for bit, whatever its layout. */
#pragma once
#include <stdlib.h>
#include <string.h>

#include "kernels/backend.h"
#include "model/checkpoint.h"
#include "model/rope.h"
#include "model/shard.h"

enum { PLAIN_MODEL_MAX_WIDTH = 8 };

struct plain_layer {
    float *attn_norm, *mlp_norm, *q_norm, *k_norm, *qkv_bias, *o_bias; /* NULL: without */
    struct weight *qkv, *o, *gate_up, *down;
    struct kv_cache *kv;
};

struct plain_model {
    const struct checkpoint *checkpoint;
    const struct model_config *config;
    struct backend *backend;
    struct rope_table *rope;
    struct shard shard; /* all of it: the borders of the leaves */
    struct plain_layer *layers;
    float *final_norm;
    struct weight *lm_head;
    int *kv_of_head;
    int32_t *blocks;
    float *residual, *normed, *qkv, *heads, *gate_up, *mlp, *out, *stale;
};

static inline float *plain_vector(const struct plain_model *m, enum checkpoint_role role, int layer,
                                  float *out) {
    struct checkpoint_tensor tensor = checkpoint_tensor(m->checkpoint, role, layer);
    if (out == NULL) out = xcalloc((size_t)tensor.rows, sizeof *out);
    for (int64_t i = 0; i < tensor.rows; i++) {
        out[i] = dtype_load_f32(tensor.data, tensor.dtype, (size_t)i);
    }
    return out;
}

static inline struct weight_source plain_source(const struct plain_model *m,
                                                enum checkpoint_role role, int layer) {
    struct checkpoint_tensor tensor = checkpoint_tensor(m->checkpoint, role, layer);
    return (struct weight_source){tensor.data, tensor.dtype, tensor.cols, (int)tensor.rows};
}

static inline struct weight *plain_weight(const struct plain_model *m,
                                          const struct weight_source *sources, int n, int k,
                                          const int *leaves, enum dtype format) {
    struct weight *weight;
    struct error err;
    CHECK(backend_weight_create(&weight, m->backend, sources, n, k, leaves,
                                leaves != NULL ? SHARD_LEAVES : 1, format, &err) == STATUS_OK);
    return weight;
}

static inline void plain_load_layer(struct plain_model *m, int i, int n_blocks,
                                    enum dtype format) {
    const struct model_config *c = m->config;
    struct plain_layer *layer = &m->layers[i];
    struct error err;
    int q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    layer->attn_norm = plain_vector(m, CHECKPOINT_ATTN_NORM, i, NULL);
    layer->mlp_norm = plain_vector(m, CHECKPOINT_MLP_NORM, i, NULL);
    if (c->qk_norm) layer->q_norm = plain_vector(m, CHECKPOINT_Q_NORM, i, NULL);
    if (c->qk_norm) layer->k_norm = plain_vector(m, CHECKPOINT_K_NORM, i, NULL);
    if (c->o_bias) layer->o_bias = plain_vector(m, CHECKPOINT_O_BIAS, i, NULL);
    if (c->qkv_bias) {
        layer->qkv_bias = xcalloc((size_t)(q + 2 * kv), sizeof(float));
        plain_vector(m, CHECKPOINT_Q_BIAS, i, layer->qkv_bias);
        plain_vector(m, CHECKPOINT_K_BIAS, i, layer->qkv_bias + q);
        plain_vector(m, CHECKPOINT_V_BIAS, i, layer->qkv_bias + q + kv);
    }
    struct weight_source qkv[] = {plain_source(m, CHECKPOINT_Q, i),
                                  plain_source(m, CHECKPOINT_K, i),
                                  plain_source(m, CHECKPOINT_V, i)};
    struct weight_source gate_up[] = {plain_source(m, CHECKPOINT_GATE, i),
                                      plain_source(m, CHECKPOINT_UP, i)};
    struct weight_source o = plain_source(m, CHECKPOINT_O, i);
    struct weight_source down = plain_source(m, CHECKPOINT_DOWN, i);
    layer->qkv = plain_weight(m, qkv, 3, c->hidden, NULL, format);
    layer->o = plain_weight(m, &o, 1, q, m->shard.head_leaf, format);
    layer->gate_up = plain_weight(m, gate_up, 2, c->hidden, NULL, format);
    layer->down = plain_weight(m, &down, 1, c->intermediate, m->shard.inter_leaf, format);
    CHECK(backend_kv_create(&layer->kv, m->backend, n_blocks, c->n_kv_heads, c->head_dim, &err) ==
          STATUS_OK);
}

static inline void plain_make_scratch(struct plain_model *m) {
    const struct model_config *c = m->config;
    size_t hidden = (size_t)c->hidden, inter = (size_t)c->intermediate;
    size_t heads = (size_t)(c->n_heads * c->head_dim);
    size_t kv = (size_t)(c->n_kv_heads * c->head_dim);
    const struct {
        float **buffer;
        size_t n;
    } buffers[] = {
        {&m->residual, hidden}, {&m->normed, hidden},       {&m->qkv, heads + 2 * kv},
        {&m->heads, heads},     {&m->gate_up, 2 * inter},   {&m->mlp, inter},
        {&m->out, hidden},      {&m->stale, hidden * PLAIN_MODEL_MAX_WIDTH},
    };
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) {
        *buffers[i].buffer = backend_alloc(m->backend, (buffers[i].n + 16) * sizeof(float));
        CHECK(*buffers[i].buffer != NULL);
    }
}

/* Fails loudly: the checkpoint has been opened before. */
static inline void plain_model_create(struct plain_model *m, const struct checkpoint *checkpoint,
                                      enum backend_isa isa, enum dtype format, int n_blocks) {
    struct error err;
    *m = (struct plain_model){.checkpoint = checkpoint, .config = checkpoint_config(checkpoint)};
    const struct model_config *c = m->config;
    struct backend_options backend = {isa, 1, 1, model_config_max_width(c), 0};
    CHECK(backend_create(&m->backend, &backend, &err) == STATUS_OK);
    CHECK(shard_make(&m->shard, c, 0, 1, &err) == STATUS_OK);
    float *inv_freq = xcalloc((size_t)c->head_dim / 2, sizeof *inv_freq);
    model_rope_inv_freq(inv_freq, c);
    CHECK(backend_rope_create(&m->rope, m->backend, inv_freq, c->head_dim,
                              n_blocks * BACKEND_KV_BLOCK, &err) == STATUS_OK);
    free(inv_freq);
    m->kv_of_head = xcalloc((size_t)c->n_heads, sizeof *m->kv_of_head);
    for (int h = 0; h < c->n_heads; h++) m->kv_of_head[h] = h / (c->n_heads / c->n_kv_heads);
    m->blocks = xcalloc((size_t)n_blocks, sizeof *m->blocks);
    for (int i = 0; i < n_blocks; i++) m->blocks[i] = i;
    m->layers = xcalloc((size_t)c->n_layers, sizeof *m->layers);
    for (int i = 0; i < c->n_layers; i++) plain_load_layer(m, i, n_blocks, format);
    m->final_norm = plain_vector(m, CHECKPOINT_FINAL_NORM, 0, NULL);
    struct weight_source head = plain_source(m, CHECKPOINT_LM_HEAD, 0);
    m->lm_head = plain_weight(m, &head, 1, c->hidden, NULL, format);
    plain_make_scratch(m);
}

static inline void plain_model_destroy(struct plain_model *m) {
    for (int i = 0; i < m->config->n_layers; i++) {
        struct plain_layer *layer = &m->layers[i];
        float *vectors[] = {layer->attn_norm, layer->mlp_norm, layer->q_norm,
                            layer->k_norm,    layer->qkv_bias, layer->o_bias};
        for (int v = 0; v < 6; v++) free(vectors[v]);
        backend_weight_free(layer->qkv);
        backend_weight_free(layer->o);
        backend_weight_free(layer->gate_up);
        backend_weight_free(layer->down);
        backend_kv_free(layer->kv);
    }
    float *buffers[] = {m->residual, m->normed, m->qkv, m->heads,
                        m->gate_up,  m->mlp,    m->out, m->stale};
    for (int i = 0; i < 8; i++) backend_free(m->backend, buffers[i]);
    backend_weight_free(m->lm_head);
    backend_rope_free(m->rope);
    backend_destroy(m->backend);
    free(m->layers);
    free(m->final_norm);
    free(m->kv_of_head);
    free(m->blocks);
}

/* out = attention of the layer, from the residual stream as it is now. */
static inline void plain_attention(struct plain_model *m, struct plain_layer *layer, int position,
                                   float *out) {
    const struct model_config *c = m->config;
    struct backend_segment segment = {0, 1, position, m->blocks};
    struct backend_pass pass = {.n_rows = 1, .segments = &segment, .n_segments = 1};
    int width = (c->n_heads + 2 * c->n_kv_heads) * c->head_dim;
    backend_pass_begin(m->backend, &pass);
    backend_rmsnorm(m->backend, m->normed, m->residual, layer->attn_norm, c->rms_eps, 1, c->hidden);
    backend_linear(m->backend, m->qkv, m->normed, c->hidden, layer->qkv, layer->qkv_bias, 1);
    backend_rope_kv_write(m->backend, m->qkv, layer->kv, m->rope, layer->q_norm, layer->k_norm,
                          c->rms_eps, c->n_heads);
    backend_attention(m->backend, m->heads, m->qkv, width, layer->kv, m->kv_of_head, c->n_heads,
                      c->sliding_window);
    backend_linear_tree(m->backend, out, m->heads, layer->o, 1);
}

static inline void plain_mlp(struct plain_model *m, struct plain_layer *layer) {
    const struct model_config *c = m->config;
    backend_rmsnorm(m->backend, m->normed, m->residual, layer->mlp_norm, c->rms_eps, 1, c->hidden);
    backend_linear(m->backend, m->gate_up, m->normed, c->hidden, layer->gate_up, NULL, 1);
    backend_swiglu(m->backend, m->mlp, m->gate_up, 1, c->intermediate);
    backend_linear_tree(m->backend, m->out, m->mlp, layer->down, 1);
}

/* One token at `position`; logits [vocab]. layer_width 1: exact. */
static inline void plain_model_step(struct plain_model *m, int32_t token, int position,
                                    int layer_width, float *logits) {
    const struct model_config *c = m->config;
    int last = c->n_layers - 1, hidden = c->hidden, n;
    struct weight_source embedding = plain_source(m, CHECKPOINT_EMBEDDING, 0);
    struct backend_pass pass = {.tokens = &token, .n_rows = 1};
    struct table *table;
    struct error err;
    CHECK(backend_table_create(&table, m->backend, &embedding, hidden, &err) == STATUS_OK);
    backend_pass_begin(m->backend, &pass);
    backend_embed(m->backend, m->residual, table, 1, hidden);
    backend_table_free(table);
    for (int i = 0; i <= last; i += n) {
        n = i == 0 || i == last ? 1 : layer_width;
        if (i < last && n > last - i) n = last - i;
        for (int j = 0; j < n; j++) {
            plain_attention(m, &m->layers[i + j], position, m->stale + j * hidden);
        }
        for (int j = 0; j < n; j++) {
            const float *stale = m->stale + j * hidden, *bias = m->layers[i + j].o_bias;
            for (int d = 0; d < hidden; d++) {
                m->residual[d] += bias != NULL ? stale[d] + bias[d] : stale[d];
            }
            plain_mlp(m, &m->layers[i + j]);
            for (int d = 0; d < hidden; d++) m->residual[d] += m->out[d];
        }
    }
    backend_rmsnorm(m->backend, m->normed, m->residual, m->final_norm, c->rms_eps, 1, hidden);
    backend_linear(m->backend, logits, m->normed, hidden, m->lm_head, NULL, 1);
}

static inline void plain_model_kv(const struct plain_model *m, int layer, int position, float *k,
                                  float *v) {
    backend_kv_read(m->layers[layer].kv, m->blocks, position, k, v);
}
