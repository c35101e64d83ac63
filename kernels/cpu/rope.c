/* Rotary position embedding, QK norm, and the write to the KV cache. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/kv_cache.h"
#include "kernels/cpu/ops.h"

struct rope_table {
    struct backend_head head;
    int half;        /* head_dim / 2 */
    int n_positions;
    float *cosines;  /* [n_positions][half] */
    float *sines;
};

enum status cpu_rope_create(struct rope_table **out, struct backend *backend,
                                const float *inv_freq, int head_dim, int n_positions,
                                struct error *err) {
    struct rope_table *table = xcalloc(1, sizeof *table);
    table->head = backend->head;
    table->half = head_dim / 2;
    table->n_positions = n_positions;
    size_t n = (size_t)n_positions * (size_t)table->half;
    table->cosines = malloc(n * sizeof(float));
    table->sines = malloc(n * sizeof(float));
    if (table->cosines == NULL || table->sines == NULL) {
        cpu_rope_free(table);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for a rope table of %d positions",
                         n_positions);
    }
    for (int p = 0; p < n_positions; p++) {
        for (int i = 0; i < table->half; i++) {
            float angle = (float)p * inv_freq[i];
            table->cosines[(size_t)p * (size_t)table->half + (size_t)i] = (float)cos((double)angle);
            table->sines[(size_t)p * (size_t)table->half + (size_t)i] = (float)sin((double)angle);
        }
    }
    *out = table;
    return STATUS_OK;
}

void cpu_rope_free(struct rope_table *table) {
    if (table == NULL) return;
    free(table->cosines);
    free(table->sines);
    free(table);
}

static void rotate(float *head, const struct rope_table *table, int position) {
    int half = table->half;
    const float *cosines = table->cosines + (size_t)position * (size_t)half;
    const float *sines = table->sines + (size_t)position * (size_t)half;
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i] + a * sines[i];
    }
}

struct rope_job {
    const struct cpu_ops *ops;
    float *qkv;
    struct kv_cache *cache;
    const struct rope_table *rope;
    const float *q_norm, *k_norm;
    float eps;
    const struct backend_segment *segments;
    int n_segments, n_heads;
};

static void turn_head(const struct rope_job *job, float *head, const float *norm, int position) {
    if (norm != NULL) job->ops->rmsnorm_row(head, head, norm, job->eps, job->cache->head_dim);
    rotate(head, job->rope, position);
}

static void turn_row(const struct rope_job *job, const struct backend_segment *segment, int i) {
    struct kv_cache *cache = job->cache;
    int dim = cache->head_dim, n_kv = cache->n_kv_heads, position = segment->position + i;
    float *row = job->qkv + (size_t)(segment->row + i) * (size_t)((job->n_heads + 2 * n_kv) * dim);
    for (int h = 0; h < job->n_heads; h++) turn_head(job, row + h * dim, job->q_norm, position);
    float *keys = row + job->n_heads * dim, *values = keys + n_kv * dim;
    int32_t block = segment->blocks[position / BACKEND_KV_BLOCK];
    for (int h = 0; h < n_kv; h++) {
        turn_head(job, keys + h * dim, job->k_norm, position);
        kv_cache_write(cache, h, block, position % BACKEND_KV_BLOCK, keys + h * dim,
                       values + h * dim);
    }
}

/* Task r: the r-th row of all segments. */
static void turn_task(void *arg, int task_i) {
    const struct rope_job *job = arg;
    for (int s = 0; s < job->n_segments; s++) {
        if (task_i < job->segments[s].n_rows) {
            turn_row(job, &job->segments[s], task_i);
            return;
        }
        task_i -= job->segments[s].n_rows;
    }
}

void cpu_rope_kv_write(struct backend *backend, float *qkv, struct kv_cache *cache,
                           const struct rope_table *rope, const float *q_norm, const float *k_norm,
                           float eps, int n_heads) {
    const struct backend_segment *segments = backend->pass->segments;
    int n_segments = backend->pass->n_segments;
    struct rope_job job = {backend->ops, qkv, cache,    rope,       q_norm,
                           k_norm,       eps, segments, n_segments, n_heads};
    int n_rows = 0;
    for (int s = 0; s < n_segments; s++) {
        CHECK(segments[s].position + segments[s].n_rows <= rope->n_positions);
        n_rows += segments[s].n_rows;
    }
    if (n_rows >= 16) {
        pool_run(backend, turn_task, &job, n_rows);
        return;
    }
    for (int s = 0; s < n_segments; s++) {
        for (int i = 0; i < segments[s].n_rows; i++) turn_row(&job, &segments[s], i);
    }
}
