/* Whole folders: what opens, and the words for what does not. */
#include <stdbool.h>

#include "common/log.h"
#include "model/checkpoint.h"
#include "tests/unit/checkpoint_files.h"
#include "tests/unit/test.h"

static const struct {
    const char *name;
    uint64_t parameters;
    enum dtype dtype;
    bool tied, qkv_bias, o_bias, qk_norm;
} fixtures[] = {
    {"llama-untied-hd64", 29304, DTYPE_BF16, false, false, false, false},
    {"llama3-rope-hd128", 38820, DTYPE_BF16, false, false, false, false},
    {"llama-linear-rope", 26784, DTYPE_BF16, false, false, false, false},
    {"llama-attention-bias", 23592, DTYPE_BF16, false, true, true, false},
    {"llama-tied-f16", 24224, DTYPE_F16, true, false, false, false},
    {"llama-f32-sharded", 12112, DTYPE_F32, false, false, false, false},
    {"mistral-window8", 26784, DTYPE_BF16, false, false, false, false},
    {"qwen2-14-2-heads", 25068, DTYPE_BF16, true, true, false, false},
    {"qwen2-14-2-hd64", 29412, DTYPE_BF16, false, true, false, false},
    {"qwen3-qk-norm", 29432, DTYPE_BF16, false, false, false, true},
};

static bool readable(struct checkpoint_tensor tensor) {
    double sum = 0;
    for (int64_t i = 0; i < tensor.rows * tensor.cols; i++) {
        float value = dtype_load_f32(tensor.data, tensor.dtype, (size_t)i);
        sum += (double)value * value;
    }
    double mean = sum / (double)(tensor.rows * tensor.cols);
    return mean > 1e-4 && mean < 100; /* false for NaN too: the bytes are the weights */
}

Test(checkpoint, opens_every_fixture) {
    for (size_t i = 0; i < sizeof fixtures / sizeof *fixtures; i++) {
        char dir[512];
        struct checkpoint *checkpoint;
        struct error err = {0};
        snprintf(dir, sizeof dir, "%s%s", FIXTURES, fixtures[i].name);
        cr_assert_eq(checkpoint_open(&checkpoint, dir, &err), STATUS_OK, "%s", err.text);
        const struct model_config *config = checkpoint_config(checkpoint);
        cr_assert_str_eq(config->name, fixtures[i].name);
        cr_assert_eq(checkpoint_parameters(checkpoint), fixtures[i].parameters, "%s: %llu", dir,
                     (unsigned long long)checkpoint_parameters(checkpoint));
        cr_assert_eq(config->tied_embeddings, fixtures[i].tied);
        cr_assert_eq(config->qkv_bias, fixtures[i].qkv_bias);
        cr_assert_eq(config->o_bias, fixtures[i].o_bias);
        cr_assert_eq(config->qk_norm, fixtures[i].qk_norm);
        for (int layer = 0; layer < config->n_layers; layer++) {
            for (int role = 0; role < CHECKPOINT_N_ROLES; role++) {
                bool q_bias = role >= CHECKPOINT_Q_BIAS && role <= CHECKPOINT_V_BIAS;
                bool norm = role == CHECKPOINT_Q_NORM || role == CHECKPOINT_K_NORM;
                if (q_bias && !config->qkv_bias) continue;
                if (role == CHECKPOINT_O_BIAS && !config->o_bias) continue;
                if (norm && !config->qk_norm) continue;
                struct checkpoint_tensor tensor =
                    checkpoint_tensor(checkpoint, (enum checkpoint_role)role, layer);
                cr_assert_eq(tensor.dtype, fixtures[i].dtype);
                cr_assert(readable(tensor), "%s: role %d, layer %d", dir, role, layer);
            }
        }
        checkpoint_close(checkpoint);
    }
}

Test(checkpoint, gives_the_shapes_of_the_contract) {
    struct checkpoint *checkpoint;
    struct error err = {0};
    cr_assert_eq(checkpoint_open(&checkpoint, FIXTURES "qwen2-14-2-hd64", &err), STATUS_OK);
    const struct model_config *c = checkpoint_config(checkpoint);
    struct checkpoint_tensor q = checkpoint_tensor(checkpoint, CHECKPOINT_Q, 0);
    cr_assert(q.rows == 14 * 64 && q.cols == c->hidden);
    struct checkpoint_tensor k_bias = checkpoint_tensor(checkpoint, CHECKPOINT_K_BIAS, 0);
    cr_assert(k_bias.rows == 2 * 64 && k_bias.cols == 1);
    struct checkpoint_tensor down = checkpoint_tensor(checkpoint, CHECKPOINT_DOWN, 0);
    cr_assert(down.rows == c->hidden && down.cols == c->intermediate);
    struct checkpoint_tensor head = checkpoint_tensor(checkpoint, CHECKPOINT_LM_HEAD, 0);
    struct checkpoint_tensor table = checkpoint_tensor(checkpoint, CHECKPOINT_EMBEDDING, 0);
    cr_assert(head.rows == c->vocab && head.cols == c->hidden && head.data != table.data);
    checkpoint_close(checkpoint);
    cr_assert_eq(checkpoint_open(&checkpoint, FIXTURES "llama-tied-f16", &err), STATUS_OK);
    cr_assert_eq(checkpoint_tensor(checkpoint, CHECKPOINT_LM_HEAD, 0).data,
                 checkpoint_tensor(checkpoint, CHECKPOINT_EMBEDDING, 0).data);
    checkpoint_close(checkpoint);
}

