#include "model/config.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/json.h"

/* Limits of what is accepted: far beyond any published model, small enough that the products the
 * engine forms of them (heads x head_dim, rows of stacked weights) stay inside int. */
enum {
    MAX_CONFIG_BYTES = 16 << 20,
    MAX_HIDDEN = 1 << 18,
    MAX_LAYERS = 4096,
    MAX_HEADS = 4096,
    MAX_HEAD_DIM = 1024,
    MAX_INTERMEDIATE = 1 << 20,
    MAX_VOCAB = 1 << 24,
    MAX_POSITION = 1 << 27,
};

/* What a family assumes where config.json is silent: its class defaults in transformers. */
struct family_row {
    const char *architecture;
    const char *name;
    int bos, eos;          /* -1: none */
    int head_dim;          /* 0: hidden / heads */
    int sliding_window;    /* where the field is missing (not null) */
    bool kv_heads_default; /* a missing num_key_value_heads means as many as query heads */
    bool attention_bias;   /* has the attention_bias option */
    bool window_layers;    /* sliding_window counts only with use_sliding_window */
};

static const struct family_row families[] = {
    [MODEL_LLAMA] = {"LlamaForCausalLM", "llama", 1, 2, 0, 0, true, true, false},
    [MODEL_MISTRAL] = {"MistralForCausalLM", "mistral", 1, 2, 0, 4096, false, false, false},
    [MODEL_QWEN2] = {"Qwen2ForCausalLM", "qwen2", -1, -1, 0, 0, false, false, true},
    [MODEL_QWEN3] = {"Qwen3ForCausalLM", "qwen3", -1, -1, 128, 0, false, true, true},
};

const char *model_family_name(enum model_family family) {
    return families[family].name;
}

static enum status read_architecture(struct model_config *out, const struct json_place *place,
                                     struct error *err) {
    static const char expected[] = "one of [\"LlamaForCausalLM\"], [\"MistralForCausalLM\"], "
                                   "[\"Qwen2ForCausalLM\"], [\"Qwen3ForCausalLM\"]";
    const json_t *list = json_object_get(place->object, "architectures");
    const char *name = json_string_value(json_array_get(list, 0));
    if (json_array_size(list) != 1 || name == NULL) {
        return json_refuse(place, "architectures", expected, err);
    }
    for (int i = 0; i < (int)(sizeof families / sizeof *families); i++) {
        if (strcmp(name, families[i].architecture) == 0) {
            out->family = (enum model_family)i;
            return STATUS_OK;
        }
    }
    return json_refuse(place, "architectures", expected, err);
}

/* Features that change the arithmetic and that no family here computes. */
static enum status refuse_foreign_features(const struct json_place *place, struct error *err) {
    static const struct {
        const char *field, *expected;
    } absent[] = {
        {"quantization_config", "none: only bf16, f16 and f32 weights are read (--weights int8 "
                                "quantises at load)"},
        {"num_local_experts", "none: mixture-of-experts models are not supported"},
        {"num_experts", "none: mixture-of-experts models are not supported"},
        {"n_routed_experts", "none: mixture-of-experts models are not supported"},
    };
    for (size_t i = 0; i < sizeof absent / sizeof *absent; i++) {
        if (json_has(place, absent[i].field)) {
            return json_refuse(place, absent[i].field, absent[i].expected, err);
        }
    }
    const char *act = "silu";
    TRY(json_get_string(&act, place, "hidden_act", JSON_OPTIONAL, err));
    if (strcmp(act, "silu") != 0) return json_refuse(place, "hidden_act", "\"silu\"", err);
    bool mlp_bias = false;
    TRY(json_get_bool(&mlp_bias, place, "mlp_bias", JSON_OPTIONAL, err));
    if (mlp_bias) {
        return json_refuse(place, "mlp_bias", "false: biases in the MLP are not supported", err);
    }
    float rotary = 1;
    TRY(json_get_float(&rotary, place, "partial_rotary_factor", JSON_OPTIONAL, 0, 1, err));
    if (rotary != 1) {
        return json_refuse(place, "partial_rotary_factor", "1: partial rotation is not supported",
                           err);
    }
    return STATUS_OK;
}

