/* backend.h's functions: each finds the table of its object's backend. */
#include "kernels/backend_ops.h"

static const struct backend_ops *ops_of(const void *object) {
    return ((const struct backend_head *)object)->ops;
}

void backend_destroy(struct backend *backend) {
    if (backend != NULL) ops_of(backend)->destroy(backend);
}

void backend_weight_free(struct weight *weight) {
    if (weight != NULL) ops_of(weight)->weight_free(weight);
}

void backend_table_free(struct table *table) {
    if (table != NULL) ops_of(table)->table_free(table);
}

void backend_kv_free(struct kv_cache *cache) {
    if (cache != NULL) ops_of(cache)->kv_free(cache);
}

void backend_rope_free(struct rope_table *table) {
    if (table != NULL) ops_of(table)->rope_free(table);
}

size_t backend_kv_block_bytes(int n_kv_heads, int head_dim) {
    size_t elements = (size_t)BACKEND_KV_BLOCK * (size_t)((head_dim + 31) / 32 * 32);
    return (size_t)n_kv_heads * 2 * elements * sizeof(uint16_t);
}

void backend_kv_read(const struct kv_cache *cache, const int32_t *blocks, int position, float *k,
                     float *v) {
    ops_of(cache)->kv_read(cache, blocks, position, k, v);
}

void backend_free(struct backend *backend, void *memory) {
    ops_of(backend)->free(backend, memory);
}

void backend_copy_in(struct backend *backend, void *memory, const void *host, size_t bytes) {
    ops_of(backend)->copy_in(backend, memory, host, bytes);
}

enum status backend_copy_out(struct backend *backend, void *host, const void *memory, size_t bytes,
                             struct error *err) {
    return ops_of(backend)->copy_out(backend, host, memory, bytes, err);
}

void backend_copy(struct backend *backend, void *memory, const void *from_memory, size_t bytes) {
    ops_of(backend)->copy(backend, memory, from_memory, bytes);
}

void backend_zero(struct backend *backend, void *memory, size_t bytes) {
    ops_of(backend)->zero(backend, memory, bytes);
}

void backend_copy_2d(struct backend *backend, void *memory, size_t pitch, const void *from_memory,
                     size_t from_pitch, size_t width, size_t height) {
    ops_of(backend)->copy_2d(backend, memory, pitch, from_memory, from_pitch, width, height);
}

enum status backend_wait(struct backend *backend, struct error *err) {
    return ops_of(backend)->wait(backend, err);
}

void *backend_stream(struct backend *backend) {
    return ops_of(backend)->stream(backend);
}

const char *backend_isa_name(const struct backend *backend) {
    return ops_of(backend)->isa_name(backend);
}

enum backend_isa backend_isa(const struct backend *backend) {
    return ops_of(backend)->isa(backend);
}

void *backend_alloc(struct backend *backend, size_t bytes) {
    return ops_of(backend)->alloc(backend, bytes);
}

enum status backend_weight_create(struct weight **out, struct backend *backend,
                                  const struct weight_source *sources, int n_sources, int k,
                                  const int *leaf_begin, int n_leaves, enum dtype format,
                                  struct error *err) {
    return ops_of(backend)->weight_create(out, backend, sources, n_sources, k, leaf_begin, n_leaves,
                                          format, err);
}

size_t backend_weight_bytes(const struct weight *weight) {
    return ops_of(weight)->weight_bytes(weight);
}

enum status backend_table_create(struct table **out, struct backend *backend,
                                 const struct weight_source *source, int width, struct error *err) {
    return ops_of(backend)->table_create(out, backend, source, width, err);
}

size_t backend_table_bytes(const struct table *table) {
    return ops_of(table)->table_bytes(table);
}

void backend_pass_begin(struct backend *backend, const struct backend_pass *pass) {
    ops_of(backend)->pass_begin(backend, pass);
}

int backend_padded_rows(const struct backend *backend, int n_rows) {
    return ops_of(backend)->padded_rows(backend, n_rows);
}

bool backend_replay(struct backend *backend, uint64_t key) {
    return ops_of(backend)->replay(backend, key);
}

void backend_record_begin(struct backend *backend, uint64_t key) {
    ops_of(backend)->record_begin(backend, key);
}

void backend_record_end(struct backend *backend) {
    ops_of(backend)->record_end(backend);
}

void backend_embed(struct backend *backend, float *out, const struct table *table, int n_rows,
                   int width) {
    ops_of(backend)->embed(backend, out, table, n_rows, width);
}

void backend_take_rows(struct backend *backend, float *out, const float *in, int n_rows, int width) {
    ops_of(backend)->take_rows(backend, out, in, n_rows, width);
}

void backend_rmsnorm(struct backend *backend, float *out, const float *in, const float *weight,
                     float eps, int n_rows, int width) {
    ops_of(backend)->rmsnorm(backend, out, in, weight, eps, n_rows, width);
}

