/* Ops that are one text for all instruction sets: ops_body.h and attention_body.h, compiled once for
 * each (ops_portable.c, ops_avx2.c, ops_avx512.c) into a table. A backend takes one at its creation. */
#pragma once
#include "kernels/cpu/cpu.h"

/* One head of one segment's attention, for some of its query rows. */
struct attention_task {
    float *out;              /* [n_queries] rows of head_dim, out_stride apart: see query order */
    const float *q;
    int q_stride, out_stride;
    const int *query_head;   /* [group] local query heads that read this KV head */
    int group;
    int first_row, n_rows;   /* rows of the batch; queries are rows x group, heads innermost */
    int first_position;      /* of first_row */
    const int32_t *blocks;
    const uint16_t *k, *v;   /* of this KV head: base of block 0 */
    size_t block_stride;     /* elements between blocks */
    int head_dim;
    int window;
};

struct cpu_ops {
    void (*rmsnorm_row)(float *out, const float *in, const float *weight, float eps, int width);
    void (*swiglu_row)(float *out, const float *gate, const float *up, int width);
    void (*tree_sum)(float *residual, const float *roots, size_t root_stride, int n_roots,
                     const float *bias, int width);
    void (*attention)(const struct attention_task *task);
    float (*row_max)(const float *row, int width); /* NaN counts as minus infinity */
};

extern const struct cpu_ops cpu_ops_portable, cpu_ops_avx2, cpu_ops_avx512;
