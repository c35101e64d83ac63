#include "worker/transformer.h"

#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "model/rope.h"

struct layer {
    float *attn_norm, *mlp_norm; /* [hidden] */
    float *q_norm, *k_norm;      /* [head_dim], NULL without QK norm */
    float *qkv_bias;             /* [qkv_width], NULL without */
    float *o_bias;               /* [hidden], NULL without */
    struct weight *qkv, *o, *gate_up, *down; /* NULL where this rank's part is empty */
    struct kv_cache *kv;
};

struct transformer {
    struct model_config config;
    struct shard shard;
    struct shard attention; /* its part of a layer's attention: the shard, or all (layer_owner) */
    bool layer_owner;
    struct backend *backend;
    struct comm *group;
    struct rope_table *rope;

    struct table *embedding;
    float *final_norm;
    struct weight *lm_head; /* this rank's vocabulary rows; NULL where empty */
    struct layer *layers;
    int *kv_of_head;        /* [local heads] */

    int n_heads, n_kv_heads, inter, vocab; /* local counts */
    int qkv_width;
    int max_rows, max_logit_rows, max_layer_width;

    /* Scratch, one term per use: [max_rows, ·] unless said. */
    float *residual;    /* hidden */
    float *normed;      /* hidden */
    float *qkv;         /* qkv_width */
    float *attention_out; /* n_heads * head_dim */
    float *gate_up;     /* 2 * inter */
    float *mlp;         /* inter */
    float *root;        /* hidden: this rank's subtree */
    float *roots;       /* [degree][max_rows, hidden]; NULL at degree 1 */
    float *stale;       /* [degree][stale_slots][max_rows, hidden]: attention outputs of a group of
                           layers; NULL where passes are exact only */
    float *shard_logits; /* [max_logit_rows, local vocab] */
    float *gathered;    /* rank 0, degree > 1: [sum of shards] in rank order */
    float *logits;      /* rank 0, degree > 1: [max_logit_rows, vocab] */
    size_t *gather_bytes; /* [degree] */
    int normed_layer;     /* whose attn_norm `normed` holds of the residual stream; -1: nobody's */

    struct backend_pass pass; /* the last one */
    struct transformer_times times;
    struct transformer_memory memory;
};

/* --- loading ------------------------------------------------------------------------------- */

struct loader {
    struct transformer *t;
    const struct transformer_options *options;
    size_t bytes_total, bytes_done;
    struct error *err;
};

/* Elements [begin, end) of a vector. */
static enum status load_vector(struct loader *loader, float **out, enum checkpoint_role role,
                               int layer, int64_t begin, int64_t end) {
    struct checkpoint_tensor tensor = checkpoint_tensor(loader->options->checkpoint, role, layer);
    size_t n = (size_t)(end - begin), bytes = (n ? n : 1) * sizeof(float);
    *out = backend_alloc(loader->t->backend, bytes);
    if (*out == NULL) {
        return error_set(loader->err, STATUS_RESOURCE_EXHAUSTED,
                         "no memory for a vector of %zu floats", n);
    }
    float *values = xcalloc(1, bytes);
    for (size_t i = 0; i < n; i++) {
        values[i] = dtype_load_f32(tensor.data, tensor.dtype, (size_t)begin + i);
    }
    backend_copy_in(loader->t->backend, *out, values, bytes);
    free(values);
    loader->t->memory.weights_bytes += n * sizeof(float);
    return STATUS_OK;
}

/* Rows [row_begin, row_end) and columns from col_begin of a checkpoint matrix. */
static struct weight_source source_of(const struct loader *loader, enum checkpoint_role role,
                                      int layer, int64_t row_begin, int64_t row_end,
                                      int64_t col_begin) {
    struct checkpoint_tensor tensor = checkpoint_tensor(loader->options->checkpoint, role, layer);
    size_t offset = (size_t)(row_begin * tensor.cols + col_begin) * dtype_bytes(tensor.dtype);
    return (struct weight_source){
        .data = (const char *)tensor.data + offset,
        .dtype = tensor.dtype,
        .row_stride = tensor.cols,
        .n_rows = (int)(row_end - row_begin),
    };
}

