/* The op contract between the transformer and the machine that computes it.
 *
 * One backend per rank; one thread calls it. Activations are f32 row-major `[n_rows, width]` in
 * memory of the backend. Products round their inputs to the weight's arithmetic (bf16, or int8
 * with one scale per row and leaf) and accumulate in f32 (int32).
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

enum { BACKEND_KV_BLOCK = 16, BACKEND_ATTENTION_PIECE = 256, BACKEND_MAX_LEAVES = 8 };

/* Instruction sets of the CPU backend, weakest first. AUTO picks the strongest that the processor
 * has and the kernel permits. */
enum backend_isa { BACKEND_AUTO, BACKEND_PORTABLE, BACKEND_AVX2, BACKEND_AVX512, BACKEND_AMX };

struct backend_options {
    enum backend_isa isa;
    int n_threads; /* >= 1; the calling thread counts as one */
    int max_rows;  /* largest n_rows of any call */
    int max_width; /* largest K or N of any product; a backend may size its scratch by both */
};

struct backend;

/* FAILED_PRECONDITION when a forced isa is not available here, naming what is. */
enum status backend_create(struct backend **out, const struct backend_options *options,
                           struct error *err);
void backend_destroy(struct backend *backend);

/* "amx", "avx512", "avx2", "portable": what AUTO became. */
const char *backend_isa_name(const struct backend *backend);
enum backend_isa backend_isa(const struct backend *backend);
/* The strongest that this processor (and kernel) can run, and the name of any. */
enum backend_isa backend_isa_best(void);
const char *backend_isa_to_name(enum backend_isa isa);
/* "auto" and the names above → isa, or -1. */
int backend_isa_parse(const char *name);
/* Whether this processor (and kernel) can run it. */
bool backend_isa_available(enum backend_isa isa);

/* Zeroed memory for activations, aligned to 64 bytes. NULL when there is none. */
void *backend_alloc(struct backend *backend, size_t bytes);
void backend_free(struct backend *backend, void *memory);

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
 * column-parallel one (a single leaf). format: DTYPE_BF16 or DTYPE_I8 (symmetric, one scale per
 * output row and leaf: a leaf is the group, so that the bits do not depend on the degree).
 * RESOURCE_EXHAUSTED when memory runs out, with the bytes asked for. */
enum status backend_weight_create(struct weight **out, struct backend *backend,
                                  const struct weight_source *sources, int n_sources, int k,
                                  const int *leaf_begin, int n_leaves, enum dtype format,
                                  struct error *err);
void backend_weight_free(struct weight *weight);
size_t backend_weight_bytes(const struct weight *weight);

/* --- ops ----------------------------------------------------------------------------------- */

/* out[n_rows, width] = table[tokens[r]]; table is a row-major checkpoint tensor [vocab, width] (any
 * dtype). Tokens are in range: the caller checked. */
void backend_embed(struct backend *backend, float *out, const struct weight_source *table,
                   const int32_t *tokens, int n_rows, int width);

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

/* out[n_rows, width] = silu(gate) * up with gate_up [n_rows, 2 * width]: gate first, then up. */
void backend_swiglu(struct backend *backend, float *out, const float *gate_up, int n_rows,
                    int width);

/* --- attention ------------------------------------------------------------------------------ */

/* KV memory of one layer: n_blocks blocks of 16 positions, K and V in bf16, layout private. */
struct kv_cache;
enum status backend_kv_create(struct kv_cache **out, struct backend *backend, int n_blocks,
                              int n_kv_heads, int head_dim, struct error *err);
void backend_kv_free(struct kv_cache *cache);
/* Bytes of one block (K and V) of one layer. */
size_t backend_kv_block_bytes(int n_kv_heads, int head_dim);

/* What the cache holds of one position: k and v [n_kv_heads * head_dim], bf16 widened exactly to
 * f32. Slow: for tests, and for moving sequences. blocks as in backend_segment. */
void backend_kv_read(const struct kv_cache *cache, const int32_t *blocks, int position, float *k,
                     float *v);

/* Consecutive rows of one sequence at consecutive positions. */
struct backend_segment {
    int row;               /* first row in the batch */
    int n_rows;
    int position;          /* of the first row, from 0 */
    const int32_t *blocks; /* block table: blocks[p / 16] holds position p; covers all rows */
};

