/* config.json of every family: what is accepted and what it becomes, and the words of every
 * refusal. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/config.h"
#include "tests/unit/test.h"

static const char BASE[] =
    "{\"architectures\": [\"LlamaForCausalLM\"], \"hidden_size\": 64, \"intermediate_size\": 96,"
    " \"num_hidden_layers\": 2, \"num_attention_heads\": 4, \"num_key_value_heads\": 2,"
    " \"vocab_size\": 100, \"max_position_embeddings\": 128, \"rms_norm_eps\": 1e-5,"
    " \"hidden_act\": \"silu\", \"bos_token_id\": 1, \"eos_token_id\": 2}";

/* Parses BASE with the fields of `patch` put over it; a field whose value is "(remove)" is taken
 * out. */
static enum status parse(struct model_config *out, const char *patch, const char *generation,
                         struct error *err) {
    json_t *root = json_loads(BASE, 0, NULL), *over = json_loads(patch, 0, NULL);
    if (root == NULL || over == NULL) abort();
    json_object_update(root, over);
    const char *key;
    void *next;
    json_t *value;
    json_object_foreach_safe(root, next, key, value) {
        const char *text = json_string_value(value);
        if (text != NULL && strcmp(text, "(remove)") == 0) json_object_del(root, key);
    }
    char *text = json_dumps(root, 0);
    enum status status = model_config_parse(out, "/models/m", text, strlen(text), generation,
                                            generation != NULL ? strlen(generation) : 0, err);
    free(text);
    json_decref(root);
    json_decref(over);
    return status;
}

static struct model_config accept(const char *patch, const char *generation) {
    struct model_config config;
    struct error err = {0};
    enum status status = parse(&config, patch, generation, &err);
    if (status != STATUS_OK) printf("%s\n  refused: %s\n", patch, err.text);
    if (status != STATUS_OK) config.hidden = -1;
    return config;
}

Test(config, reads_llama) {
    struct model_config c = accept("{}", NULL);
    cr_assert_eq(c.family, MODEL_LLAMA);
    cr_assert_eq(c.hidden, 64);
    cr_assert_eq(c.intermediate, 96);
    cr_assert_eq(c.n_layers, 2);
    cr_assert_eq(c.n_heads, 4);
    cr_assert_eq(c.n_kv_heads, 2);
    cr_assert_eq(c.head_dim, 16);
    cr_assert_eq(c.vocab, 100);
    cr_assert_eq(c.max_position, 128);
    cr_assert_eq(c.sliding_window, 0);
    cr_assert_eq(c.rms_eps, 1e-5f);
    cr_assert_eq(c.rope.scaling, MODEL_ROPE_PLAIN);
    cr_assert_eq(c.rope.theta, 10000.0f);
    cr_assert(!c.tied_embeddings && !c.qkv_bias && !c.o_bias && !c.qk_norm);
    cr_assert_eq(c.bos, 1);
    cr_assert_eq(c.n_eos, 1);
    cr_assert_eq(c.eos[0], 2);
}

Test(config, defaults_follow_the_family) {
    cr_assert_eq(accept("{\"num_key_value_heads\": \"(remove)\"}", NULL).n_kv_heads, 4);
    cr_assert_eq(accept("{\"num_key_value_heads\": null}", NULL).n_kv_heads, 4);
    cr_assert_eq(accept("{\"rms_norm_eps\": \"(remove)\"}", NULL).rms_eps, 1e-6f);
    struct model_config c = accept(
        "{\"bos_token_id\": \"(remove)\", \"eos_token_id\": \"(remove)\"}", NULL);
    cr_assert_eq(c.bos, 1);
    cr_assert_eq(c.n_eos, 1);
    cr_assert_eq(c.eos[0], 2);
    c = accept("{\"architectures\": [\"Qwen2ForCausalLM\"], \"bos_token_id\": \"(remove)\","
               " \"eos_token_id\": \"(remove)\"}", NULL);
    cr_assert_eq(c.bos, -1);
    cr_assert_eq(c.n_eos, 0);
    cr_assert(accept("{\"tie_word_embeddings\": true}", NULL).tied_embeddings);
    cr_assert_eq(accept("{\"head_dim\": 32}", NULL).head_dim, 32);
    cr_assert_eq(accept("{\"head_dim\": null}", NULL).head_dim, 16);
}