static enum status load_weight(struct loader *loader, struct weight **out,
                               const struct weight_source *sources, int n_sources, int k,
                               const int *leaf_begin, int n_leaves) {
    TRY(backend_weight_create(out, loader->t->backend, sources, n_sources, k, leaf_begin, n_leaves,
                              loader->options->weights, loader->err));
    size_t bytes = backend_weight_bytes(*out);
    loader->t->memory.weights_bytes += bytes;
    loader->bytes_done += bytes;
    if (loader->options->progress != NULL) {
        size_t total = loader->bytes_total > loader->bytes_done ? loader->bytes_total
                                                                : loader->bytes_done;
        loader->options->progress(loader->options->progress_user, loader->bytes_done, total);
    }
    return STATUS_OK;
}

static enum status load_qkv_bias(struct loader *loader, struct layer *layer, int layer_i) {
    struct transformer *t = loader->t;
    const struct checkpoint *checkpoint = loader->options->checkpoint;
    int dim = t->config.head_dim;
    size_t bytes = (size_t)t->qkv_width * sizeof(float);
    layer->qkv_bias = backend_alloc(t->backend, bytes);
    if (layer->qkv_bias == NULL) {
        return error_set(loader->err, STATUS_RESOURCE_EXHAUSTED, "no memory for biases");
    }
    const struct {
        enum checkpoint_role role;
        int begin, end;
    } parts[] = {
        {CHECKPOINT_Q_BIAS, t->attention.head_begin * dim, t->attention.head_end * dim},
        {CHECKPOINT_K_BIAS, t->attention.kv_head_begin * dim, t->attention.kv_head_end * dim},
        {CHECKPOINT_V_BIAS, t->attention.kv_head_begin * dim, t->attention.kv_head_end * dim},
    };
    float *values = xcalloc(1, bytes), *out = values;
    for (int part = 0; part < 3; part++) {
        struct checkpoint_tensor tensor = checkpoint_tensor(checkpoint, parts[part].role, layer_i);
        for (int i = parts[part].begin; i < parts[part].end; i++) {
            *out++ = dtype_load_f32(tensor.data, tensor.dtype, (size_t)i);
        }
    }
    backend_copy_in(t->backend, layer->qkv_bias, values, bytes);
    free(values);
    return STATUS_OK;
}

/* Whether this rank computes attention of a layer. */
static bool has_attention(const struct transformer *t, int layer_i) {
    if (t->n_heads == 0) return false;
    return !t->layer_owner ||
           shard_layer_owner(layer_i, t->config.n_layers, t->shard.degree) == t->shard.rank;
}

static enum status load_attention(struct loader *loader, struct layer *layer, int layer_i) {
    struct transformer *t = loader->t;
    const struct model_config *config = &t->config;
    const struct shard *shard = &t->attention;
    int dim = config->head_dim;
    TRY(load_vector(loader, &layer->attn_norm, CHECKPOINT_ATTN_NORM, layer_i, 0, config->hidden));
    if (config->o_bias) {
        TRY(load_vector(loader, &layer->o_bias, CHECKPOINT_O_BIAS, layer_i, 0, config->hidden));
    }
    if (!has_attention(t, layer_i)) return STATUS_OK;