void backend_linear(struct backend *backend, float *out, const float *in, int in_stride,
                    const struct weight *weight, const float *bias, int n_rows) {
    ops_of(backend)->linear(backend, out, in, in_stride, weight, bias, n_rows);
}

void backend_linear_tree(struct backend *backend, float *out, const float *in,
                         const struct weight *weight, int n_rows) {
    ops_of(backend)->linear_tree(backend, out, in, weight, n_rows);
}

void backend_tree_sum(struct backend *backend, float *residual, const float *roots, int n_roots,
                      const float *bias, int n_rows, int width) {
    ops_of(backend)->tree_sum(backend, residual, roots, n_roots, bias, n_rows, width);
}

void backend_tree_sum_norm(struct backend *backend, float *residual, float *normed,
                           const float *roots, int n_roots, const float *bias, const float *weight,
                           float eps, int n_rows, int width) {
    ops_of(backend)->tree_sum_norm(backend, residual, normed, roots, n_roots, bias, weight, eps, n_rows,
                                   width);
}

void backend_swiglu(struct backend *backend, float *out, const float *gate_up, int n_rows,
                    int width) {
    ops_of(backend)->swiglu(backend, out, gate_up, n_rows, width);
}

enum status backend_kv_create(struct kv_cache **out, struct backend *backend, int n_blocks,
                              int n_kv_heads, int head_dim, struct error *err) {
    return ops_of(backend)->kv_create(out, backend, n_blocks, n_kv_heads, head_dim, err);
}

enum status backend_rope_create(struct rope_table **out, struct backend *backend,
                                const float *inv_freq, int head_dim, int n_positions,
                                struct error *err) {
    return ops_of(backend)->rope_create(out, backend, inv_freq, head_dim, n_positions, err);
}

void backend_rope_kv_write(struct backend *backend, float *qkv, struct kv_cache *cache,
                           const struct rope_table *rope, const float *q_norm, const float *k_norm,
                           float eps, int n_heads) {
    ops_of(backend)->rope_kv_write(backend, qkv, cache, rope, q_norm, k_norm, eps, n_heads);
}

void backend_attention(struct backend *backend, float *out, const float *q, int q_stride,
                       const struct kv_cache *cache, const int *kv_of_head, int n_heads,
                       int window) {
    ops_of(backend)->attention(backend, out, q, q_stride, cache, kv_of_head, n_heads, window);
}

bool backend_reaches(struct backend *backend, int device) {
    return ops_of(backend)->reaches(backend, device);
}

enum status backend_inbox_create(struct inbox **out, struct backend *backend, int rank, int size,
                                 size_t max_bytes, struct error *err) {
    return ops_of(backend)->inbox_create(out, backend, rank, size, max_bytes, err);
}

void backend_inbox_free(struct inbox *inbox) {
    if (inbox != NULL) ops_of(inbox)->inbox_free(inbox);
}

void *backend_inbox_memory(const struct inbox *inbox) {
    return ops_of(inbox)->inbox_memory(inbox);
}

void backend_inbox_connect(struct inbox *inbox, void *const *memories) {
    ops_of(inbox)->inbox_connect(inbox, memories);
}

void backend_inbox_gather(struct inbox *inbox, void *recv, const void *send, size_t bytes) {
    ops_of(inbox)->inbox_gather(inbox, recv, send, bytes);
}

enum status backend_inbox_check(struct inbox *inbox, struct error *err) {
    return ops_of(inbox)->inbox_check(inbox, err);
}

enum status backend_sample_reserve(struct backend *backend, int n_rows, int vocab, struct error *err) {
    return ops_of(backend)->sample_reserve(backend, n_rows, vocab, err);
}

void backend_sample_begin(struct backend *backend, float *logits, int stride, int vocab,
                          const struct sample_draw *draws, int n) {
    ops_of(backend)->sample_begin(backend, logits, stride, vocab, draws, n);
}

enum status backend_sample_end(struct backend *backend, struct sample_result *results,
                               struct error *err) {
    return ops_of(backend)->sample_end(backend, results, err);
}

enum status backend_fed_tokens(struct backend *backend, int32_t *tokens, int n_batches,
                               struct error *err) {
    return ops_of(backend)->fed_tokens(backend, tokens, n_batches, err);
}

enum status backend_logprobs(struct backend *backend, struct sample_result *out,
                             const float *logits, int vocab, int n_top, int32_t token,
                             struct error *err) {
    return ops_of(backend)->logprobs(backend, out, logits, vocab, n_top, token, err);
}

enum status backend_distribution(struct backend *backend, float *out, const float *logits, int vocab,
                                 const struct sample_draw *draw, struct error *err) {
    return ops_of(backend)->distribution(backend, out, logits, vocab, draw, err);
}
