/* The op contract between the transformer and the machine that computes it.
 *
 * One backend per rank; one thread calls it. Activations are f32 row-major `[n_rows, width]` in
 * memory of the backend. Products round their inputs to the weight's arithmetic (bf16, or int8
 * with one scale per row and leaf) and accumulate in f32 (int32); fp8 weights (e4m3) are widened to
 * bf16, which is exact.
 *
 * A device computes behind the caller's back: ops return when they are enqueued, in order. Those
 * that wait say so here; they also say whether anything before them failed.
 * Pointers called `memory` and all activations are the backend's; everything else is the host's
 * and may be reused at return.
 *
 * Three promises hold for every op (architecture.md, "The one promise"):
 *   row invariance       row r of the output depends on row r of the input alone: not on n_rows, not
 *                        on r, not on n_threads. The order of every sum is fixed by the weight's shape.
 *   topology invariance  a row-parallel product is 8 partial sums over 8 leaves of K, added as the tree
 *                        ((l0+l1)+(l2+l3))+((l4+l5)+(l6+l7)) in f32. A rank that owns 8/n leaves computes
 *                        its subtree's root; backend_tree_sum finishes the same tree. An empty leaf is +0.
 *   fixed-order attention  a context is cut in pieces of 256 positions counted from position 0; pieces
 *                        are combined in order. What is masked contributes exactly nothing.
 * Bits agree within one backend and instruction set, not across them. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/dtype.h"
#include "common/error.h"
#include "kernels/sample_draw.h"

enum { BACKEND_KV_BLOCK = 16, BACKEND_ATTENTION_PIECE = 256, BACKEND_MAX_LEAVES = 8 };

/* Instruction sets: the CPU's, weakest first, of which AUTO picks the strongest that the processor
 * has and the kernel permits; then the devices' (opened at run time from a module beside the
 * program). EMULATED is the CUDA backend compiled for the CPU, for tests. */
enum backend_isa {
    BACKEND_AUTO,
    BACKEND_PORTABLE,
    BACKEND_AVX2,
    BACKEND_AVX512,
    BACKEND_AMX,
    BACKEND_CUDA,
    BACKEND_EMULATED,
    BACKEND_N_ISAS
};

struct backend_options {
    enum backend_isa isa;
    int n_threads; /* >= 1; the calling thread counts as one */
    int max_rows;  /* largest n_rows of any call */
    int max_width; /* largest K or N of any product; a backend may size its scratch by both */
    int device;    /* CUDA: which, from 0 */
};

struct backend;

/* FAILED_PRECONDITION when a forced isa is not available here, naming what is. */
enum status backend_create(struct backend **out, const struct backend_options *options,
                           struct error *err);
void backend_destroy(struct backend *backend);

/* What AUTO became: "amx", "avx512", "avx2", "portable"; "cuda-9.0" by compute capability, since
 * bits differ between generations; "emulated". */
const char *backend_isa_name(const struct backend *backend);
enum backend_isa backend_isa(const struct backend *backend);
/* The strongest that this processor (and kernel) can run, and the name of any. */
enum backend_isa backend_isa_best(void);
const char *backend_isa_to_name(enum backend_isa isa);
/* "auto" and the names above → isa, or -1. */
int backend_isa_parse(const char *name);
/* Whether this processor (and kernel) can run it; of a device: whether there is one. */
bool backend_isa_available(enum backend_isa isa);

/* What is known of a CUDA device before it is opened; of device -1 their number alone, and none of them
 * is touched (what is touched gives memory to this process, or is another's alone). Costs less than a
 * millisecond where there is no driver. UNAVAILABLE, in one sentence, without module, driver or
 * device. */
struct backend_device {
    char name[64];
    int n_devices;    /* of its kind, here */
    int major, minor; /* compute capability */
    int64_t memory_bytes, free_bytes;
};
enum status backend_device_probe(struct backend_device *out, enum backend_isa isa, int device,
                                 struct error *err);

/* Zeroed memory for activations, aligned to 64 bytes. NULL when there is none. */
void *backend_alloc(struct backend *backend, size_t bytes);
void backend_free(struct backend *backend, void *memory);

