/* Inside the CPU backend: what its files share. Private to kernels/cpu/.
 *
 * Ops that need more than portable C have one file per instruction set, with its name as suffix
 * (linear_avx512.c) and compiled for it; the op's own file picks one by backend->isa. */
#pragma once
#include "kernels/backend_ops.h"

struct pool;
struct cpu_ops;

struct backend {
    struct backend_head head;
    struct backend_options options;
    enum backend_isa isa; /* never AUTO */
    struct pool *pool;    /* NULL with one thread */
    const struct cpu_ops *ops;
    void *packed;         /* activations of one product, packed; grows to its high-water mark */
    size_t packed_bytes;
    float *sample_scratch; /* [sample_vocab], as is the next */
    int32_t *sample_order;
    int sample_vocab;      /* the largest vocabulary seen */
    const struct backend_pass *pass;
    struct sample_result *drawn; /* [drawn_capacity] of the batch begun last */
    int n_drawn, drawn_capacity;
    int32_t fed[BACKEND_FED_BATCHES][BACKEND_MAX_FED]; /* a ring over batches */
    int64_t n_batches;
};

/* Runs task(arg, i) for i in 0..n_tasks-1 on all threads and returns when all are done. Tasks must
 * not depend on one another or on which thread runs them. */
void pool_run(struct backend *backend, void (*task)(void *arg, int task_i), void *arg, int n_tasks);
enum status pool_create(struct pool **out, int n_threads, struct error *err);
void pool_destroy(struct pool *pool);

/* At least `bytes` of the backend's packing buffer, aligned to 64. */
void *backend_packed(struct backend *backend, size_t bytes);

/* --- products -------------------------------------------------------------------------------- */

enum { PANEL_ROWS = 16, PANEL_STEP = 64 /* bytes of a step, lanes layout */ };

/* A packed weight: panels of 16 output rows, each panel one sequential stream over the leaves and,
 * inside a leaf, over k. Rows past n and columns past a leaf's end are zero.
 *   lanes layout (portable, avx2, avx512): [k / group][16 rows][group], group = 2 bf16 or 4 int8:
 *     64 bytes that a broadcast group of activations multiplies, rows in lanes, no horizontal sum.
 *     avx512: two neighbouring panels lie interleaved, step by step, so that a block of two panels (which
 *     halves the broadcasts) is one sequential stream as well.
 *   tile layout (amx): [k / 32 or 64][16 rows][32 bf16 or 64 int8], one 1 KiB tile after the other,
 *     weights in the tile's rows. */
struct weight {
    struct backend_head head;
    enum dtype format; /* BF16 or I8 */
    bool tiles;
    int n, k, n_panels;
    int n_leaves;
    int leaf_begin[BACKEND_MAX_LEAVES + 1];  /* in columns of the product */
    int leaf_steps[BACKEND_MAX_LEAVES + 1];  /* where the leaf begins, in steps of a panel */
    size_t panel_bytes;
    int interleave;  /* panels that lie interleaved: 2 for avx512, else 1 */
    char *data;      /* n_panels (made even for 2) * panel_bytes, in huge pages where there are any */
    float *scales;   /* int8: [n_panels][n_leaves][16] */
    int32_t *sums;   /* int8, lanes: [n_panels][n_leaves][16], 128 * sum of the row's weights */
    size_t bytes;    /* all of the above */
    size_t mapped;
};

/* Lanes layout: where a step of a panel stands; the panel's next step is interleave * 64 bytes on. */
static inline char *weight_step(const struct weight *w, int panel_i, int step) {
    size_t pair = (size_t)(panel_i / w->interleave) * (size_t)w->interleave;
    size_t in_pair = (size_t)(panel_i % w->interleave) + (size_t)step * (size_t)w->interleave;
    return w->data + pair * w->panel_bytes + in_pair * PANEL_STEP;
}

/* Columns in one step of a panel. */
static inline int weight_group(enum dtype format, bool tiles) {
    if (tiles) return format == DTYPE_I8 ? 64 : 32;
    return format == DTYPE_I8 ? 4 : 2;
}

enum { TILE_COLUMNS = 16, TILE_BYTES = 1024 };

/* Activations as a kernel wants them, made once per product by linear.c.
 *   lanes: rows of groups, row_bytes apart; int8 with 128 added (the product wants unsigned bytes)
 *   tiles: blocks of 16 rows, each [steps][16 groups][16 rows] of 4 bytes: one 1 KiB tile a step, with
 *     the rows in its columns */
struct packed_rows {
    const void *data;
    const float *scales; /* int8: [n_rows][n_leaves] */
    int n_rows;
    size_t row_bytes;
};

