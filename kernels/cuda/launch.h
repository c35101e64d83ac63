/* The launchers of kernels/cuda/ *.cu, as the host code of the backend calls them. All enqueue and
 * return; all pointers are the device's unless said otherwise. Row-major f32 activations. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kernels/cuda/layout.h"

#ifdef __cplusplus
extern "C" {
#endif

enum product_format { PRODUCT_BF16, PRODUCT_I8, PRODUCT_F8 };

/* --- product.cu, product_tiles.cu ------------------------------------------------------------ */

struct product {
    enum product_format format;
    const void *weights;   /* layout.h */
    const float *w_scales; /* int8, fp8: [n_leaves][n_padded] */
    const void *rows;      /* packed */
    const float *x_scales; /* int8: [n_rows][n_leaves] */
    const float *bias;     /* NULL: none; only with one leaf */
    float *out;            /* [n_rows, n] */
    float *partial;        /* [n_leaves][n_rows][n], more than one leaf */
    unsigned *counters;    /* [panel groups * row groups] zeros, left as zeros; more than one leaf */
    int n, n_padded;       /* outputs; rounded up to panels */
    int n_rows;
    struct leaf_units leaves;
};
/* At most this many rows a launch with leaves, for the size of `partial` and `counters`. */
enum { PRODUCT_MAX_ROWS = 256 };
void launch_product(struct cuda_queue queue, const struct product *product, int n_processors);
/* The same bits, faster from PRODUCT_TILED_ROWS rows on (product_tiles.cu); launch_product calls it. */
enum { PRODUCT_TILED_ROWS = 65 };
void launch_product_tiles(struct cuda_queue queue, const struct product *product, int n_processors);

/* Rows to packed bf16, or int8 with scales[n_rows][n_leaves]. `in` rows are in_stride apart. */
void launch_pack_bf16(struct cuda_queue queue, void *packed, const float *in, int in_stride,
                      int n_rows, struct leaf_units leaves);
void launch_pack_i8(struct cuda_queue queue, void *packed, float *scales, const float *in,
                    int in_stride, int n_rows, struct leaf_units leaves);

/* --- pack_weight.cu --------------------------------------------------------------------------- */

enum source_type { SOURCE_F32, SOURCE_F16, SOURCE_BF16 };
/* Rows of a raw [n_rows, k] matrix to outputs first .. first + n_rows - 1, counted from the first output
 * of the panel at `weights`; scales[n_leaves][n_padded] likewise. */
void launch_pack_weight(struct cuda_queue queue, enum product_format format, void *weights,
                        float *scales, int n_padded, const void *raw, enum source_type type,
                        int first, int n_rows, int k, struct leaf_units leaves);

/* --- elementwise.cu --------------------------------------------------------------------------- */

/* `packed` (NULL: none) gets the result as bf16 rows too, in units of 32 without leaves. */
void launch_rmsnorm(struct cuda_queue queue, float *out, void *packed, const float *in,
                    const float *weight, float eps, int n_rows, int width);
void launch_tree_sum(struct cuda_queue queue, float *residual, float *normed, void *packed,
                     const float *roots, int n_roots, size_t root_stride, const float *bias,
                     const float *weight, float eps, int n_rows, int width); /* normed NULL: no norm */
void launch_swiglu(struct cuda_queue queue, float *out, void *packed, const float *gate_up,
                   int n_rows, int width);
void launch_embed(struct cuda_queue queue, float *out, const void *table, enum source_type type,
                  const int32_t *tokens, const int32_t *fed, int n_rows, int width);
void launch_take_rows(struct cuda_queue queue, float *out, const float *in, const int32_t *rows,
                      int n_rows, int width);

/* --- attention.cu ------------------------------------------------------------------------------ */

/* Where a row of the pass stands; position -1: a padding row. */
struct row_place {
    int32_t position;
    int32_t first_row, end_row; /* of its segment */
    int32_t blocks;             /* its segment's block table begins here in `tables` */
};

struct kv_layout {
    uint16_t *keys, *values; /* layout.h */
    int n_kv_heads, head_dim, padded;
};

struct rope_launch {
    float *qkv; /* [n_rows, (n_heads + 2 n_kv_heads) * head_dim] */
    struct kv_layout kv;
    const float *cosines, *sines; /* [position][head_dim / 2] */
    const float *q_norm, *k_norm; /* NULL: none */
    float eps;
    const struct row_place *places;
    const int32_t *tables;
    int n_rows, n_heads;
};
void launch_rope_kv_write(struct cuda_queue queue, const struct rope_launch *rope);

enum { ATTENTION_MAX_KV_HEADS = 256 };
struct attention_launch {
    float *out; /* [n_rows, n_heads * head_dim] */
    void *packed; /* NULL: none; as for launch_rmsnorm */
    const float *q;
    int q_stride;
    struct kv_layout kv;
    const struct row_place *places;
    const int32_t *tables;
    float *partial; /* [n_rows][n_heads][n_slots][padded + 2]; with n_slots > 0 */
    int n_slots;    /* pieces side by side, then combined; 0: each tile walks its pieces itself */
    int n_rows, n_heads, window;
    uint16_t first_head[ATTENTION_MAX_KV_HEADS + 1]; /* query heads of a KV head are neighbours */
};
void launch_attention(struct cuda_queue queue, const struct attention_launch *attention);

#ifdef __cplusplus
}
#endif