static uint64_t fingerprint_of(const char *dir) {
    struct checkpoint *checkpoint;
    struct error err = {0};
    if (checkpoint_open(&checkpoint, dir, &err) != STATUS_OK) {
        printf("%s\n", err.text);
        return 0;
    }
    uint64_t fingerprint = checkpoint_fingerprint(checkpoint);
    checkpoint_close(checkpoint);
    return fingerprint;
}

Test(checkpoint, fingerprint_tells_checkpoints_apart) {
    char dir[64];
    files_make(dir, "llama-f32-sharded");
    uint64_t original = fingerprint_of(FIXTURES "llama-f32-sharded");
    cr_assert(original != 0);
    cr_assert_eq(fingerprint_of(dir), original); /* the folder's name is no part of it */
    files_patch_json(dir, "config.json", "{\"rms_norm_eps\": 1e-6}");
    uint64_t other = fingerprint_of(dir);
    cr_assert(other != original && other != 0);
    files_patch_json(dir, "generation_config.json", "{\"eos_token_id\": 9}");
    cr_assert(fingerprint_of(dir) != other);
    files_remove(dir);
    cr_assert(fingerprint_of(FIXTURES "mistral-window8") !=
              fingerprint_of(FIXTURES "llama-linear-rope"));
}

/* --- what is refused ----------------------------------------------------------------------- */

struct lie {
    const char *fixture;
    const char *config; /* patches; NULL: none */
    const char *header; /* of model.safetensors */
    const char *index;
    const char *words[4]; /* that the error must have; NULL in front: it opens all the same */
};

#define ENTRY(shape) "{\"dtype\": \"BF16\", \"shape\": " shape ", \"data_offsets\": [0, 0]}"

static const struct lie lies[] = {
    {"llama-linear-rope", "{\"num_hidden_layers\": 3}", NULL, NULL,
     {"model.safetensors", "\"model.layers.2.input_layernorm.weight\" is missing", "3 layers"}},
    {"llama-linear-rope", "{\"intermediate_size\": 64}", NULL, NULL,
     {"\"model.layers.0.mlp.gate_proj.weight\"", "[48, 32]", "expected [64, 32]", "config.json"}},
    {"llama-linear-rope", "{\"vocab_size\": 81}", NULL, NULL,
     {"\"model.embed_tokens.weight\"", "[80, 32]", "expected [81, 32]"}},
    {"llama-linear-rope", "{\"num_key_value_heads\": 4}", NULL, NULL,
     {"\"model.layers.0.self_attn.k_proj.weight\"", "[32, 32]", "expected [64, 32]"}},
    {"llama-linear-rope", "{\"architectures\": [\"Qwen3ForCausalLM\"]}", NULL, NULL,
     {"\"model.layers.0.self_attn.q_norm.weight\" is missing", "qwen3"}},
    {"llama-linear-rope", NULL, "{\"model.norm.weight\": {\"dtype\": \"I16\"}}", NULL,
     {"dtype of \"model.norm.weight\" is I16", "BF16, F16 or F32"}},
    {"llama-linear-rope", NULL, "{\"model.norm.weight\": {\"shape\": [4, 8]}}", NULL,
     {"shape of \"model.norm.weight\" is [4, 8]", "expected [32]"}},
    {"llama-linear-rope", NULL,
     "{\"model.layers.1.self_attn.q_proj.weight\": {\"shape\": [32, 64]}}", NULL,
     {"\"model.layers.1.self_attn.q_proj.weight\" is [32, 64]", "expected [64, 32]"}},
    {"llama-linear-rope", NULL, "{\"lm_head.weight\": {\"shape\": [2560]}}", NULL,
     {"\"lm_head.weight\" is [2560]", "expected [80, 32]"}},
    {"llama-linear-rope", NULL, "{\"model.norm.weight\": null}", NULL,
     {"model.safetensors", "tensors cover"}},
    {"llama-linear-rope", NULL, "{\"model.layers.1.self_attn.q_proj.bias\": " ENTRY("[0]") "}",
     NULL, {"\"model.layers.1.self_attn.q_proj.bias\"", "does not account for", "change the results"}},
    {"llama-linear-rope", NULL, "{\"model.layers.0.mlp.up_proj.bias\": " ENTRY("[0]") "}", NULL,
     {"\"model.layers.0.mlp.up_proj.bias\"", "does not account for"}},
    {"llama-linear-rope", NULL, "{\"lm_head.bias\": " ENTRY("[0]") "}", NULL, {"\"lm_head.bias\""}},
    {"qwen3-qk-norm", "{\"architectures\": [\"LlamaForCausalLM\"]}", NULL, NULL,
     {"self_attn.", "_norm.weight\"", "does not account for"}},
    {"llama-attention-bias", "{\"attention_bias\": false}", NULL, NULL,
     {"_proj.bias\"", "does not account for"}},
    {"llama-tied-f16", "{\"tie_word_embeddings\": false}", NULL, NULL,
     {"\"lm_head.weight\" is missing"}},
    /* Harmless: unused frequencies, a tied LM head, a layer that config.json leaves out. */
    {"llama-linear-rope", NULL,
     "{\"model.layers.0.self_attn.rotary_emb.inv_freq\": " ENTRY("[0]") "}", NULL, {NULL}},
    {"llama-linear-rope", "{\"tie_word_embeddings\": true}", NULL, NULL, {NULL}},
    {"llama-linear-rope", "{\"num_hidden_layers\": 1}", NULL, NULL, {NULL}},
    {"llama-linear-rope", NULL, "{\"something.else\": " ENTRY("[0]") "}", NULL, {NULL}},
    /* The index. */
    {"llama-f32-sharded", NULL, NULL,
     "{\"weight_map\": {\"model.norm.weight\": \"model-00009-of-00009.safetensors\"}}",
     {"index.json", "model-00009-of-00009.safetensors", "not in the folder"}},
    {"llama-f32-sharded", NULL, NULL,
     "{\"weight_map\": {\"x\": \"model-00001-of-00004.safetensors\"}}",
     {"index.json", "\"x\"", "does not have it"}},
    {"llama-f32-sharded", NULL, NULL, "{\"weight_map\": {\"model.norm.weight\": null}}",
     {"\"model.norm.weight\" is missing"}},
    {"llama-f32-sharded", NULL, NULL, "{\"weight_map\": {\"model.norm.weight\": \"../x\"}}",
     {"weight_map.\"model.norm.weight\"", "\"../x\"", "same folder"}},
    {"llama-f32-sharded", NULL, NULL, "{\"weight_map\": {\"model.norm.weight\": 1}}",
     {"weight_map.\"model.norm.weight\" is 1", "name of a file"}},
    {"llama-f32-sharded", NULL, NULL, "{\"weight_map\": null}",
     {"index.json", "weight_map is missing or empty"}},
    {"llama-f32-sharded", NULL, NULL, "{\"weight_map\": []}",
     {"index.json", "weight_map is missing or empty"}},
};