Test(config, biases_and_norms_follow_the_family) {
    struct model_config c = accept("{\"attention_bias\": true}", NULL);
    cr_assert(c.qkv_bias && c.o_bias && !c.qk_norm);
    c = accept("{\"architectures\": [\"Qwen2ForCausalLM\"]}", NULL);
    cr_assert(c.qkv_bias && !c.o_bias && !c.qk_norm);
    c = accept("{\"architectures\": [\"Qwen3ForCausalLM\"], \"head_dim\": 8}", NULL);
    cr_assert(!c.qkv_bias && !c.o_bias && c.qk_norm);
    cr_assert_eq(c.head_dim, 8);
    cr_assert_eq(accept("{\"architectures\": [\"Qwen3ForCausalLM\"]}", NULL).head_dim, 128);
}

Test(config, eos_ids_of_generation_config_win) {
    struct model_config c = accept("{}", "{\"eos_token_id\": [7, 8, 9]}");
    cr_assert_eq(c.n_eos, 3);
    cr_assert_eq(c.eos[2], 9);
    c = accept("{}", "{\"eos_token_id\": 5}");
    cr_assert_eq(c.n_eos, 1);
    cr_assert_eq(c.eos[0], 5);
    c = accept("{\"eos_token_id\": [3, 4]}", "{\"temperature\": 0.6}");
    cr_assert_eq(c.n_eos, 2);
    cr_assert_eq(c.eos[1], 4);
    cr_assert_eq(accept("{\"eos_token_id\": null}", NULL).n_eos, 0);
}

Test(config, sliding_windows) {
#define MISTRAL "\"architectures\": [\"MistralForCausalLM\"]"
#define QWEN2 "\"architectures\": [\"Qwen2ForCausalLM\"], \"sliding_window\": 64"
    cr_assert_eq(accept("{" MISTRAL ", \"sliding_window\": 8}", NULL).sliding_window, 8);
    cr_assert_eq(accept("{" MISTRAL ", \"sliding_window\": null}", NULL).sliding_window, 0);
    cr_assert_eq(accept("{" MISTRAL "}", NULL).sliding_window, 4096);
    cr_assert_eq(accept("{" QWEN2 "}", NULL).sliding_window, 0);
    cr_assert_eq(accept("{" QWEN2 ", \"use_sliding_window\": false}", NULL).sliding_window, 0);
    cr_assert_eq(accept("{" QWEN2 ", \"use_sliding_window\": true, \"max_window_layers\": 0}", NULL)
                     .sliding_window, 64);
    cr_assert_eq(accept("{" QWEN2 ", \"use_sliding_window\": true, \"max_window_layers\": 2}", NULL)
                     .sliding_window, 0);
    cr_assert_eq(accept("{" QWEN2 ", \"layer_types\": [\"sliding_attention\","
                        "\"sliding_attention\"]}", NULL).sliding_window, 64);
    cr_assert_eq(accept("{" QWEN2 ", \"layer_types\": [\"full_attention\", \"full_attention\"]}",
                        NULL).sliding_window, 0);
}

