/* Transformers straight over a group of threads, without an engine: every rank of one model in this
 * process, in either layout, driven one pass at a time. */
#pragma once
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "model/footprint.h"
#include "worker/transformer.h"

enum { RANK_GROUP_MAX = 8, RANK_GROUP_BLOCKS = 12, RANK_GROUP_ROWS = 64 };

struct rank_group_options {
    const char *dir;
    int degree;
    bool layer_owner;
    int max_layer_width;
    enum dtype weights;
    enum backend_isa isa;
    struct comm *const *comms; /* [degree], which the group takes over; NULL: of threads */
};

struct rank_group {
    struct rank_group_options options;
    struct checkpoint *checkpoint;
    const struct model_config *config;
    struct comm *comms[RANK_GROUP_MAX];
    struct backend *backends[RANK_GROUP_MAX];
    struct transformer *ranks[RANK_GROUP_MAX];
};

static inline enum status rank_group_create_rank(struct rank_group *g, int i, struct error *err) {
    struct backend_options backend = {.isa = g->options.isa, .n_threads = 1,
                                      .max_rows = RANK_GROUP_ROWS,
                                      .max_width = model_config_max_width(g->config)};
    TRY(backend_create(&g->backends[i], &backend, err));
    struct transformer_options options = {
        .checkpoint = g->checkpoint,
        .backend = g->backends[i],
        .group = g->comms[i],
        .weights = g->options.weights,
        .n_blocks = RANK_GROUP_BLOCKS,
        .max_rows = RANK_GROUP_ROWS,
        .max_logit_rows = RANK_GROUP_ROWS,
        .max_context = RANK_GROUP_BLOCKS * BACKEND_KV_BLOCK,
        .layer_owner = g->options.layer_owner,
        .max_layer_width = g->options.max_layer_width,
    };
    return transformer_create(&g->ranks[i], &options, err);
}

static inline void rank_group_destroy(struct rank_group *g) {
    for (int i = 0; i < g->options.degree; i++) {
        transformer_destroy(g->ranks[i]);
        if (g->backends[i] != NULL) backend_destroy(g->backends[i]);
        if (g->comms[i] != NULL) comm_destroy(g->comms[i]);
    }
    if (g->checkpoint != NULL) checkpoint_close(g->checkpoint);
    memset(g, 0, sizeof *g);
}

/* On failure nothing stays. */
static inline enum status rank_group_create(struct rank_group *g,
                                            const struct rank_group_options *options,
                                            struct error *err) {
    *g = (struct rank_group){.options = *options};
    for (int i = 0; i < options->degree && options->comms != NULL; i++) {
        g->comms[i] = options->comms[i];
    }
    enum status status = checkpoint_open(&g->checkpoint, options->dir, err);
    if (status == STATUS_OK) {
        g->config = checkpoint_config(g->checkpoint);
        if (options->comms == NULL) status = comm_threads_create(g->comms, options->degree, err);
    }
    for (int i = 0; i < options->degree && status == STATUS_OK; i++) {
        status = rank_group_create_rank(g, i, err);
    }
    if (status != STATUS_OK) rank_group_destroy(g);
    return status;
}

struct rank_group_pass {
    struct rank_group *group;
    int rank;
    const struct transformer_batch *batch;
    float *logits;
    enum status status;
    struct error err;
};

static inline void *rank_group_run(void *user) {
    struct rank_group_pass *pass = user;
    struct rank_group *g = pass->group;
    int rank = pass->rank;
    pass->status = transformer_forward(g->ranks[rank], pass->batch, &pass->logits, &pass->err);
    if (pass->status != STATUS_OK) comm_abort(g->comms[rank], "a rank failed");
    return NULL;
}

/* One pass on all ranks at once. *logits: rank 0's, valid until the next pass. */
static inline enum status rank_group_forward(struct rank_group *g,
                                             const struct transformer_batch *batch, float **logits,
                                             struct error *err) {
    struct rank_group_pass passes[RANK_GROUP_MAX] = {{0}};
    pthread_t threads[RANK_GROUP_MAX];
    int degree = g->options.degree;
    for (int i = degree - 1; i >= 0; i--) {
        passes[i] = (struct rank_group_pass){.group = g, .rank = i, .batch = batch};
        if (i == 0) rank_group_run(&passes[0]);
        else if (pthread_create(&threads[i], NULL, rank_group_run, &passes[i]) != 0) abort();
    }
    for (int i = 1; i < degree; i++) pthread_join(threads[i], NULL);
    *logits = passes[0].logits;
    for (int i = 0; i < degree; i++) {
        if (passes[i].status == STATUS_OK) continue;
        *err = passes[i].err;
        return passes[i].status;
    }
    return STATUS_OK;
}

/* tokens[0..n) at positions first.. of the one sequence, which has all blocks, in one pass. Copies
 * the logits of every row to out [n, vocab] where not NULL. */
static inline enum status rank_group_feed(struct rank_group *g, float *out, const int32_t *tokens,
                                          int n, int first, int layer_width, struct error *err) {
    int32_t blocks[RANK_GROUP_BLOCKS], rows[RANK_GROUP_ROWS];
    for (int i = 0; i < RANK_GROUP_BLOCKS; i++) blocks[i] = RANK_GROUP_BLOCKS - 1 - i;
    for (int i = 0; i < n; i++) rows[i] = i;
    struct backend_segment segment = {0, n, first, blocks};
    struct transformer_batch batch = {tokens, n, &segment, 1, rows, n, layer_width, false};
    float *logits;
    TRY(rank_group_forward(g, &batch, &logits, err));
    if (out != NULL) memcpy(out, logits, (size_t)(n * g->config->vocab) * sizeof *out);
    return STATUS_OK;
}

/* KV of all heads of one position of that sequence, whoever holds it: k and v are
 * [n_kv_heads * head_dim]. Ranks that share a head must agree on it. */
static inline bool rank_group_kv(const struct rank_group *g, int layer, int position, float *k,
                                 float *v) {
    enum { MAX_WIDTH = 4096 };
    static float k_part[MAX_WIDTH], v_part[MAX_WIDTH]; /* tests are one thread at a time */
    int32_t blocks[RANK_GROUP_BLOCKS];
    bool covered[MAX_WIDTH] = {false};
    int n_covered = 0, width = g->config->n_kv_heads * g->config->head_dim;
    for (int i = 0; i < RANK_GROUP_BLOCKS; i++) blocks[i] = RANK_GROUP_BLOCKS - 1 - i;
    for (int rank = 0; rank < g->options.degree; rank++) {
        struct shard shard;
        struct error err;
        bool whole = g->options.layer_owner;
        if (!transformer_kv_read(g->ranks[rank], layer, blocks, position, k_part, v_part)) continue;
        CHECK(shard_make(&shard, g->config, whole ? 0 : rank, whole ? 1 : g->options.degree,
                         &err) == STATUS_OK);
        int begin = shard.kv_head_begin * g->config->head_dim;
        int end = shard.kv_head_end * g->config->head_dim;
        for (int i = begin; i < end; i++) {
            float k_here = k_part[i - begin], v_here = v_part[i - begin];
            if (covered[i] && memcmp(&k[i], &k_here, sizeof k_here) != 0) return false;
            if (covered[i] && memcmp(&v[i], &v_here, sizeof v_here) != 0) return false;
            k[i] = k_here;
            v[i] = v_here;
            n_covered += !covered[i];
            covered[i] = true;
        }
    }
    return n_covered == width;
}
