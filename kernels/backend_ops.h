/* What a backend gives: the table behind backend.h, whose functions find it at the head of every
 * object they take. Private to kernels/. */
#pragma once
#include "kernels/backend.h"

/* The first member of every struct backend, weight, table, kv_cache, rope_table and inbox. */
struct backend_head {
    const struct backend_ops *ops;
};

struct backend_ops {
    void (*destroy)(struct backend *);
    const char *(*isa_name)(const struct backend *);
    enum backend_isa (*isa)(const struct backend *);

    void *(*alloc)(struct backend *, size_t);
    void (*free)(struct backend *, void *);
    void (*copy_in)(struct backend *, void *, const void *, size_t);
    enum status (*copy_out)(struct backend *, void *, const void *, size_t, struct error *);
    void (*copy)(struct backend *, void *, const void *, size_t);
    void (*zero)(struct backend *, void *, size_t);
    void (*copy_2d)(struct backend *, void *, size_t pitch, const void *, size_t from_pitch,
                    size_t width, size_t height);
    enum status (*wait)(struct backend *, struct error *);
    void *(*stream)(struct backend *);

    enum status (*weight_create)(struct weight **, struct backend *, const struct weight_source *,
                                 int n_sources, int k, const int *leaf_begin, int n_leaves,
                                 enum dtype format, struct error *);
    void (*weight_free)(struct weight *);
    size_t (*weight_bytes)(const struct weight *);
    enum status (*table_create)(struct table **, struct backend *, const struct weight_source *,
                                int width, struct error *);
    void (*table_free)(struct table *);
    size_t (*table_bytes)(const struct table *);
    enum status (*kv_create)(struct kv_cache **, struct backend *, int n_blocks, int n_kv_heads,
                             int head_dim, struct error *);
    void (*kv_free)(struct kv_cache *);
    void (*kv_read)(const struct kv_cache *, const int32_t *blocks, int position, float *k, float *v);
    enum status (*rope_create)(struct rope_table **, struct backend *, const float *inv_freq,
                               int head_dim, int n_positions, struct error *);
    void (*rope_free)(struct rope_table *);

    void (*pass_begin)(struct backend *, const struct backend_pass *);
    int (*padded_rows)(const struct backend *, int n_rows);
    bool (*replay)(struct backend *, uint64_t key);
    void (*record_begin)(struct backend *, uint64_t key);
    void (*record_end)(struct backend *);

    void (*embed)(struct backend *, float *out, const struct table *, int n_rows, int width);
    void (*take_rows)(struct backend *, float *out, const float *in, int n_rows, int width);
    void (*rmsnorm)(struct backend *, float *out, const float *in, const float *weight, float eps,
                    int n_rows, int width);
    void (*linear)(struct backend *, float *out, const float *in, int in_stride,
                   const struct weight *, const float *bias, int n_rows);
    void (*linear_tree)(struct backend *, float *out, const float *in, const struct weight *,
                        int n_rows);
    void (*tree_sum)(struct backend *, float *residual, const float *roots, int n_roots,
                     const float *bias, int n_rows, int width);
    void (*tree_sum_norm)(struct backend *, float *residual, float *normed, const float *roots,
                          int n_roots, const float *bias, const float *weight, float eps, int n_rows,
                          int width);
    void (*swiglu)(struct backend *, float *out, const float *gate_up, int n_rows, int width);
    void (*rope_kv_write)(struct backend *, float *qkv, struct kv_cache *, const struct rope_table *,
                          const float *q_norm, const float *k_norm, float eps, int n_heads);
    void (*attention)(struct backend *, float *out, const float *q, int q_stride,
                      const struct kv_cache *, const int *kv_of_head, int n_heads, int window);

    bool (*reaches)(struct backend *, int device);
    enum status (*inbox_create)(struct inbox **, struct backend *, int rank, int size,
                                size_t max_bytes, struct error *);
    void (*inbox_free)(struct inbox *);
    void *(*inbox_memory)(const struct inbox *);
    void (*inbox_connect)(struct inbox *, void *const *memories);
    void (*inbox_gather)(struct inbox *, void *recv, const void *send, size_t bytes);
    enum status (*inbox_check)(struct inbox *, struct error *);

    enum status (*sample_reserve)(struct backend *, int n_rows, int vocab, struct error *);
    void (*sample_begin)(struct backend *, float *logits, int stride, int vocab,
                         const struct sample_draw *, int n);
    enum status (*sample_end)(struct backend *, struct sample_result *, struct error *);
    enum status (*fed_tokens)(struct backend *, int32_t *tokens, int n_batches, struct error *);
    enum status (*logprobs)(struct backend *, struct sample_result *, const float *logits, int vocab,
                            int n_top, int32_t token, struct error *);
    enum status (*distribution)(struct backend *, float *out, const float *logits, int vocab,
                                const struct sample_draw *, struct error *);
};

/* --- makers ---------------------------------------------------------------------------------- */

enum status cpu_backend_create(struct backend **out, const struct backend_options *options,
                               struct error *err);
bool cpu_isa_available(enum backend_isa isa);

/* What a module (tandem-cuda.so, tandem-cuda-emulated.so) exports under BACKEND_MODULE_SYMBOL. A module
 * that was built from other sources than the program is refused by its version. */
#define BACKEND_MODULE_SYMBOL "tandem_backend_module"
enum { BACKEND_MODULE_VERSION = 1 };
struct backend_module {
    int version;
    size_t ops_bytes; /* sizeof(struct backend_ops) */
    enum status (*probe)(struct backend_device *out, int device, struct error *err);
    enum status (*create)(struct backend **out, const struct backend_options *options,
                          struct error *err);
};