static enum status read_heads(struct model_config *out, const struct json_place *place,
                              struct error *err) {
    const struct family_row *family = &families[out->family];
    TRY(json_get_int(&out->n_heads, place, "num_attention_heads", JSON_REQUIRED, 1, MAX_HEADS,
                     err));
    out->n_kv_heads = out->n_heads;
    bool silent = json_object_get(place->object, "num_key_value_heads") == NULL;
    enum json_need need = silent && !family->kv_heads_default ? JSON_REQUIRED : JSON_OPTIONAL;
    TRY(json_get_int(&out->n_kv_heads, place, "num_key_value_heads", need, 1, MAX_HEADS, err));
    if (out->n_heads % out->n_kv_heads != 0) {
        char expected[64];
        snprintf(expected, sizeof expected, "a divisor of num_attention_heads (%d)", out->n_heads);
        return json_refuse(place, "num_key_value_heads", expected, err);
    }
    bool head_dim_given = json_has(place, "head_dim");
    if (!head_dim_given && family->head_dim == 0 && out->hidden % out->n_heads != 0) {
        char expected[80];
        snprintf(expected, sizeof expected,
                 "a divisor of hidden_size (%d) when head_dim is missing", out->hidden);
        return json_refuse(place, "num_attention_heads", expected, err);
    }
    out->head_dim = family->head_dim != 0 ? family->head_dim : out->hidden / out->n_heads;
    TRY(json_get_int(&out->head_dim, place, "head_dim", JSON_OPTIONAL, 2, MAX_HEAD_DIM, err));
    if (out->head_dim % 2 != 0 || out->head_dim > MAX_HEAD_DIM) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "%s: field head_dim is %d%s; expected an even number from 2 to %d",
                         place->file, out->head_dim,
                         head_dim_given ? "" : " (hidden_size / num_attention_heads)",
                         MAX_HEAD_DIM);
    }
    return STATUS_OK;
}

static enum status read_sizes(struct model_config *out, const struct json_place *place,
                              struct error *err) {
    TRY(json_get_int(&out->hidden, place, "hidden_size", JSON_REQUIRED, 1, MAX_HIDDEN, err));
    TRY(json_get_int(&out->n_layers, place, "num_hidden_layers", JSON_REQUIRED, 1, MAX_LAYERS,
                     err));
    TRY(json_get_int(&out->intermediate, place, "intermediate_size", JSON_REQUIRED, 1,
                     MAX_INTERMEDIATE, err));
    TRY(json_get_int(&out->vocab, place, "vocab_size", JSON_REQUIRED, 1, MAX_VOCAB, err));
    TRY(json_get_int(&out->max_position, place, "max_position_embeddings", JSON_REQUIRED, 1,
                     MAX_POSITION, err));
    out->rms_eps = 1e-6f;
    TRY(json_get_float(&out->rms_eps, place, "rms_norm_eps", JSON_OPTIONAL, 1e-12, 1e-1, err));
    TRY(json_get_bool(&out->tied_embeddings, place, "tie_word_embeddings", JSON_OPTIONAL, err));
    return read_heads(out, place, err);
}

static enum status read_biases(struct model_config *out, const struct json_place *place,
                               struct error *err) {
    bool bias = false;
    TRY(json_get_bool(&bias, place, "attention_bias", JSON_OPTIONAL, err));
    if (bias && !families[out->family].attention_bias) {
        char expected[80];
        snprintf(expected, sizeof expected, "false: %s has no such option",
                 families[out->family].architecture);
        return json_refuse(place, "attention_bias", expected, err);
    }
    out->qkv_bias = bias || out->family == MODEL_QWEN2;
    out->o_bias = bias;
    out->qk_norm = out->family == MODEL_QWEN3;
    return STATUS_OK;
}