void backend_copy_in(struct backend *backend, void *memory, const void *host, size_t bytes);
/* Waits. INTERNAL when the device failed, now or at something enqueued before. */
enum status backend_copy_out(struct backend *backend, void *host, const void *memory, size_t bytes,
                             struct error *err);
void backend_copy(struct backend *backend, void *memory, const void *from_memory, size_t bytes);
void backend_zero(struct backend *backend, void *memory, size_t bytes);
/* `height` pieces of `width` bytes; pitches are the bytes from one piece to the next. */
void backend_copy_2d(struct backend *backend, void *memory, size_t pitch, const void *from_memory,
                     size_t from_pitch, size_t width, size_t height);
/* Waits until everything enqueued is done. INTERNAL when something failed. */
enum status backend_wait(struct backend *backend, struct error *err);
/* The CUDA stream that everything is enqueued on; NULL on the CPU. For communicators. */
void *backend_stream(struct backend *backend);

/* --- weights ------------------------------------------------------------------------------- */

/* Rows of a row-major matrix in checkpoint memory; several sources are stacked along N (q, k, v). */
struct weight_source {
    const void *data;  /* first element of the first row's slice */
    enum dtype dtype;  /* F32, F16, BF16 */
    int64_t row_stride; /* elements between rows */
    int n_rows;
};

/* A packed weight W [n, k], y = x W^T. Owned by the caller, free with backend_weight_free. */
struct weight;

/* Packs `n_sources` stacked sources of `k` columns each. leaf_begin: n_leaves + 1 borders over
 * 0..k for a row-parallel weight (n_leaves in {1,2,4,8}, leaves may be empty), or NULL for a
 * column-parallel one (a single leaf). format: DTYPE_BF16, DTYPE_I8 or, on CUDA, DTYPE_F8
 * (symmetric, one scale per output row and leaf: a leaf is the group, so that the bits do not depend
 * on the degree). RESOURCE_EXHAUSTED when memory runs out, with the bytes asked for;
 * FAILED_PRECONDITION when the backend has no such format. */
enum status backend_weight_create(struct weight **out, struct backend *backend,
                                  const struct weight_source *sources, int n_sources, int k,
                                  const int *leaf_begin, int n_leaves, enum dtype format,
                                  struct error *err);
void backend_weight_free(struct weight *weight);
size_t backend_weight_bytes(const struct weight *weight);

/* An embedding table [n_rows, width]. On the CPU it reads the source in place, which must outlive
 * it; a device keeps a copy. */
struct table;
enum status backend_table_create(struct table **out, struct backend *backend,
                                 const struct weight_source *source, int width, struct error *err);
void backend_table_free(struct table *table);
size_t backend_table_bytes(const struct table *table); /* of the backend's memory */

/* --- passes ---------------------------------------------------------------------------------- */

/* Consecutive rows of one sequence at consecutive positions. */
struct backend_segment {
    int row;               /* first row in the batch */
    int n_rows;
    int position;          /* of the first row, from 0 */
    const int32_t *blocks; /* block table: blocks[p / 16] holds position p; covers all rows */
};

/* A token that the host need not know yet: the one that draw i of the last backend_sample_begin made
 * (of the first BACKEND_MAX_FED draws). */
#define BACKEND_FED(i) (-1 - (i))
enum { BACKEND_MAX_FED = 256, BACKEND_FED_BATCHES = 32 };

/* What a forward pass computes. Ops that take no rows of their own work on the pass begun last. */
struct backend_pass {
    const int32_t *tokens; /* [n_rows], in range or BACKEND_FED; NULL where nothing is embedded */
    int n_rows;
    const struct backend_segment *segments;
    int n_segments;
    const int32_t *logit_rows; /* [n_logit_rows] */
    int n_logit_rows;
};

/* Tells the backend. Borrowed until the next pass begins. */
void backend_pass_begin(struct backend *backend, const struct backend_pass *pass);

/* How many rows ops compute for a pass of n_rows: on a device up to a few more, so that few graphs
 * serve all sizes. Buffers of max_rows have room. Rows past the pass's hold nothing of meaning. */
int backend_padded_rows(const struct backend *backend, int n_rows);

/* A pass of the same shape (key, rows, logit rows, and what its segments need) that was recorded is
 * replayed, whole, and true is returned. Else the caller enqueues its ops between record_begin and
 * record_end, which starts them; nothing may wait there. key: names the model and what else changes
 * the ops. Backends without graphs compute at once and never replay. */