Test(config, rope_in_both_spellings) {
    static const char *const spellings[] = {
        "{\"rope_theta\": 500000.0, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0,"
        " \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0,"
        " \"original_max_position_embeddings\": 8192}}",
        "{\"rope_theta\": 500000, \"rope_scaling\": {\"type\": \"llama3\", \"factor\": 8,"
        " \"low_freq_factor\": 1, \"high_freq_factor\": 4,"
        " \"original_max_position_embeddings\": 8192}}",
        "{\"rope_parameters\": {\"rope_theta\": 500000.0, \"rope_type\": \"llama3\","
        " \"factor\": 8.0, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0,"
        " \"original_max_position_embeddings\": 8192}}"};
    for (int i = 0; i < 3; i++) {
        struct model_config c = accept(spellings[i], NULL);
        cr_assert_eq(c.rope.scaling, MODEL_ROPE_LLAMA3, "spelling %d", i);
        cr_assert_eq(c.rope.theta, 500000.0f, "spelling %d", i);
        cr_assert_eq(c.rope.factor, 8.0f, "spelling %d", i);
        cr_assert_eq(c.rope.low_freq_factor, 1.0f, "spelling %d", i);
        cr_assert_eq(c.rope.high_freq_factor, 4.0f, "spelling %d", i);
        cr_assert_eq(c.rope.original_max_position, 8192, "spelling %d", i);
    }
    struct model_config c = accept("{\"rope_scaling\": {\"type\": \"linear\", \"factor\": 4}}",
                                   NULL);
    cr_assert_eq(c.rope.scaling, MODEL_ROPE_LINEAR);
    cr_assert_eq(c.rope.factor, 4.0f);
    c = accept("{\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 1e6}}", NULL);
    cr_assert_eq(c.rope.scaling, MODEL_ROPE_PLAIN);
    cr_assert_eq(c.rope.theta, 1e6f);
}

