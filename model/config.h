/* What a checkpoint says of itself: config.json and generation_config.json of a Hugging Face
 * folder, checked and reduced to the numbers the engine computes with. It reads no weights. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/dtype.h"
#include "common/error.h"

enum model_family { MODEL_LLAMA, MODEL_MISTRAL, MODEL_QWEN2, MODEL_QWEN3 };

enum model_rope_scaling { MODEL_ROPE_PLAIN, MODEL_ROPE_LINEAR, MODEL_ROPE_LLAMA3 };

struct model_rope {
    float theta;
    enum model_rope_scaling scaling;
    float factor;             /* linear and llama3 */
    float low_freq_factor;    /* llama3 */
    float high_freq_factor;   /* llama3 */
    int original_max_position; /* llama3 */
};

enum { MODEL_MAX_EOS = 8 };

struct model_config {
    enum model_family family;
    int hidden;        /* width of the residual stream */
    int n_layers;
    int n_heads;       /* query heads */
    int n_kv_heads;    /* divides n_heads */
    int head_dim;
    int intermediate;  /* MLP width */
    int vocab;         /* rows of the embedding; may exceed the tokenizer's size (padded tail) */
    int max_position;  /* context limit, tokens */
    int sliding_window; /* 0: none. Otherwise a query at p sees positions > p - sliding_window */
    float rms_eps;
    struct model_rope rope;
    bool tied_embeddings;
    bool qkv_bias;
    bool o_bias;
    bool qk_norm;      /* RMSNorm over head_dim on q and k before rope (Qwen3) */
    int bos;           /* -1: none */
    int eos[MODEL_MAX_EOS];
    int n_eos;
    char name[128];    /* folder name */
};

/* Reads and checks DIR/config.json (and generation_config.json, whose eos ids win).
 * INVALID_ARGUMENT names file, field, value seen, what is supported. */
enum status model_config_load(struct model_config *out, const char *dir, struct error *err);

/* The same from texts already read: `config_text` of n_config bytes and, where not NULL,
 * `generation_text` of n_generation bytes. `dir` only names the files in errors; `name` stays
 * empty. Pure. */
enum status model_config_parse(struct model_config *out, const char *dir, const char *config_text,
                               size_t n_config, const char *generation_text, size_t n_generation,
                               struct error *err);

/* "llama", "mistral", "qwen2", "qwen3". */
const char *model_family_name(enum model_family family);

/* Largest K or N of any product of this model, in elements. */
int model_config_max_width(const struct model_config *config);