/* --- sliding window ------------------------------------------------------------------------- */

/* layer_types, where given, must be as long as the model and the same for every layer. */
static enum status read_layer_types(bool *given, bool *sliding, const struct model_config *config,
                                    const struct json_place *place, struct error *err) {
    const json_t *list = json_object_get(place->object, "layer_types");
    *given = json_has(place, "layer_types");
    if (!*given) return STATUS_OK;
    char expected[120];
    snprintf(expected, sizeof expected,
             "%d times \"full_attention\" or %d times \"sliding_attention\": mixtures are not "
             "supported", config->n_layers, config->n_layers);
    if (json_array_size(list) != (size_t)config->n_layers) {
        return json_refuse(place, "layer_types", expected, err);
    }
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *type = json_string_value(json_array_get(list, i));
        bool slides = type != NULL && strcmp(type, "sliding_attention") == 0;
        bool known = slides || (type != NULL && strcmp(type, "full_attention") == 0);
        if (!known || (i > 0 && slides != *sliding)) {
            return json_refuse(place, "layer_types", expected, err);
        }
        *sliding = slides;
    }
    return STATUS_OK;
}

/* Qwen: a window only with use_sliding_window, and then in the layers from max_window_layers on. */
static enum status read_window_layers(bool *sliding, const struct model_config *config,
                                      const struct json_place *place, struct error *err) {
    bool used = false;
    TRY(json_get_bool(&used, place, "use_sliding_window", JSON_OPTIONAL, err));
    *sliding = false;
    if (!used) return STATUS_OK;
    int full_layers = 28; /* the class default */
    TRY(json_get_int(&full_layers, place, "max_window_layers", JSON_OPTIONAL, 0, MAX_LAYERS, err));
    if (full_layers > 0 && full_layers < config->n_layers) {
        char expected[120];
        snprintf(expected, sizeof expected,
                 "0 or at least num_hidden_layers (%d) with use_sliding_window: mixtures are not "
                 "supported", config->n_layers);
        return json_refuse(place, "max_window_layers", expected, err);
    }
    *sliding = full_layers == 0;
    return STATUS_OK;
}

static enum status read_window(struct model_config *out, const struct json_place *place,
                               struct error *err) {
    const struct family_row *family = &families[out->family];
    int window = 0;
    if (json_object_get(place->object, "sliding_window") == NULL) window = family->sliding_window;
    TRY(json_get_int(&window, place, "sliding_window", JSON_OPTIONAL, 1, INT_MAX, err));
    if (out->family == MODEL_LLAMA && window != 0) {
        return json_refuse(place, "sliding_window",
                           "none: LlamaForCausalLM attends to the whole context", err);
    }
    bool types_given, sliding = window != 0;
    TRY(read_layer_types(&types_given, &sliding, out, place, err));
    if (!types_given && family->window_layers) TRY(read_window_layers(&sliding, out, place, err));
    if (sliding && window == 0) {
        return json_refuse(place, "sliding_window", "the window's width, as its layers slide", err);
    }
    out->sliding_window = sliding ? window : 0;
    return STATUS_OK;
}

/* --- rope ----------------------------------------------------------------------------------- */

static enum status read_rope_llama3(struct model_rope *rope, const struct json_place *place,
                                    struct error *err) {
    rope->scaling = MODEL_ROPE_LLAMA3;
    TRY(json_get_float(&rope->low_freq_factor, place, "low_freq_factor", JSON_REQUIRED, 1e-3, 1e6,
                       err));
    TRY(json_get_float(&rope->high_freq_factor, place, "high_freq_factor", JSON_REQUIRED, 1e-3, 1e6,
                       err));
    if (!(rope->high_freq_factor > rope->low_freq_factor)) {
        return json_refuse(place, "high_freq_factor", "more than low_freq_factor", err);
    }
    return json_get_int(&rope->original_max_position, place, "original_max_position_embeddings",
                        JSON_REQUIRED, 1, MAX_POSITION, err);
}

