#include "model/weight_names.h"

#include <stdio.h>

struct weight_row {
    bool per_layer;
    const char *name; /* behind "model.layers.N." where per_layer */
};

static const struct weight_row rows_by_role[CHECKPOINT_N_ROLES] = {
    [CHECKPOINT_EMBEDDING] = {false, "model.embed_tokens.weight"},
    [CHECKPOINT_FINAL_NORM] = {false, "model.norm.weight"},
    [CHECKPOINT_LM_HEAD] = {false, "lm_head.weight"},
    [CHECKPOINT_ATTN_NORM] = {true, "input_layernorm.weight"},
    [CHECKPOINT_Q] = {true, "self_attn.q_proj.weight"},
    [CHECKPOINT_K] = {true, "self_attn.k_proj.weight"},
    [CHECKPOINT_V] = {true, "self_attn.v_proj.weight"},
    [CHECKPOINT_O] = {true, "self_attn.o_proj.weight"},
    [CHECKPOINT_Q_BIAS] = {true, "self_attn.q_proj.bias"},
    [CHECKPOINT_K_BIAS] = {true, "self_attn.k_proj.bias"},
    [CHECKPOINT_V_BIAS] = {true, "self_attn.v_proj.bias"},
    [CHECKPOINT_O_BIAS] = {true, "self_attn.o_proj.bias"},
    [CHECKPOINT_Q_NORM] = {true, "self_attn.q_norm.weight"},
    [CHECKPOINT_K_NORM] = {true, "self_attn.k_norm.weight"},
    [CHECKPOINT_MLP_NORM] = {true, "post_attention_layernorm.weight"},
    [CHECKPOINT_GATE] = {true, "mlp.gate_proj.weight"},
    [CHECKPOINT_UP] = {true, "mlp.up_proj.weight"},
    [CHECKPOINT_DOWN] = {true, "mlp.down_proj.weight"},
};

bool weight_is_per_layer(enum checkpoint_role role) {
    return rows_by_role[role].per_layer;
}

bool weight_is_used(enum checkpoint_role role, const struct model_config *config) {
    switch (role) {
    case CHECKPOINT_LM_HEAD: return !config->tied_embeddings;
    case CHECKPOINT_Q_BIAS:
    case CHECKPOINT_K_BIAS:
    case CHECKPOINT_V_BIAS: return config->qkv_bias;
    case CHECKPOINT_O_BIAS: return config->o_bias;
    case CHECKPOINT_Q_NORM:
    case CHECKPOINT_K_NORM: return config->qk_norm;
    default: return true;
    }
}

void weight_name(char out[WEIGHT_NAME_MAX], enum checkpoint_role role, int layer) {
    const struct weight_row *row = &rows_by_role[role];
    if (row->per_layer) {
        snprintf(out, WEIGHT_NAME_MAX, "model.layers.%d.%s", layer, row->name);
    } else {
        snprintf(out, WEIGHT_NAME_MAX, "%s", row->name);
    }
}

void weight_shape(int64_t *rows, int64_t *cols, enum checkpoint_role role,
                  const struct model_config *config) {
    int64_t hidden = config->hidden, q = (int64_t)config->n_heads * config->head_dim;
    int64_t kv = (int64_t)config->n_kv_heads * config->head_dim;
    const int64_t shapes[CHECKPOINT_N_ROLES][2] = {
        [CHECKPOINT_EMBEDDING] = {config->vocab, hidden},
        [CHECKPOINT_FINAL_NORM] = {hidden, 0},
        [CHECKPOINT_LM_HEAD] = {config->vocab, hidden},
        [CHECKPOINT_ATTN_NORM] = {hidden, 0},
        [CHECKPOINT_Q] = {q, hidden},
        [CHECKPOINT_K] = {kv, hidden},
        [CHECKPOINT_V] = {kv, hidden},
        [CHECKPOINT_O] = {hidden, q},
        [CHECKPOINT_Q_BIAS] = {q, 0},
        [CHECKPOINT_K_BIAS] = {kv, 0},
        [CHECKPOINT_V_BIAS] = {kv, 0},
        [CHECKPOINT_O_BIAS] = {hidden, 0},
        [CHECKPOINT_Q_NORM] = {config->head_dim, 0},
        [CHECKPOINT_K_NORM] = {config->head_dim, 0},
        [CHECKPOINT_MLP_NORM] = {hidden, 0},
        [CHECKPOINT_GATE] = {config->intermediate, hidden},
        [CHECKPOINT_UP] = {config->intermediate, hidden},
        [CHECKPOINT_DOWN] = {hidden, config->intermediate},
    };
    *rows = shapes[role][0];
    *cols = shapes[role][1];
}