/* Per-head normalisation and rotation. Half-split layout: element i pairs with i + head_dim/2. */
struct rope_table; /* cos/sin by position; owned by the caller */
/* inv_freq: [head_dim / 2] f32 (scaling already applied), rows for positions 0..n_positions-1. */
enum status backend_rope_create(struct rope_table **out, struct backend *backend,
                                const float *inv_freq, int head_dim, int n_positions,
                                struct error *err);
void backend_rope_free(struct rope_table *table);

/* qkv[n_rows, (n_heads + 2 n_kv_heads) * head_dim]: q heads, k heads, v heads. In place: RMSNorm
 * over head_dim with q_norm / k_norm (where not NULL), then rotation of q and k; k and v are
 * rounded to bf16 and written to the cache. */
void backend_rope_kv_write(struct backend *backend, float *qkv, struct kv_cache *cache,
                           const struct rope_table *rope, const float *q_norm, const float *k_norm,
                           float eps, const struct backend_segment *segments, int n_segments,
                           int n_heads);

/* out[n_rows, n_heads * head_dim] = softmax(q k^T / sqrt(head_dim)) v, causal by position: a row
 * at p sees positions max(0, p - window + 1) .. p (window 0: all). q: [row, q_stride] f32, the q
 * part of qkv. Query head h reads the cache's KV head kv_of_head[h]. */
void backend_attention(struct backend *backend, float *out, const float *q, int q_stride,
                       const struct kv_cache *cache, const int *kv_of_head,
                       const struct backend_segment *segments, int n_segments, int n_heads,
                       int window);

/* --- sampling ------------------------------------------------------------------------------- */

enum { SAMPLE_MAX_LOGPROBS = 20 };

struct sample_bias {
    int32_t token;
    float bias;
};

/* The parameters of one request, checked and resolved. */
struct sample_params {
    float temperature;        /* 0: greedy */
    float top_p;              /* (0, 1]; 1: off */
    int top_k;                /* 0: off */
    float min_p;              /* [0, 1]; 0: off */
    float repetition_penalty; /* > 0; 1: off; over prompt and output */
    float presence_penalty;   /* over output */
    float frequency_penalty;  /* over output */
    uint64_t seed;
    const struct sample_bias *bias;
    int n_bias;
    const int32_t *banned;    /* ids that may not be drawn here (EOS before min_tokens) */
    int n_banned;
    int n_logprobs;           /* -1: none; 0: of the drawn token; n: also the n most likely */
};

struct sample_result {
    int32_t token;
    float logprob;            /* log softmax of the raw logits at `token` */
    int n_top;
    int32_t top_token[SAMPLE_MAX_LOGPROBS];
    float top_logprob[SAMPLE_MAX_LOGPROBS];
};

/* Draws the token for `position` (absolute position of the drawn token in its sequence) from one
 * row of raw logits [vocab] (destroyed). Order: logit_bias, penalties, banned, temperature, min-p,
 * top-k, top-p; then argmax of logit + Gumbel(seed, position, id) (coupled sampling,
 * speculation.md 1). Ties go to the lowest id everywhere. history: prompt then output, the first
 * n_prompt are the prompt. A pure function of its arguments. */
void backend_sample(struct backend *backend, struct sample_result *out, float *logits, int vocab,
                    const struct sample_params *params, const int32_t *history, int n_prompt,
                    int n_history, int64_t position);

/* The log-probability of `token` and of the n_top most likely ids in raw logits [vocab], as
 * backend_sample reports them; out->token is set to `token`. */
void backend_logprobs(struct backend *backend, struct sample_result *out, const float *logits,
                      int vocab, int n_top, int32_t token);

/* The distribution that backend_sample draws from: out[vocab] f32, summing to 1 up to rounding;
 * one id has 1 at temperature 0. Arguments as backend_sample's; the logits are destroyed. What the
 * sampling rule `rejection` compares (worker/spec/accept.h). */
void backend_distribution(struct backend *backend, float *out, float *logits, int vocab,
                          const struct sample_params *params, const int32_t *history, int n_prompt,
                          int n_history);