    int64_t q0 = (int64_t)shard->head_begin * dim, q1 = (int64_t)shard->head_end * dim;
    int64_t kv0 = (int64_t)shard->kv_head_begin * dim, kv1 = (int64_t)shard->kv_head_end * dim;
    struct weight_source qkv[3] = {
        source_of(loader, CHECKPOINT_Q, layer_i, q0, q1, 0),
        source_of(loader, CHECKPOINT_K, layer_i, kv0, kv1, 0),
        source_of(loader, CHECKPOINT_V, layer_i, kv0, kv1, 0),
    };
    TRY(load_weight(loader, &layer->qkv, qkv, 3, config->hidden, NULL, 1));
    struct weight_source o = source_of(loader, CHECKPOINT_O, layer_i, 0, config->hidden, q0);
    TRY(load_weight(loader, &layer->o, &o, 1, t->n_heads * dim, shard->head_leaf,
                    shard->n_leaves));
    if (config->qkv_bias) TRY(load_qkv_bias(loader, layer, layer_i));
    if (config->qk_norm) {
        TRY(load_vector(loader, &layer->q_norm, CHECKPOINT_Q_NORM, layer_i, 0, dim));
        TRY(load_vector(loader, &layer->k_norm, CHECKPOINT_K_NORM, layer_i, 0, dim));
    }
    TRY(backend_kv_create(&layer->kv, t->backend, loader->options->n_blocks, t->n_kv_heads, dim,
                          loader->err));
    t->memory.kv_bytes +=
        backend_kv_block_bytes(t->n_kv_heads, dim) * (size_t)loader->options->n_blocks;
    return STATUS_OK;
}

static enum status load_mlp(struct loader *loader, struct layer *layer, int layer_i) {
    struct transformer *t = loader->t;
    const struct shard *shard = &t->shard;
    int hidden = t->config.hidden;
    TRY(load_vector(loader, &layer->mlp_norm, CHECKPOINT_MLP_NORM, layer_i, 0, hidden));
    if (t->inter == 0) return STATUS_OK;

    struct weight_source gate_up[2] = {
        source_of(loader, CHECKPOINT_GATE, layer_i, shard->inter_begin, shard->inter_end, 0),
        source_of(loader, CHECKPOINT_UP, layer_i, shard->inter_begin, shard->inter_end, 0),
    };
    TRY(load_weight(loader, &layer->gate_up, gate_up, 2, hidden, NULL, 1));
    struct weight_source down =
        source_of(loader, CHECKPOINT_DOWN, layer_i, 0, hidden, shard->inter_begin);
    return load_weight(loader, &layer->down, &down, 1, t->inter, shard->inter_leaf,
                       shard->n_leaves);
}

static enum status load_ends(struct loader *loader) {
    struct transformer *t = loader->t;
    int hidden = t->config.hidden;
    struct weight_source embedding =
        source_of(loader, CHECKPOINT_EMBEDDING, 0, 0, t->config.vocab, 0);
    TRY(backend_table_create(&t->embedding, t->backend, &embedding, hidden, loader->err));
    t->memory.weights_bytes += backend_table_bytes(t->embedding);
    TRY(load_vector(loader, &t->final_norm, CHECKPOINT_FINAL_NORM, 0, 0, hidden));
    if (t->vocab == 0) return STATUS_OK;
    struct weight_source head = source_of(loader, CHECKPOINT_LM_HEAD, 0, t->shard.vocab_begin,
                                          t->shard.vocab_end, 0);
    return load_weight(loader, &t->lm_head, &head, 1, hidden, NULL, 1);
}

/* What the packed matrices will come to, for the progress bar. */
static size_t expected_bytes(const struct transformer *t, enum dtype weights) {
    size_t hidden = (size_t)t->config.hidden;
    size_t q = (size_t)(t->n_heads * t->config.head_dim);
    size_t mlp = 3 * hidden * (size_t)t->inter, n_attention = 0;
    for (int i = 0; i < t->config.n_layers; i++) n_attention += has_attention(t, i);
    size_t attention = hidden * (size_t)t->qkv_width + q * hidden;
    return (attention * n_attention + mlp * (size_t)t->config.n_layers +
            hidden * (size_t)t->vocab) *
           dtype_bytes(weights);
}

static float *scratch(struct transformer *t, size_t rows, size_t width) {
    size_t bytes = (rows * width + 16) * sizeof(float);
    t->memory.scratch_bytes += bytes;
    return backend_alloc(t->backend, bytes);
}

/* What one rank puts into the exchange of a group of n layers: with owners, attention outputs of
 * its layers (of some groups one fewer); else its root for each layer. */
static int stale_slots(const struct transformer *t, int n) {
    int degree = t->shard.degree;
    return t->layer_owner ? (n + degree - 1) / degree : n;
}

