/* An opened checkpoint: a Hugging Face folder, its safetensors files memory-mapped, every header
 * checked. Tensors are borrowed views into the mapping; pages are read when touched, so a rank that
 * only looks at its shard only reads its shard. Immutable after opening; any thread may read. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/dtype.h"
#include "common/error.h"
#include "model/config.h"

struct checkpoint;

/* A 1-D (rows = length, cols = 1) or 2-D row-major tensor. */
struct checkpoint_tensor {
    const void *data; /* borrowed until checkpoint_close; files need not align it: read by memcpy */
    enum dtype dtype; /* F32, F16 or BF16 */
    int64_t rows;
    int64_t cols;
};

/* Opens DIR: config.json, then model.safetensors or model.safetensors.index.json + its files.
 * Checks every tensor the config calls for: present, shape, dtype. Errors name file, field, value
 * seen and expected. On failure nothing stays open. */
enum status checkpoint_open(struct checkpoint **out, const char *dir, struct error *err);
void checkpoint_close(struct checkpoint *checkpoint);

const struct model_config *checkpoint_config(const struct checkpoint *checkpoint);

/* Which tensor of a decoder layer (or of the whole model, where `layer` is ignored). */
enum checkpoint_role {
    CHECKPOINT_EMBEDDING,   /* [vocab, hidden] */
    CHECKPOINT_FINAL_NORM,  /* [hidden] */
    CHECKPOINT_LM_HEAD,     /* [vocab, hidden]; the embedding where tied */
    CHECKPOINT_ATTN_NORM,   /* [hidden] input_layernorm */
    CHECKPOINT_Q,           /* [n_heads * head_dim, hidden] */
    CHECKPOINT_K,           /* [n_kv_heads * head_dim, hidden] */
    CHECKPOINT_V,
    CHECKPOINT_O,           /* [hidden, n_heads * head_dim] */
    CHECKPOINT_Q_BIAS,      /* [n_heads * head_dim]; only with qkv_bias */
    CHECKPOINT_K_BIAS,
    CHECKPOINT_V_BIAS,
    CHECKPOINT_O_BIAS,      /* [hidden]; only with o_bias */
    CHECKPOINT_Q_NORM,      /* [head_dim]; only with qk_norm */
    CHECKPOINT_K_NORM,
    CHECKPOINT_MLP_NORM,    /* [hidden] post_attention_layernorm */
    CHECKPOINT_GATE,        /* [intermediate, hidden] */
    CHECKPOINT_UP,
    CHECKPOINT_DOWN,        /* [hidden, intermediate] */
    CHECKPOINT_N_ROLES
};

/* The view of one tensor. CHECKs that the config has it (opening proved that the file does). */
struct checkpoint_tensor checkpoint_tensor(const struct checkpoint *checkpoint,
                                           enum checkpoint_role role, int layer);

/* How many numbers the checkpoint holds; a tied LM head counts once. */
uint64_t checkpoint_parameters(const struct checkpoint *checkpoint);

/* 64-bit identity of the checkpoint: hash of config and all safetensors headers (names, shapes,
 * offsets, sizes). Ranks compare it before serving. */
uint64_t checkpoint_fingerprint(const struct checkpoint *checkpoint);