/* The object rope_scaling (older files) or rope_parameters (newer ones, with rope_theta inside). */
static enum status read_rope_object(struct model_rope *rope, const struct json_place *place,
                                    struct error *err) {
    TRY(json_get_float(&rope->theta, place, "rope_theta", JSON_OPTIONAL, 1, 1e12, err));
    float rotary = 1;
    TRY(json_get_float(&rotary, place, "partial_rotary_factor", JSON_OPTIONAL, 0, 1, err));
    if (rotary != 1) {
        return json_refuse(place, "partial_rotary_factor", "1: partial rotation is not supported",
                           err);
    }
    const char *field = json_has(place, "rope_type") ? "rope_type" : "type";
    const char *type = NULL;
    enum json_need need = strcmp(place->prefix, "rope_scaling.") == 0 ? JSON_REQUIRED
                                                                      : JSON_OPTIONAL;
    TRY(json_get_string(&type, place, field, need, err));
    if (type == NULL) {
        /* Per-layer-type objects have no type here, nor has a plain {"rope_theta": ...}. */
        if (json_has(place, "rope_theta")) return STATUS_OK;
        return json_refuse(place, "rope_type", "\"default\", \"linear\" or \"llama3\"", err);
    }
    if (strcmp(type, "default") == 0) return STATUS_OK;
    bool linear = strcmp(type, "linear") == 0;
    if (!linear && strcmp(type, "llama3") != 0) {
        return json_refuse(place, field, "\"default\", \"linear\" or \"llama3\"", err);
    }
    TRY(json_get_float(&rope->factor, place, "factor", JSON_REQUIRED, 1, 1e6, err));
    rope->scaling = MODEL_ROPE_LINEAR;
    return linear ? STATUS_OK : read_rope_llama3(rope, place, err);
}

static enum status read_rope(struct model_config *out, const struct json_place *place,
                             struct error *err) {
    out->rope = (struct model_rope){.theta = 10000.0f, .scaling = MODEL_ROPE_PLAIN, .factor = 1};
    TRY(json_get_float(&out->rope.theta, place, "rope_theta", JSON_OPTIONAL, 1, 1e12, err));
    bool older = json_has(place, "rope_scaling"), newer = json_has(place, "rope_parameters");
    if (!older && !newer) return STATUS_OK;
    if (older && newer) {
        return json_refuse(place, "rope_scaling", "nothing where rope_parameters is given too",
                           err);
    }
    const char *field = older ? "rope_scaling" : "rope_parameters";
    const json_t *object = json_object_get(place->object, field);
    if (!json_is_object(object)) return json_refuse(place, field, "an object or null", err);
    struct json_place inner = {object, place->file, older ? "rope_scaling." : "rope_parameters."};
    return read_rope_object(&out->rope, &inner, err);
}

/* --- special tokens ------------------------------------------------------------------------- */

static enum status read_eos(struct model_config *out, const struct json_place *place,
                            struct error *err) {
    const json_t *value = json_object_get(place->object, "eos_token_id");
    if (value == NULL) return STATUS_OK;
    char expected[120];
    snprintf(expected, sizeof expected, "a token id below vocab_size (%d), or a list of 1 to %d",
             out->vocab, MODEL_MAX_EOS);
    size_t n = json_is_array(value) ? json_array_size(value) : 1;
    if (n < 1 || n > MODEL_MAX_EOS) return json_refuse(place, "eos_token_id", expected, err);
    out->n_eos = 0;
    if (json_is_null(value)) return STATUS_OK;
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_is_array(value) ? json_array_get(value, i) : value;
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= out->vocab) {
            return json_refuse(place, "eos_token_id", expected, err);
        }
        out->eos[out->n_eos++] = (int)json_integer_value(id);
    }
    return STATUS_OK;
}