static enum status allocate_scratch(struct transformer *t, struct error *err) {
    size_t rows = (size_t)backend_padded_rows(t->backend, t->max_rows);
    size_t logit_rows = (size_t)backend_padded_rows(t->backend, t->max_logit_rows);
    size_t hidden = (size_t)t->config.hidden, degree = (size_t)t->shard.degree;
    bool gathers = degree > 1;
    bool leads = t->shard.rank == 0 && gathers;
    t->residual = scratch(t, rows, hidden);
    t->normed = scratch(t, rows, hidden);
    t->qkv = scratch(t, rows, (size_t)t->qkv_width);
    t->attention_out = scratch(t, rows, (size_t)(t->n_heads * t->config.head_dim));
    t->gate_up = scratch(t, rows, 2 * (size_t)t->inter);
    t->mlp = scratch(t, rows, (size_t)t->inter);
    t->root = scratch(t, rows, hidden);
    t->shard_logits = scratch(t, logit_rows, (size_t)t->vocab);
    if (gathers) t->roots = scratch(t, rows * degree, hidden);
    bool exact_only = t->max_layer_width <= 1;
    size_t slots = exact_only ? 0 : (size_t)stale_slots(t, t->max_layer_width) * degree;
    if (slots > 0) t->stale = scratch(t, rows * slots, hidden);
    if (leads) t->gathered = scratch(t, logit_rows, (size_t)t->config.vocab);
    if (leads) t->logits = scratch(t, logit_rows, (size_t)t->config.vocab);
    bool complete = t->residual && t->normed && t->qkv && t->attention_out && t->gate_up &&
                    t->mlp && t->root && t->shard_logits && (!gathers || t->roots) &&
                    (exact_only || t->stale) && (!leads || (t->gathered && t->logits));
    if (complete) return STATUS_OK;
    return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                     "no memory for %zu bytes of scratch (%d rows a step)",
                     t->memory.scratch_bytes, t->max_rows);
}

static void set_local_counts(struct transformer *t) {
    const struct shard *shard = &t->shard, *attention = &t->attention;
    t->n_heads = attention->head_end - attention->head_begin;
    t->n_kv_heads = attention->kv_head_end - attention->kv_head_begin;
    t->inter = shard->inter_end - shard->inter_begin;
    t->vocab = shard->vocab_end - shard->vocab_begin;
    t->qkv_width = (t->n_heads + 2 * t->n_kv_heads) * t->config.head_dim;
    int group = t->config.n_heads / t->config.n_kv_heads;
    t->kv_of_head = xcalloc((size_t)t->n_heads, sizeof *t->kv_of_head);
    for (int h = 0; h < t->n_heads; h++) {
        t->kv_of_head[h] = (attention->head_begin + h) / group - attention->kv_head_begin;
    }
}

enum status transformer_create(struct transformer **out, const struct transformer_options *options,
                               struct error *err) {
    enum status status;
    struct transformer *t = xcalloc(1, sizeof *t);
    struct loader loader = {.t = t, .options = options, .err = err};
    t->config = *checkpoint_config(options->checkpoint);
    t->backend = options->backend;
    t->group = options->group;
    t->max_rows = options->max_rows;
    t->max_logit_rows = options->max_logit_rows;
    t->max_layer_width = options->max_layer_width;
    t->layer_owner = options->layer_owner;
    t->layers = xcalloc((size_t)t->config.n_layers, sizeof *t->layers);
    t->gather_bytes = xcalloc((size_t)comm_size(t->group), sizeof *t->gather_bytes);
    TRY_OR_FAIL(shard_make(&t->shard, &t->config, comm_rank(t->group), comm_size(t->group), err));
    t->attention = t->shard;
    if (t->layer_owner) TRY_OR_FAIL(shard_make(&t->attention, &t->config, 0, 1, err));
    set_local_counts(t);

    int dim = t->config.head_dim;
    float *inv_freq = xcalloc((size_t)dim / 2, sizeof *inv_freq);
    model_rope_inv_freq(inv_freq, &t->config);
    status = backend_rope_create(&t->rope, t->backend, inv_freq, dim, options->max_context, err);
    free(inv_freq);
    if (status != STATUS_OK) goto fail;

    TRY_OR_FAIL(allocate_scratch(t, err));
    loader.bytes_total = expected_bytes(t, options->weights);
    for (int i = 0; i < t->config.n_layers; i++) {
        TRY_OR_FAIL(load_attention(&loader, &t->layers[i], i));
        TRY_OR_FAIL(load_mlp(&loader, &t->layers[i], i));
    }
    TRY_OR_FAIL(load_ends(&loader));
    *out = t;
    return STATUS_OK;

fail:
    transformer_destroy(t);
    return status;
}

