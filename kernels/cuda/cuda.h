/* Inside the CUDA backend: what its host files share. Private to kernels/cuda/. Built twice: for a GPU by
 * nvcc (tandem-cuda.so), and for the emulator (tandem-cuda-emulated.so). */
#pragma once
#include <cuda_runtime.h>

#include "kernels/backend_ops.h"
#include "kernels/cuda/launch.h"

struct cuda_sampler;

/* A recorded pass. */
struct cuda_graph {
    uint64_t key;
    cudaGraphExec_t exec;
    uint64_t used; /* pass that used it last */
};

enum {
    CUDA_MAX_GRAPHS = 128,
    CUDA_GRAPH_ROWS = 64,    /* passes of more rows are not recorded */
    CUDA_PASS_SLOTS = 4,     /* passes that may be on their way to the device */
    CUDA_LOAD_SLOTS = 2,     /* pieces of a weight on their way */
    CUDA_LOAD_BYTES = 16 << 20
};

/* The pass begun last, as kernels see it: one piece of device memory, filled by one copy. */
struct cuda_pass {
    int n_rows, n_logit_rows, n_segments;
    int max_pieces;   /* of 256 positions, of any segment */
    size_t max_bytes; /* of one slot, and of the device's copy */
    char *host[CUDA_PASS_SLOTS];
    cudaEvent_t sent[CUDA_PASS_SLOTS];
    unsigned n_sent;
    char *device;
    int32_t *tokens, *logit_rows, *tables; /* inside `device` */
    struct row_place *places;
};

struct backend {
    struct backend_head head;
    struct backend_options options;
    char name[32];
    int n_processors;
    struct cuda_queue queue;
    cudaStream_t stream;
    cudaError_t failure; /* the first; everything that waits reports it */
    const char *failed_at;

    struct cuda_pass pass;
    bool recording;
    uint64_t record_key;
    struct cuda_graph graphs[CUDA_MAX_GRAPHS];
    int n_graphs;
    uint64_t n_passes;

    /* Scratch of products: activations as operands, partial sums of leaves. */
    void *packed;
    float *x_scales;
    size_t packed_bytes;
    size_t x_scales_bytes;
    float *partial;
    size_t partial_bytes;
    unsigned *counters;
    size_t counters_bytes;
    /* The f32 rows that `packed` holds as plain bf16 rows, for the product that follows at once. */
    const float *packed_of;
    int packed_rows, packed_width;

    float *attention_partial;
    size_t attention_floats;

    struct cuda_sampler *sampler;
    int32_t *fed; /* tokens of the batch begun last, at least [BACKEND_MAX_FED] */
    int32_t *fed_ring, *fed_host; /* [BACKEND_FED_BATCHES][BACKEND_MAX_FED] of each batch; its copy */
    int64_t n_batches;
    int n_drawn;
    enum status draw_status; /* of the first batch that failed since the last was collected, and its words */
    struct error draw_error;

    /* Loading: pinned host memory and its device twin, one slot filled while the other is packed. */
    char *load_host[CUDA_LOAD_SLOTS], *load_device[CUDA_LOAD_SLOTS];
    cudaEvent_t load_done[CUDA_LOAD_SLOTS];
    unsigned n_loads;
};

struct weight {
    struct backend_head head;
    struct backend *backend;
    enum product_format format;
    int n, n_padded, k;
    struct leaf_units leaves;
    char *data;
    float *scales;
    size_t bytes;
};

struct table {
    struct backend_head head;
    struct backend *backend;
    void *data;
    enum source_type type;
    size_t bytes;
};

struct kv_cache {
    struct backend_head head;
    struct backend *backend;
    struct kv_layout layout;
    size_t bytes; /* of keys, and of values */
};

struct rope_table {
    struct backend_head head;
    struct backend *backend;
    float *cosines, *sines;
    int n_positions;
};

/* Keeps the first failure, with what was tried; true: it went well. */
bool cuda_went_well(struct backend *backend, cudaError_t error, const char *what);
/* INTERNAL with the first failure's words, if there was one. */
enum status cuda_failure(const struct backend *backend, struct error *err);
/* Before memory goes: waits for what uses it, and forgets recorded passes and packed operands, which
 * may hold its address. */
void cuda_let_go(struct backend *backend);
/* Device memory; RESOURCE_EXHAUSTED with the bytes and what they were for. */
enum status cuda_take(void **out, size_t bytes, const char *what, struct error *err);
/* At least `wanted` bytes where *bytes are now, contents lost; waits for what uses them. */
enum status cuda_grow(struct backend *backend, void **memory, size_t *bytes, size_t wanted,
                      const char *what, struct error *err);

/* loading.c */
enum status cuda_weight_create(struct weight **out, struct backend *backend,
                               const struct weight_source *sources, int n_sources, int k,
                               const int *leaf_begin, int n_leaves, enum dtype format,
                               struct error *err);
void cuda_weight_free(struct weight *weight);
size_t cuda_weight_bytes(const struct weight *weight);
enum status cuda_table_create(struct table **out, struct backend *backend,
                              const struct weight_source *source, int width, struct error *err);
void cuda_table_free(struct table *table);
size_t cuda_table_bytes(const struct table *table);
void cuda_loading_end(struct backend *backend);

/* kv_cache.c */
enum status cuda_kv_create(struct kv_cache **out, struct backend *backend, int n_blocks,
                           int n_kv_heads, int head_dim, struct error *err);
void cuda_kv_free(struct kv_cache *cache);
void cuda_kv_read(const struct kv_cache *cache, const int32_t *blocks, int position, float *k,
                  float *v);
enum status cuda_rope_create(struct rope_table **out, struct backend *backend, const float *inv_freq,
                             int head_dim, int n_positions, struct error *err);
void cuda_rope_free(struct rope_table *table);

/* pass.c */
enum status cuda_pass_create(struct backend *backend, struct error *err);
void cuda_pass_destroy(struct backend *backend);
void cuda_pass_begin(struct backend *backend, const struct backend_pass *pass);
int cuda_padded_rows(const struct backend *backend, int n_rows);
/* Rows that ops of the pass compute: padded while a graph is recorded. */
int cuda_pass_rows(const struct backend *backend);
/* Pieces side by side for attention over the pass, 0: each tile walks its own. */
int cuda_pass_slots(const struct backend *backend, int n_heads, int padded);
bool cuda_replay(struct backend *backend, uint64_t key);
void cuda_drop_graphs(struct backend *backend);
void cuda_record_begin(struct backend *backend, uint64_t key);
void cuda_record_end(struct backend *backend);

/* inbox.c */
bool cuda_reaches(struct backend *backend, int device);
enum status cuda_inbox_create(struct inbox **out, struct backend *backend, int rank, int size,
                              size_t max_bytes, struct error *err);
void cuda_inbox_free(struct inbox *inbox);
void *cuda_inbox_memory(const struct inbox *inbox);
void cuda_inbox_connect(struct inbox *inbox, void *const *memories);
void cuda_inbox_gather(struct inbox *inbox, void *recv, const void *send, size_t bytes);
enum status cuda_inbox_check(struct inbox *inbox, struct error *err);

/* ops.c */
extern const struct backend_ops cuda_ops;