bool backend_replay(struct backend *backend, uint64_t key);
void backend_record_begin(struct backend *backend, uint64_t key);
void backend_record_end(struct backend *backend);

/* --- ops ----------------------------------------------------------------------------------- */

/* out[n_rows, width] = table[tokens[r]] of the pass; n_rows are the pass's, padded or not (what has no
 * token gets id 0). */
void backend_embed(struct backend *backend, float *out, const struct table *table, int n_rows,
                   int width);

/* out[n_rows, width] = in[logit_rows[i], width] of the pass; n_rows are its logit rows, padded or
 * not. */
void backend_take_rows(struct backend *backend, float *out, const float *in, int n_rows, int width);

/* out = in / sqrt(mean(in^2) + eps) * weight, per row. out may be in. */
void backend_rmsnorm(struct backend *backend, float *out, const float *in, const float *weight,
                     float eps, int n_rows, int width);

/* out[n_rows, n] = in[n_rows, k] W^T (+ bias[n] where not NULL), one leaf. `in` rows are
 * `in_stride` floats apart. */
void backend_linear(struct backend *backend, float *out, const float *in, int in_stride,
                    const struct weight *weight, const float *bias, int n_rows);

/* Row-parallel: out[n_rows, n] = root of this rank's subtree of leaf sums. */
void backend_linear_tree(struct backend *backend, float *out, const float *in,
                         const struct weight *weight, int n_rows);

/* residual[n_rows, width] += tree over the n_roots (1, 2, 4, 8) subtree roots, roots laid out
 * [n_roots][n_rows, width]; + bias where not NULL (added after the tree). */
void backend_tree_sum(struct backend *backend, float *residual, const float *roots, int n_roots,
                      const float *bias, int n_rows, int width);

/* backend_tree_sum, then normed = rmsnorm(residual): the same bits as the two calls. */
void backend_tree_sum_norm(struct backend *backend, float *residual, float *normed,
                           const float *roots, int n_roots, const float *bias, const float *weight,
                           float eps, int n_rows, int width);

/* out[n_rows, width] = silu(gate) * up with gate_up [n_rows, 2 * width]: gate first, then up. */
void backend_swiglu(struct backend *backend, float *out, const float *gate_up, int n_rows,
                    int width);

/* --- attention ------------------------------------------------------------------------------ */

/* KV memory of one layer: n_blocks blocks of 16 positions, K and V in bf16, layout private. */
struct kv_cache;
enum status backend_kv_create(struct kv_cache **out, struct backend *backend, int n_blocks,
                              int n_kv_heads, int head_dim, struct error *err);
void backend_kv_free(struct kv_cache *cache);
/* Bytes of one block (K and V) of one layer, at most: backends round head_dim up to 16 or 32. */
size_t backend_kv_block_bytes(int n_kv_heads, int head_dim);

/* What the cache holds of one position (waits): k and v [n_kv_heads * head_dim], bf16 widened exactly to
 * f32. Slow: for tests, and for moving sequences. blocks as in backend_segment. */
void backend_kv_read(const struct kv_cache *cache, const int32_t *blocks, int position, float *k,
                     float *v);

/* Per-head normalisation and rotation. Half-split layout: element i pairs with i + head_dim/2. */
struct rope_table; /* cos/sin by position; owned by the caller */
/* inv_freq: [head_dim / 2] f32 (scaling already applied), rows for positions 0..n_positions-1. */
enum status backend_rope_create(struct rope_table **out, struct backend *backend,
                                const float *inv_freq, int head_dim, int n_positions,
                                struct error *err);
void backend_rope_free(struct rope_table *table);

/* For the rows of the pass. qkv[n_rows, (n_heads + 2 n_kv_heads) * head_dim]: q heads, k heads, v heads. In place: RMSNorm
 * over head_dim with q_norm / k_norm (where not NULL), then rotation of q and k; k and v are
 * rounded to bf16 and written to the cache. */
void backend_rope_kv_write(struct backend *backend, float *qkv, struct kv_cache *cache,
                           const struct rope_table *rope, const float *q_norm, const float *k_norm,
                           float eps, int n_heads);