static void layer_destroy(struct transformer *t, struct layer *layer) {
    float *vectors[] = {layer->attn_norm, layer->mlp_norm, layer->q_norm,
                        layer->k_norm,    layer->qkv_bias, layer->o_bias};
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
        backend_free(t->backend, vectors[i]);
    }
    struct weight *weights[] = {layer->qkv, layer->o, layer->gate_up, layer->down};
    for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) {
        if (weights[i] != NULL) backend_weight_free(weights[i]);
    }
    if (layer->kv != NULL) backend_kv_free(layer->kv);
}

void transformer_destroy(struct transformer *t) {
    if (t == NULL) return;
    for (int i = 0; i < t->config.n_layers; i++) layer_destroy(t, &t->layers[i]);
    if (t->lm_head != NULL) backend_weight_free(t->lm_head);
    backend_rope_free(t->rope);
    backend_table_free(t->embedding);
    float *buffers[] = {t->final_norm, t->residual, t->normed,       t->qkv,
                        t->attention_out, t->gate_up, t->mlp,        t->root,
                        t->roots,      t->logits,   t->shard_logits, t->gathered,
                        t->stale};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) {
        backend_free(t->backend, buffers[i]);
    }
    free(t->layers);
    free(t->kv_of_head);
    free(t->gather_bytes);
    free(t);
}

/* --- the forward pass ---------------------------------------------------------------------- */

/* Everybody's `bytes` of `mine`, at its place in `all`. */
static enum status gather_all(struct transformer *t, float *all, const float *mine, size_t bytes,
                              struct error *err) {
    int64_t start = clock_now_ns();
    TRY(comm_all_gather(t->group, all, mine, bytes, err));
    t->times.comm_ns += clock_now_ns() - start;
    return STATUS_OK;
}

static size_t row_bytes(const struct transformer *t, int n_rows) {
    return (size_t)n_rows * (size_t)t->config.hidden * sizeof(float);
}

/* Adds the finished tree over the roots to the residual stream; `normed` becomes what `norm` makes
 * of it, where not NULL. */
static void add_roots(struct transformer *t, const float *roots, int n_roots, const float *bias,
                      const float *norm, int n_rows) {
    int hidden = t->config.hidden;
    if (norm == NULL) {
        backend_tree_sum(t->backend, t->residual, roots, n_roots, bias, n_rows, hidden);
    } else {
        backend_tree_sum_norm(t->backend, t->residual, t->normed, roots, n_roots, bias, norm,
                              t->config.rms_eps, n_rows, hidden);
    }
    t->normed_layer = -1;
}

/* The same for this rank's root and those of the others. */
static enum status add_row_parallel(struct transformer *t, const float *bias, const float *norm,
                                    int n_rows, struct error *err) {
    const float *roots = t->root;
    if (t->shard.degree > 1) {
        TRY(gather_all(t, t->roots, t->root, row_bytes(t, n_rows), err));
        roots = t->roots;
    }
    add_roots(t, roots, t->shard.degree, bias, norm, n_rows);
    return STATUS_OK;
}