static const struct {
    const char *patch;
    const char *field, *seen, *expected; /* words the error must have */
} refusals[] = {
    {"{\"architectures\": [\"MixtralForCausalLM\"]}", "field architectures", "MixtralForCausalLM",
     "Qwen3ForCausalLM"},
    {"{\"architectures\": \"(remove)\"}", "field architectures", "missing", "LlamaForCausalLM"},
    {"{\"architectures\": [\"LlamaForCausalLM\", \"LlamaForCausalLM\"]}", "architectures", "[",
     "one of"},
    {"{\"hidden_size\": \"(remove)\"}", "field hidden_size", "missing", "an integer from 1"},
    {"{\"hidden_size\": \"64\"}", "field hidden_size", "\"64\"", "an integer"},
    {"{\"hidden_size\": 64.0}", "field hidden_size", "64.0", "an integer"},
    {"{\"hidden_size\": 0}", "field hidden_size", "is 0", "from 1"},
    {"{\"hidden_size\": -64}", "field hidden_size", "-64", "from 1"},
    {"{\"hidden_size\": 4611686018427387904}", "hidden_size", "4611686018427387904", "from 1"},
    {"{\"vocab_size\": null}", "field vocab_size", "null", "an integer"},
    {"{\"num_hidden_layers\": 100000}", "field num_hidden_layers", "100000", "4096"},
    {"{\"intermediate_size\": true}", "field intermediate_size", "true", "an integer"},
    {"{\"max_position_embeddings\": \"(remove)\"}", "field max_position_embeddings", "missing",
     "an integer"},
    {"{\"num_attention_heads\": 3, \"num_key_value_heads\": 3}", "field num_attention_heads",
     "is 3", "divisor of hidden_size (64)"},
    {"{\"num_key_value_heads\": 3}", "field num_key_value_heads", "is 3",
     "divisor of num_attention_heads (4)"},
    {"{\"architectures\": [\"MistralForCausalLM\"], \"num_key_value_heads\": \"(remove)\"}",
     "field num_key_value_heads", "missing", "an integer"},
    {"{\"head_dim\": 15}", "field head_dim", "is 15", "even"},
    {"{\"head_dim\": 2048}", "field head_dim", "2048", "1024"},
    {"{\"rms_norm_eps\": 0}", "field rms_norm_eps", "is 0", "a number from"},
    {"{\"rms_norm_eps\": \"small\"}", "field rms_norm_eps", "\"small\"", "a number"},
    {"{\"hidden_act\": \"gelu\"}", "field hidden_act", "\"gelu\"", "\"silu\""},
    {"{\"mlp_bias\": true}", "field mlp_bias", "true", "false"},
    {"{\"tie_word_embeddings\": 1}", "field tie_word_embeddings", "is 1", "true or false"},
    {"{\"quantization_config\": {\"quant_method\": \"gptq\"}}", "field quantization_config", "gptq",
     "bf16, f16 and f32"},
    {"{\"num_local_experts\": 8}", "field num_local_experts", "is 8", "mixture-of-experts"},
    {"{\"num_experts\": 128}", "field num_experts", "128", "mixture-of-experts"},
    {"{\"partial_rotary_factor\": 0.5}", "field partial_rotary_factor", "0.5", "expected 1"},
    {"{\"rope_parameters\": {\"rope_theta\": 1e4, \"rope_type\": \"default\","
     " \"partial_rotary_factor\": 0.5}}", "rope_parameters.partial_rotary_factor", "0.5",
     "expected 1"},
    {"{\"architectures\": [\"Qwen2ForCausalLM\"], \"attention_bias\": true}",
     "field attention_bias", "true", "no such option"},
    {"{\"sliding_window\": 8}", "field sliding_window", "is 8", "whole context"},
    {"{\"architectures\": [\"MistralForCausalLM\"], \"sliding_window\": 0}", "field sliding_window",
     "is 0", "from 1"},
    {"{" QWEN2 ", \"use_sliding_window\": true, \"max_window_layers\": 1}",
     "field max_window_layers", "is 1", "mixtures"},
    {"{" QWEN2 ", \"layer_types\": [\"full_attention\", \"sliding_attention\"]}",
     "field layer_types", "sliding_attention", "mixtures"},
    {"{" QWEN2 ", \"layer_types\": [\"full_attention\"]}", "field layer_types", "[", "2 times"},
    {"{" QWEN2 ", \"layer_types\": [\"full_attention\", \"linear_attention\"]}",
     "field layer_types", "linear_attention", "mixtures"},
    {"{\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4}}", "rope_scaling.rope_type",
     "\"yarn\"", "\"llama3\""},
    {"{\"rope_scaling\": {\"type\": \"dynamic\", \"factor\": 4}}", "rope_scaling.type",
     "\"dynamic\"", "\"llama3\""},
    {"{\"rope_parameters\": {\"rope_type\": \"longrope\"}}", "rope_parameters.rope_type",
     "\"longrope\"", "\"llama3\""},
    {"{\"rope_scaling\": {\"factor\": 4}}", "rope_scaling.type", "missing", "a string"},
    {"{\"rope_scaling\": {\"type\": \"linear\"}}", "rope_scaling.factor", "missing", "a number"},
    {"{\"rope_scaling\": {\"type\": \"linear\", \"factor\": 0.5}}", "rope_scaling.factor", "0.5",
     "a number from 1"},
    {"{\"rope_scaling\": {\"type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4,"
     " \"high_freq_factor\": 1, \"original_max_position_embeddings\": 8192}}",
     "rope_scaling.high_freq_factor", "is 1", "more than low_freq_factor"},
    {"{\"rope_scaling\": {\"type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 1,"
     " \"high_freq_factor\": 4}}", "rope_scaling.original_max_position_embeddings", "missing",
     "an integer"},
    {"{\"rope_scaling\": \"linear\"}", "field rope_scaling", "\"linear\"", "an object"},
    {"{\"rope_parameters\": {\"full_attention\": {\"rope_type\": \"default\"}}}",
     "rope_parameters.rope_type", "missing", "\"default\""},
    {"{\"rope_scaling\": {\"type\": \"default\"}, \"rope_parameters\": {\"rope_type\":"
     " \"default\"}}", "field rope_scaling", "default", "rope_parameters"},
    {"{\"rope_theta\": -1}", "field rope_theta", "-1", "a number from 1"},
    {"{\"bos_token_id\": 100}", "field bos_token_id", "is 100", "from 0 to 99"},
    {"{\"eos_token_id\": 100}", "field eos_token_id", "is 100", "below vocab_size (100)"},
    {"{\"eos_token_id\": []}", "field eos_token_id", "[]", "list of 1 to 8"},
    {"{\"eos_token_id\": [1,2,3,4,5,6,7,8,9]}", "field eos_token_id", "[1,2", "list of 1 to 8"},
    {"{\"eos_token_id\": [1, \"2\"]}", "field eos_token_id", "\"2\"", "a token id"},
};

