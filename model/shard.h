/* Which part of every weight a tensor-parallel rank owns (architecture.md, "Topology invariance").
 *
 * Row-parallel products (attention output, MLP down) are cut into 8 leaves whatever the degree:
 * leaf i owns query heads floor(i*H/8) .. floor((i+1)*H/8)-1, and intermediate columns
 * floor(i*U/8)*32 .. floor((i+1)*U/8)*32-1 with U = ceil(intermediate/32) units (the last unit may
 * be short). A rank of degree n owns 8/n neighbouring leaves. The vocabulary is cut in units of 32
 * rows. Pure. */
#pragma once
#include "common/error.h"
#include "model/config.h"

enum { SHARD_LEAVES = 8 };

struct shard {
    int rank, degree;        /* degree in {1, 2, 4, 8} */
    int n_leaves;            /* 8 / degree */
    int head_begin, head_end;       /* query heads; may be empty */
    int kv_head_begin, kv_head_end; /* KV heads that those read (replicated where shared) */
    int inter_begin, inter_end;     /* MLP columns; may be empty */
    int vocab_begin, vocab_end;     /* rows of the LM head; may be empty */
    /* Leaf borders relative to this rank's part, n_leaves + 1 entries, in columns of the product:
     * head_leaf in heads * head_dim, inter_leaf in MLP columns. */
    int head_leaf[SHARD_LEAVES + 1];
    int inter_leaf[SHARD_LEAVES + 1];
};

/* INVALID_ARGUMENT unless degree is 1, 2, 4 or 8 and 0 <= rank < degree. */
enum status shard_make(struct shard *out, const struct model_config *config, int rank, int degree,
                       struct error *err);

/* Layer-owner layout (EasySpec, speculation.md 3): the rank that holds the whole attention of a decoder
 * layer, its KV included. The first and the last layer run alone; those between are dealt out in turn, so
 * that consecutive layers stand on different ranks. */
int shard_layer_owner(int layer, int n_layers, int degree);