/* root: this rank's subtree of the layer's attention output. */
static void attention_root(struct transformer *t, int layer_i, float *root, int n_rows) {
    const struct model_config *config = &t->config;
    struct layer *layer = &t->layers[layer_i];
    if (layer->qkv == NULL) {
        backend_zero(t->backend, root, row_bytes(t, n_rows));
        return;
    }
    if (t->normed_layer != layer_i) {
        backend_rmsnorm(t->backend, t->normed, t->residual, layer->attn_norm, config->rms_eps,
                        n_rows, config->hidden);
        t->normed_layer = layer_i;
    }
    backend_linear(t->backend, t->qkv, t->normed, config->hidden, layer->qkv, layer->qkv_bias,
                   n_rows);
    backend_rope_kv_write(t->backend, t->qkv, layer->kv, t->rope, layer->q_norm, layer->k_norm,
                          config->rms_eps, t->n_heads);
    backend_attention(t->backend, t->attention_out, t->qkv, t->qkv_width, layer->kv, t->kv_of_head,
                      t->n_heads, config->sliding_window);
    backend_linear_tree(t->backend, root, t->attention_out, layer->o, n_rows);
}

/* Of `normed`, which holds mlp_norm of the residual stream. */
static void mlp_root(struct transformer *t, struct layer *layer, int n_rows) {
    const struct model_config *config = &t->config;
    if (t->inter == 0) {
        backend_zero(t->backend, t->root, row_bytes(t, n_rows));
        return;
    }
    backend_linear(t->backend, t->gate_up, t->normed, config->hidden, layer->gate_up, NULL, n_rows);
    backend_swiglu(t->backend, t->mlp, t->gate_up, n_rows, t->inter);
    backend_linear_tree(t->backend, t->root, t->mlp, layer->down, n_rows);
}

/* Leaves `normed` ready for the next layer's attention. */
static enum status add_mlp(struct transformer *t, int layer_i, int n_rows, struct error *err) {
    mlp_root(t, &t->layers[layer_i], n_rows);
    int next = layer_i + 1;
    bool prepares = next < t->config.n_layers && t->layers[next].qkv != NULL;
    TRY(add_row_parallel(t, NULL, prepares ? t->layers[next].attn_norm : NULL, n_rows, err));
    if (prepares) t->normed_layer = next;
    return STATUS_OK;
}

/* *from: the owner's t->root, on every rank. A group that only enqueues is spared the wait of a broadcast. */
static enum status tell_root(struct transformer *t, int owner, int n_rows, const float **from,
                             struct error *err) {
    size_t bytes = row_bytes(t, n_rows);
    *from = t->root;
    if (t->shard.degree == 1) return STATUS_OK;
    if (bytes <= comm_recordable_bytes(t->group)) {
        *from = t->roots + (size_t)owner * (bytes / sizeof(float));
        return gather_all(t, t->roots, t->root, bytes, err);
    }
    int64_t start = clock_now_ns();
    TRY(comm_broadcast(t->group, t->root, bytes, owner, err));
    t->times.comm_ns += clock_now_ns() - start;
    return STATUS_OK;
}

/* A layer that runs alone, exactly. With owners the whole tree is the owner's, told to all. */
static enum status run_layer(struct transformer *t, int layer_i, int n_rows, struct error *err) {
    struct layer *layer = &t->layers[layer_i];
    if (!t->layer_owner) {
        attention_root(t, layer_i, t->root, n_rows);
        TRY(add_row_parallel(t, layer->o_bias, layer->mlp_norm, n_rows, err));
        return add_mlp(t, layer_i, n_rows, err);
    }
    if (layer->qkv != NULL) attention_root(t, layer_i, t->root, n_rows);
    int owner = shard_layer_owner(layer_i, t->config.n_layers, t->shard.degree);
    const float *root;
    TRY(tell_root(t, owner, n_rows, &root, err));
    add_roots(t, root, 1, layer->o_bias, layer->mlp_norm, n_rows);
    return add_mlp(t, layer_i, n_rows, err);
}

/* Attention of layers first .. first + n - 1, all from the residual stream as it is now, into
 * `stale` by rank: one exchange for the whole group. */