Test(config, refuses_in_words) {
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        struct model_config config;
        struct error err = {0};
        enum status status = parse(&config, refusals[i].patch, NULL, &err);
        cr_assert_eq(status, STATUS_INVALID_ARGUMENT, "accepted: %s", refusals[i].patch);
        const char *words[] = {"/models/m/config.json: ", refusals[i].field, refusals[i].seen,
                               refusals[i].expected};
        for (int j = 0; j < 4; j++) {
            cr_assert(strstr(err.text, words[j]) != NULL, "'%s' is not in: %s", words[j], err.text);
        }
    }
}

Test(config, refuses_what_is_not_an_object) {
    static const char *const texts[] = {"", "{", "[]", "3", "{\"a\": 1, \"a\": 2}", "{} x",
                                        "{\"a\": NaN}"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        struct model_config config;
        struct error err = {0};
        enum status status = model_config_parse(&config, "/m", texts[i], strlen(texts[i]), NULL, 0,
                                                &err);
        cr_assert_eq(status, STATUS_INVALID_ARGUMENT, "accepted: %s", texts[i]);
        cr_assert(strstr(err.text, "/m/config.json: not ") != NULL, "%s", err.text);
    }
    struct model_config config;
    struct error err = {0};
    cr_assert_eq(parse(&config, "{}", "{\"eos_token_id\": 100}", &err), STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "/models/m/generation_config.json: field eos_token_id") != NULL);
    cr_assert_eq(parse(&config, "{}", "[]", &err), STATUS_INVALID_ARGUMENT);
}

Test(config, long_values_are_shortened) {
    char patch[4000];
    snprintf(patch, sizeof patch, "{\"hidden_act\": \"%0*d\"}", 3000, 7);
    struct model_config config;
    struct error err = {0};
    cr_assert_eq(parse(&config, patch, NULL, &err), STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "000...; expected \"silu\"") != NULL, "%s", err.text);
}

Test(config, loads_a_folder_and_names_it) {
    struct model_config config;
    struct error err = {0};
    enum status status = model_config_load(
        &config, TANDEM_SOURCE_DIR "/assets/models/llama-tale-target/", &err);
    cr_assert_eq(status, STATUS_OK, "%s", err.text);
    cr_assert_str_eq(config.name, "llama-tale-target");
    cr_assert_eq(config.n_eos, 2);
    cr_assert_eq(model_config_load(&config, "/nonexistent", &err), STATUS_NOT_FOUND);
    cr_assert(strstr(err.text, "/nonexistent/config.json") != NULL);
}

Test(config, widest_product) {
    struct model_config c = accept("{}", NULL);
    cr_assert_eq(model_config_max_width(&c), 2 * 96); /* gate and up */
    c = accept("{\"vocab_size\": 5000}", NULL);
    cr_assert_eq(model_config_max_width(&c), 5000);
    c = accept("{\"head_dim\": 128}", NULL);
    cr_assert_eq(model_config_max_width(&c), (4 + 2 * 2) * 128); /* q, k and v */
    c = accept("{\"hidden_size\": 4096}", NULL);
    cr_assert_eq(model_config_max_width(&c), (4 + 2 * 2) * 1024);
    c = accept("{\"hidden_size\": 4096, \"head_dim\": 16}", NULL);
    cr_assert_eq(model_config_max_width(&c), 4096);
}