/* For the rows of the pass. out[n_rows, n_heads * head_dim] = softmax(q k^T / sqrt(head_dim)) v, causal by position: a row
 * at p sees positions max(0, p - window + 1) .. p (window 0: all). q: [row, q_stride] f32, the q
 * part of qkv. Query head h reads the cache's KV head kv_of_head[h]. */
void backend_attention(struct backend *backend, float *out, const float *q, int q_stride,
                       const struct kv_cache *cache, const int *kv_of_head, int n_heads,
                       int window);

/* --- exchange between ranks of one process ----------------------------------------------------- */

/* Whether kernels here can write into the memory of `device`, which is then mapped; false on the CPU. */
bool backend_reaches(struct backend *backend, int device);

/* Memory of a rank that the other ranks' kernels write into. All calls on one thread a rank. */
struct inbox;
enum { BACKEND_MAX_PEERS = 8 };
/* For pieces of up to max_bytes (a multiple of 4) from each of `size` ranks, at most BACKEND_MAX_PEERS.
 * FAILED_PRECONDITION on the CPU, where groups have memory of their own. */
enum status backend_inbox_create(struct inbox **out, struct backend *backend, int rank, int size,
                                 size_t max_bytes, struct error *err);
/* Not before everybody has waited for its last exchange. */
void backend_inbox_free(struct inbox *inbox);
/* What the others must be told, and then each what all have told: memories[size] by rank, on devices
 * that backend_reaches has mapped. */
void *backend_inbox_memory(const struct inbox *inbox);
void backend_inbox_connect(struct inbox *inbox, void *const *memories);
/* recv[size][bytes]: everybody's send[bytes], by rank; the same bytes on all ranks, at most
 * max_bytes. Enqueued. */
void backend_inbox_gather(struct inbox *inbox, void *recv, const void *send, size_t bytes);
/* Waits. UNAVAILABLE when a rank did not send its piece in time: the inbox is of no more use. */
enum status backend_inbox_check(struct inbox *inbox, struct error *err);

/* --- sampling ------------------------------------------------------------------------------- */

/* Starts n draws; draw i is of row i of raw logits [n, stride] (destroyed), whose first `vocab`
 * columns are tokens. For each: logit_bias, penalties, banned, temperature, min-p, top-k, top-p; then
 * argmax of logit + Gumbel(seed, position, id) (coupled sampling, speculation.md 1). Ties go to the
 * lowest id everywhere. A pure function of its draw and its row. Draws come in chains: one that
 * `continues` is made only if the draw before it was made and hit its candidate (the verdict walk).
 * n is at most the backend's max_rows. One batch at a time. */
void backend_sample_begin(struct backend *backend, float *logits, int stride, int vocab,
                          const struct sample_draw *draws, int n);
/* Before the first draw, where memory that is taken later would stop a device: room for n_rows draws over
 * `vocab` with all that they may ask for, 8 bytes each of n_rows * vocab. RESOURCE_EXHAUSTED. */
enum status backend_sample_reserve(struct backend *backend, int n_rows, int vocab, struct error *err);

/* Waits for them. INTERNAL when the device failed, now or at something enqueued before. */
enum status backend_sample_end(struct backend *backend, struct sample_result *results,
                               struct error *err);

/* Waits. tokens[n_batches][BACKEND_MAX_FED]: what the last n_batches batches drew (of each, the first
 * BACKEND_MAX_FED), oldest first. For chains of passes that are fed by BACKEND_FED. */
enum status backend_fed_tokens(struct backend *backend, int32_t *tokens, int n_batches,
                               struct error *err);

/* Waits. The log-probability of `token` and of the n_top most likely ids in raw logits [vocab], as
 * backend_sample reports them; out->token is set to `token`. */
enum status backend_logprobs(struct backend *backend, struct sample_result *out,
                             const float *logits, int vocab, int n_top, int32_t token,
                             struct error *err);

/* Waits. The distribution that the draw is made from: out[vocab] f32 of the host, summing to 1 up to
 * rounding; one id has 1 at temperature 0. The logits stay as they are. What the sampling rule
 * `rejection` compares (worker/spec/accept.h). */
enum status backend_distribution(struct backend *backend, float *out, const float *logits, int vocab,
                                 const struct sample_draw *draw, struct error *err);