static enum status compute_stale(struct transformer *t, int first, int n, int n_rows,
                                 struct error *err) {
    int n_slots = stale_slots(t, n);
    size_t bytes = row_bytes(t, n_rows), width = bytes / sizeof(float);
    float *mine = t->stale + (size_t)(t->shard.rank * n_slots) * width;
    for (int j = 0; j < n; j++) {
        int slot = t->layer_owner ? j / t->shard.degree : j;
        if (!has_attention(t, first + j) && t->layer_owner) continue;
        attention_root(t, first + j, mine + (size_t)slot * width, n_rows);
    }
    if (t->shard.degree == 1) return STATUS_OK;
    return gather_all(t, t->stale, mine, (size_t)n_slots * bytes, err);
}

/* The j-th layer of the group: its attention output (*n_roots 1), or the roots of all ranks. */
static const float *roots_of_group(struct transformer *t, int first, int n, int j, int n_rows,
                                   int *n_roots) {
    int degree = t->shard.degree, n_slots = stale_slots(t, n);
    size_t bytes = row_bytes(t, n_rows), width = bytes / sizeof(float);
    *n_roots = t->layer_owner ? 1 : degree;
    if (t->layer_owner) {
        int owner = shard_layer_owner(first + j, t->config.n_layers, degree);
        return t->stale + (size_t)(owner * n_slots + j / degree) * width;
    }
    if (degree == 1) return t->stale + (size_t)j * width;
    for (int rank = 0; rank < degree; rank++) {
        backend_copy(t->backend, t->roots + (size_t)rank * width,
                     t->stale + (size_t)(rank * n_slots + j) * width, bytes);
    }
    return t->roots;
}

/* A group of layers whose attention runs at once on one stale input (EasySpec; speculation.md 3).
 * Each output enters at its own place, so MLPs see everything before them. */
static enum status run_group(struct transformer *t, int first, int n, int n_rows,
                             struct error *err) {
    TRY(compute_stale(t, first, n, n_rows, err));
    for (int j = 0; j < n; j++) {
        struct layer *layer = &t->layers[first + j];
        int n_roots;
        const float *roots = roots_of_group(t, first, n, j, n_rows, &n_roots);
        add_roots(t, roots, n_roots, layer->o_bias, layer->mlp_norm, n_rows);
        TRY(add_mlp(t, first + j, n_rows, err));
    }
    return STATUS_OK;
}

/* First and last layer alone, those between in groups of the batch's width. */
static enum status run_layers(struct transformer *t, int width, int n_rows, struct error *err) {
    int n_layers = t->config.n_layers;
    if (width <= 1) {
        for (int i = 0; i < n_layers; i++) TRY(run_layer(t, i, n_rows, err));
        return STATUS_OK;
    }
    CHECK(width <= t->max_layer_width);
    TRY(run_layer(t, 0, n_rows, err));
    for (int i = 1; i < n_layers - 1; i += width) {
        int left = n_layers - 1 - i;
        TRY(run_group(t, i, left < width ? left : width, n_rows, err));
    }
    return n_layers > 1 ? run_layer(t, n_layers - 1, n_rows, err) : STATUS_OK;
}

/* Ranks' vocabulary shards, [n_rows, shard] one after the other, into rows of the whole. */
static void interleave_shards(struct transformer *t, int n_rows) {
    size_t vocab = (size_t)t->config.vocab;
    const float *part = t->gathered;
    size_t column = 0;
    for (int rank = 0; rank < t->shard.degree; rank++) {
        size_t width = t->gather_bytes[rank] / sizeof(float) / (size_t)n_rows;
        backend_copy_2d(t->backend, t->logits + column, vocab * sizeof(float), part,
                        width * sizeof(float), width * sizeof(float), (size_t)n_rows);
        part += width * (size_t)n_rows;
        column += width;
    }
}

static enum status gather_logits(struct transformer *t, int n_rows, float **logits,
                                 struct error *err) {
    *logits = NULL;
    if (n_rows == 0) return STATUS_OK;
    if (t->shard.degree == 1) {
        *logits = t->shard_logits;
        return STATUS_OK;
    }
    for (int rank = 0; rank < t->shard.degree; rank++) {
        struct shard other;
        TRY(shard_make(&other, &t->config, rank, t->shard.degree, err));
        t->gather_bytes[rank] =
            (size_t)n_rows * (size_t)(other.vocab_end - other.vocab_begin) * sizeof(float);
    }
    int64_t start = clock_now_ns();
    TRY(comm_gather(t->group, t->gathered, t->shard_logits, t->gather_bytes, 0, err));
    t->times.comm_ns += clock_now_ns() - start;
    if (t->shard.rank != 0) return STATUS_OK;
    interleave_shards(t, n_rows);
    *logits = t->logits;
    return STATUS_OK;
}