/* Results of panels [panel_begin, panel_end) for all rows: out[row * out_stride + output], the tree
 * over the weight's leaves, + bias where not NULL. */
typedef void (*linear_kernel_fn)(float *out, size_t out_stride, const struct weight *weight,
                                 const struct packed_rows *rows, const float *bias,
                                 int panel_begin, int panel_end);

void linear_bf16_portable(float *, size_t, const struct weight *, const struct packed_rows *,
                          const float *, int, int);
void linear_i8_portable(float *, size_t, const struct weight *, const struct packed_rows *,
                        const float *, int, int);
void linear_bf16_avx2(float *, size_t, const struct weight *, const struct packed_rows *,
                      const float *, int, int);
void linear_i8_avx2(float *, size_t, const struct weight *, const struct packed_rows *,
                    const float *, int, int);
void linear_bf16_avx512(float *, size_t, const struct weight *, const struct packed_rows *,
                        const float *, int, int);
void linear_i8_avx512(float *, size_t, const struct weight *, const struct packed_rows *,
                      const float *, int, int);
void linear_bf16_amx(float *, size_t, const struct weight *, const struct packed_rows *,
                     const float *, int, int);
void linear_i8_amx(float *, size_t, const struct weight *, const struct packed_rows *,
                   const float *, int, int);

/* --- the ops, for the table in backend.c: contracts as their namesakes' in kernels/backend.h -------- */

enum status cpu_weight_create(struct weight **out, struct backend *backend,
                              const struct weight_source *sources, int n_sources, int k,
                              const int *leaf_begin, int n_leaves, enum dtype format,
                              struct error *err);
void cpu_weight_free(struct weight *weight);
size_t cpu_weight_bytes(const struct weight *weight);
enum status cpu_table_create(struct table **out, struct backend *backend,
                             const struct weight_source *source, int width, struct error *err);
void cpu_table_free(struct table *table);
size_t cpu_table_bytes(const struct table *table);
enum status cpu_kv_create(struct kv_cache **out, struct backend *backend, int n_blocks,
                          int n_kv_heads, int head_dim, struct error *err);
void cpu_kv_free(struct kv_cache *cache);
void cpu_kv_read(const struct kv_cache *cache, const int32_t *blocks, int position, float *k,
                 float *v);
enum status cpu_rope_create(struct rope_table **out, struct backend *backend, const float *inv_freq,
                            int head_dim, int n_positions, struct error *err);
void cpu_rope_free(struct rope_table *table);

void cpu_embed(struct backend *backend, float *out, const struct table *table, int n_rows,
               int width);
void cpu_take_rows(struct backend *backend, float *out, const float *in, int n_rows, int width);
void cpu_rmsnorm(struct backend *backend, float *out, const float *in, const float *weight,
                 float eps, int n_rows, int width);
void cpu_linear(struct backend *backend, float *out, const float *in, int in_stride,
                const struct weight *weight, const float *bias, int n_rows);
void cpu_linear_tree(struct backend *backend, float *out, const float *in,
                     const struct weight *weight, int n_rows);
void cpu_tree_sum(struct backend *backend, float *residual, const float *roots, int n_roots,
                  const float *bias, int n_rows, int width);
void cpu_tree_sum_norm(struct backend *backend, float *residual, float *normed, const float *roots,
                       int n_roots, const float *bias, const float *weight, float eps, int n_rows,
                       int width);
void cpu_swiglu(struct backend *backend, float *out, const float *gate_up, int n_rows, int width);
void cpu_rope_kv_write(struct backend *backend, float *qkv, struct kv_cache *cache,
                       const struct rope_table *rope, const float *q_norm, const float *k_norm,
                       float eps, int n_heads);
void cpu_attention(struct backend *backend, float *out, const float *q, int q_stride,
                   const struct kv_cache *cache, const int *kv_of_head, int n_heads, int window);

void cpu_sample_begin(struct backend *backend, float *logits, int stride, int vocab,
                      const struct sample_draw *draws, int n);
enum status cpu_sample_end(struct backend *backend, struct sample_result *results,
                           struct error *err);
enum status cpu_fed_tokens(struct backend *backend, int32_t *tokens, int n_batches,
                           struct error *err);
enum status cpu_logprobs(struct backend *backend, struct sample_result *out, const float *logits,
                         int vocab, int n_top, int32_t token, struct error *err);
enum status cpu_distribution(struct backend *backend, float *out, const float *logits, int vocab,
                             const struct sample_draw *draw, struct error *err);