static enum status read_special_tokens(struct model_config *out, const struct json_place *place,
                                       struct error *err) {
    const struct family_row *family = &families[out->family];
    bool silent = json_object_get(place->object, "bos_token_id") == NULL;
    out->bos = silent && family->bos < out->vocab ? family->bos : -1;
    TRY(json_get_int(&out->bos, place, "bos_token_id", JSON_OPTIONAL, 0, out->vocab - 1, err));
    if (family->eos >= 0 && family->eos < out->vocab) out->eos[out->n_eos++] = family->eos;
    return read_eos(out, place, err);
}

/* --- whole files ---------------------------------------------------------------------------- */

static enum status read_config(struct model_config *out, const struct json_place *place,
                               struct error *err) {
    if (!json_is_object(place->object)) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "%s: not a JSON object", place->file);
    }
    TRY(read_architecture(out, place, err));
    TRY(refuse_foreign_features(place, err));
    TRY(read_sizes(out, place, err));
    TRY(read_biases(out, place, err));
    TRY(read_window(out, place, err));
    TRY(read_rope(out, place, err));
    return read_special_tokens(out, place, err);
}

static enum status parse_config(struct model_config *out, const char *file, const char *text,
                                size_t n_bytes, struct error *err) {
    json_t *root;
    TRY(json_parse(&root, file, text, n_bytes, err));
    struct json_place place = {root, file, ""};
    enum status status = read_config(out, &place, err);
    json_decref(root);
    return status;
}

static enum status parse_generation(struct model_config *out, const char *file, const char *text,
                                    size_t n_bytes, struct error *err) {
    json_t *root;
    TRY(json_parse(&root, file, text, n_bytes, err));
    struct json_place place = {root, file, ""};
    enum status status = STATUS_OK;
    if (!json_is_object(root)) {
        status = error_set(err, STATUS_INVALID_ARGUMENT, "%s: not a JSON object", file);
    } else if (json_has(&place, "eos_token_id")) {
        status = read_eos(out, &place, err);
    }
    json_decref(root);
    return status;
}

enum status model_config_parse(struct model_config *out, const char *dir, const char *config_text,
                               size_t n_config, const char *generation_text, size_t n_generation,
                               struct error *err) {
    char file[PATH_MAX];
    memset(out, 0, sizeof *out);
    snprintf(file, sizeof file, "%s/config.json", dir);
    TRY(parse_config(out, file, config_text, n_config, err));
    if (generation_text == NULL) return STATUS_OK;
    snprintf(file, sizeof file, "%s/generation_config.json", dir);
    return parse_generation(out, file, generation_text, n_generation, err);
}

static void set_name(struct model_config *out, const char *dir) {
    char resolved[PATH_MAX];
    const char *path = realpath(dir, resolved) != NULL ? resolved : dir;
    const char *slash = strrchr(path, '/');
    snprintf(out->name, sizeof out->name, "%s", slash != NULL && slash[1] ? slash + 1 : path);
}

enum status model_config_load(struct model_config *out, const char *dir, struct error *err) {
    char path[PATH_MAX];
    char *config = NULL, *generation = NULL;
    size_t n_config = 0, n_generation = 0;
    snprintf(path, sizeof path, "%s/config.json", dir);
    TRY(json_read_file(&config, &n_config, path, MAX_CONFIG_BYTES, err));
    snprintf(path, sizeof path, "%s/generation_config.json", dir);
    enum status status = json_read_file(&generation, &n_generation, path, MAX_CONFIG_BYTES, err);
    if (status == STATUS_OK || status == STATUS_NOT_FOUND) {
        status = model_config_parse(out, dir, config, n_config, generation, n_generation, err);
    }
    free(config);
    free(generation);
    if (status == STATUS_OK) set_name(out, dir);
    return status;
}

int model_config_max_width(const struct model_config *config) {
    int widths[] = {config->hidden, 2 * config->intermediate, config->vocab,
                    (config->n_heads + 2 * config->n_kv_heads) * config->head_dim};
    int largest = 0;
    for (int i = 0; i < 4; i++) {
        if (widths[i] > largest) largest = widths[i];
    }
    return largest;
}