/* This rank's part of the logits. */
static void compute_head(struct transformer *t, int n_rows) {
    int hidden = t->config.hidden;
    backend_take_rows(t->backend, t->normed, t->residual, n_rows, hidden);
    backend_rmsnorm(t->backend, t->normed, t->normed, t->final_norm, t->config.rms_eps, n_rows,
                    hidden);
    if (t->lm_head != NULL) {
        backend_linear(t->backend, t->shard_logits, t->normed, hidden, t->lm_head, NULL, n_rows);
    }
}

static enum status compute(struct transformer *t, int layer_width, int n_rows, int n_logit_rows,
                           struct error *err) {
    t->normed_layer = -1;
    backend_embed(t->backend, t->residual, t->embedding, n_rows, t->config.hidden);
    TRY(run_layers(t, layer_width, n_rows, err));
    if (n_logit_rows > 0) compute_head(t, n_logit_rows);
    return STATUS_OK;
}

/* The same, from a graph where the backend has recorded one: where all that ranks exchange is enqueued as
 * ops are. */
static enum status replay_or_compute(struct transformer *t, int layer_width, int n_rows,
                                     int n_logit_rows, struct error *err) {
    int slots = layer_width > 1 ? stale_slots(t, layer_width) : 1;
    bool recordable = t->shard.degree == 1 ||
                      (size_t)slots * row_bytes(t, n_rows) <= comm_recordable_bytes(t->group);
    if (!recordable) return compute(t, layer_width, n_rows, n_logit_rows, err);
    uint64_t key = (uint64_t)(uintptr_t)t << 8 | (uint64_t)layer_width;
    if (backend_replay(t->backend, key)) return STATUS_OK;
    backend_record_begin(t->backend, key);
    enum status status = compute(t, layer_width, n_rows, n_logit_rows, err);
    backend_record_end(t->backend);
    return status;
}

enum status transformer_forward(struct transformer *t, const struct transformer_batch *batch,
                                float **logits, struct error *err) {
    CHECK(batch->n_rows > 0 && batch->n_rows <= t->max_rows);
    CHECK(batch->n_logit_rows <= t->max_logit_rows);
    int64_t start = clock_now_ns();
    int64_t comm_before = t->times.comm_ns;

    t->pass = (struct backend_pass){
        .tokens = batch->tokens,
        .n_rows = batch->n_rows,
        .segments = batch->segments,
        .n_segments = batch->n_segments,
        .logit_rows = batch->logit_rows,
        .n_logit_rows = batch->n_logit_rows,
    };
    backend_pass_begin(t->backend, &t->pass);
    int n_rows = backend_padded_rows(t->backend, batch->n_rows);
    int n_logit_rows = backend_padded_rows(t->backend, batch->n_logit_rows);
    TRY(replay_or_compute(t, batch->layer_width, n_rows, n_logit_rows, err));
    TRY(gather_logits(t, n_logit_rows, logits, err));
    if (!batch->runs_on) {
        TRY(comm_complete(t->group, err));
        TRY(backend_wait(t->backend, err));
    }

    int64_t comm_ns = t->times.comm_ns - comm_before;
    t->times.kernels_ns += clock_now_ns() - start - comm_ns;
    return STATUS_OK;
}

bool transformer_kv_read(const struct transformer *t, int layer, const int32_t *blocks,
                         int position, float *k, float *v) {
    if (t->layers[layer].kv == NULL) return false;
    backend_kv_read(t->layers[layer].kv, blocks, position, k, v);
    return true;
}

struct transformer_times transformer_times(const struct transformer *t) {
    return t->times;
}

struct transformer_memory transformer_memory(const struct transformer *t) {
    return t->memory;
}
