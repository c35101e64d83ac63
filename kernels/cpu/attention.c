/* Attention: cuts the batch into tasks of one KV head and some rows of one segment. */
#include "kernels/cpu/kv_cache.h"
#include "kernels/cpu/ops.h"

enum { ROWS_PER_TASK = 32 };

struct attention_job {
    struct backend *backend;
    float *out;
    const float *q;
    int q_stride;
    const struct kv_cache *cache;
    const int *kv_of_head;
    const struct backend_segment *segments;
    int n_segments, n_heads, window;
};

static int row_parts(const struct backend_segment *segment) {
    return (segment->n_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
}

/* KV head `head` for rows of part `part` of the segment. Query heads of one KV head are neighbours. */
static void run_part(const struct attention_job *job, const struct backend_segment *segment,
                     int part, int head) {
    int query_head[256], group = 0;
    for (int h = 0; h < job->n_heads; h++) {
        if (job->kv_of_head[h] == head) query_head[group++] = h;
    }
    if (group == 0) return;
    int first = part * ROWS_PER_TASK, left = segment->n_rows - first;
    struct attention_task task = {
        .out = job->out,
        .q = job->q,
        .q_stride = job->q_stride,
        .out_stride = job->n_heads * job->cache->head_dim,
        .query_head = query_head,
        .group = group,
        .first_row = segment->row + first,
        .n_rows = left < ROWS_PER_TASK ? left : ROWS_PER_TASK,
        .first_position = segment->position + first,
        .blocks = segment->blocks,
        .k = kv_cache_keys(job->cache, head),
        .v = kv_cache_values(job->cache, head),
        .block_stride = job->cache->block_stride,
        .head_dim = job->cache->head_dim,
        .window = job->window,
    };
    job->backend->ops->attention(&task);
}

static void attention_task_run(void *arg, int task_i) {
    const struct attention_job *job = arg;
    int n_kv = job->cache->n_kv_heads;
    int head = task_i % n_kv, part = task_i / n_kv;
    for (int s = 0; s < job->n_segments; s++) {
        int parts = row_parts(&job->segments[s]);
        if (part < parts) {
            run_part(job, &job->segments[s], part, head);
            return;
        }
        part -= parts;
    }
}

void cpu_attention(struct backend *backend, float *out, const float *q, int q_stride,
                       const struct kv_cache *cache, const int *kv_of_head, int n_heads,
                       int window) {
    const struct backend_segment *segments = backend->pass->segments;
    int n_segments = backend->pass->n_segments;
    CHECK(n_heads <= 256 && cache->head_dim <= 256);
    struct attention_job job = {backend,    out,      q,          q_stride, cache,
                                kv_of_head, segments, n_segments, n_heads,  window};
    int n_parts = 0;
    for (int s = 0; s < n_segments; s++) n_parts += row_parts(&segments[s]);
    pool_run(backend, attention_task_run, &job, n_parts * cache->n_kv_heads);
}