static void check_lie(const struct lie *lie) {
    char dir[64];
    struct checkpoint *checkpoint = NULL;
    struct error err = {0};
    files_make(dir, lie->fixture);
    if (lie->config != NULL) files_patch_json(dir, "config.json", lie->config);
    if (lie->header != NULL) files_patch_header(dir, lie->header);
    if (lie->index != NULL) files_patch_json(dir, "model.safetensors.index.json", lie->index);
    enum status status = checkpoint_open(&checkpoint, dir, &err);
    files_remove(dir);
    if (lie->words[0] == NULL) {
        cr_assert_eq(status, STATUS_OK, "%s", err.text);
        checkpoint_close(checkpoint);
        return;
    }
    cr_assert_neq(status, STATUS_OK, "accepted: '%s'", lie->words[0]);
    for (int i = 0; i < 4 && lie->words[i] != NULL; i++) {
        cr_assert(strstr(err.text, lie->words[i]) != NULL, "'%s' is not in: %s", lie->words[i],
                  err.text);
    }
}

Test(checkpoint, refuses_in_words) {
    log_open("test", LOG_ERROR);
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) check_lie(&lies[i]);
}

Test(checkpoint, refuses_folders_without_weights) {
    char dir[64], path[128];
    struct checkpoint *checkpoint;
    struct error err = {0};
    files_make(dir, "llama-linear-rope");
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    unlink(path);
    cr_assert_eq(checkpoint_open(&checkpoint, dir, &err), STATUS_NOT_FOUND);
    cr_assert(strstr(err.text, "neither model.safetensors nor") != NULL, "%s", err.text);
    files_remove(dir);
    cr_assert_eq(checkpoint_open(&checkpoint, dir, &err), STATUS_NOT_FOUND);
    cr_assert(strstr(err.text, "config.json: cannot open") != NULL, "%s", err.text);
}

Test(checkpoint, a_truncated_shard_is_named) {
    char dir[64], path[128];
    struct checkpoint *checkpoint;
    struct error err = {0};
    files_make(dir, "llama-f32-sharded");
    snprintf(path, sizeof path, "%s/model-00002-of-00004.safetensors", dir);
    size_t n_bytes;
    free(files_read(path, &n_bytes));
    cr_assert_eq(truncate(path, (off_t)n_bytes - 1), 0);
    cr_assert_eq(checkpoint_open(&checkpoint, dir, &err), STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "model-00002-of-00004.safetensors: truncated") != NULL, "%s",
              err.text);
    files_remove(dir);
}
