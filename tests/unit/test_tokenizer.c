/* Every vector of ../shared/data/tokenizers (six tokenizers, ids agreed by independent programs), and
 * the bundled tokenizer, which needs no data from outside. */
#include "model/tokenizer.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/tokenizer_load.h"
#include "model/utf8.h"
#include "tests/unit/test.h"

#define DATA TANDEM_SOURCE_DIR "/../shared/data/tokenizers/"
#define BUNDLED TANDEM_SOURCE_DIR "/assets/models/llama-tale-target"

static struct tokenizer *load(const char *dir) {
    struct tokenizer *t = NULL;
    struct error err = {0};
    cr_assert(tokenizer_load(&t, dir, &err) == STATUS_OK, "%s", err.text);
    return t;
}

static char *decode(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special) {
    struct detokenizer *d = detokenizer_create(t, skip_special);
    char *out = NULL;
    size_t n_out;
    FILE *file = open_memstream(&out, &n_out);
    for (size_t i = 0; i <= n; i++) {
        const char *text;
        size_t n_text;
        if (i < n) detokenizer_push(d, ids[i], &text, &n_text);
        else detokenizer_finish(d, &text, &n_text);
        cr_assert(utf8_check(text, n_text) == n_text, "a piece is not whole UTF-8");
        fwrite(text, 1, n_text, file);
    }
    fclose(file);
    detokenizer_free(d);
    return out;
}

/* One line {"text", "ids"} of a vectors file. */
static void check_vector(const struct tokenizer *t, const char *line, int line_i, int *n_bad) {
    json_error_t json_err;
    json_t *vector = json_loads(line, JSON_ALLOW_NUL, &json_err);
    cr_assert(vector != NULL, "line %d: %s", line_i, json_err.text);
    const json_t *text = json_object_get(vector, "text"), *ids = json_object_get(vector, "ids");
    struct token_list list = {0};
    struct error err = {0};
    enum status status = tokenizer_encode(t, &list, json_string_value(text),
                                          json_string_length(text), false, &err);
    bool same = status == STATUS_OK && list.n == json_array_size(ids);
    for (size_t i = 0; i < list.n && same; i++) {
        same = list.ids[i] == json_integer_value(json_array_get(ids, i));
    }
    if (!same) {
        (*n_bad)++;
        fprintf(stderr, "line %d \"%.60s\": %s, %zu ids:", line_i, json_string_value(text),
                status_name(status), list.n);
        for (size_t i = 0; i < list.n && i < 12; i++) fprintf(stderr, " %d", list.ids[i]);
        fprintf(stderr, " expected");
        for (size_t i = 0; i < json_array_size(ids) && i < 12; i++) {
            fprintf(stderr, " %d", (int)json_integer_value(json_array_get(ids, i)));
        }
        fprintf(stderr, "\n");
    }
    token_list_free(&list);
    json_decref(vector);
}

static void check_vectors(const char *name) {
    char path[512];
    snprintf(path, sizeof path, DATA "%s/vectors.jsonl", name);
    FILE *file = fopen(path, "r");
    if (file == NULL) cr_skip_test("%s is not there", path);
    snprintf(path, sizeof path, DATA "%s", name);
    struct tokenizer *t = load(path);
    char *line = NULL;
    size_t capacity = 0;
    int n = 0, n_bad = 0;
    while (getline(&line, &capacity, file) > 0) check_vector(t, line, ++n, &n_bad);
    free(line);
    fclose(file);
    tokenizer_free(t);
    cr_assert(n >= 80, "only %d vectors", n);
    cr_assert(n_bad == 0, "%s: %d of %d vectors differ", name, n_bad, n);
}

Test(tokenizer, vectors_tale) { check_vectors("tale"); }
Test(tokenizer, vectors_llama3) { check_vectors("llama3"); }
Test(tokenizer, vectors_qwen25) { check_vectors("qwen2.5"); }
Test(tokenizer, vectors_gpt2) { check_vectors("gpt2"); }
Test(tokenizer, vectors_llama2) { check_vectors("llama2"); }
Test(tokenizer, vectors_mistral) { check_vectors("mistral"); }

Test(tokenizer, bundled_round_trip) {
    struct tokenizer *t = load(BUNDLED);
    static const char *const texts[] = {"Once upon a time, there was a little girl.",
                                        "Ünïcödé — 漢字 🙂\n\n  two  spaces\ttab", "", " ", "a"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        struct token_list list = {0};
        struct error err;
        cr_assert(tokenizer_encode(t, &list, texts[i], strlen(texts[i]), true, &err) == STATUS_OK);
        cr_assert(list.n >= 1 && list.ids[0] == tokenizer_find(t, "<|begin_of_text|>"));
        char *text = decode(t, list.ids, list.n, true);
        cr_assert_str_eq(text, texts[i]);
        free(text);
        token_list_free(&list);
    }
    tokenizer_free(t);
}

Test(tokenizer, special_tokens_in_text) {
    struct tokenizer *t = load(BUNDLED);
    struct token_list list = {0};
    struct error err;
    const char *text = "a<|eot_id|>b";
    cr_assert(tokenizer_encode(t, &list, text, strlen(text), false, &err) == STATUS_OK);
    cr_assert(list.n == 3 && list.ids[1] == tokenizer_find(t, "<|eot_id|>"));
    cr_assert(tokenizer_is_special(t, list.ids[1]) && !tokenizer_is_special(t, list.ids[0]));
    char *shown = decode(t, list.ids, list.n, false), *hidden = decode(t, list.ids, list.n, true);
    cr_assert_str_eq(shown, text);
    cr_assert_str_eq(hidden, "ab");
    free(shown);
    free(hidden);
    token_list_free(&list);
    tokenizer_free(t);
}

Test(tokenizer, bad_utf8_names_the_offset) {
    struct tokenizer *t = load(BUNDLED);
    struct token_list list = {0};
    struct error err;
    cr_assert(tokenizer_encode(t, &list, "abc\xff", 4, false, &err) == STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "0xff at offset 3") != NULL, "%s", err.text);
    token_list_free(&list);
    tokenizer_free(t);
}

/* Any ids, in any order: increments are whole characters and add up to the decoding at once. */
Test(tokenizer, increments_are_whole) {
    struct tokenizer *t = load(BUNDLED);
    uint32_t seed = 12345;
    for (int round = 0; round < 300; round++) {
        int32_t ids[40];
        for (int i = 0; i < 40; i++) {
            seed = seed * 1664525u + 1013904223u;
            ids[i] = (int32_t)((seed >> 8) % (round % 2 ? 260u : 4096u));
        }
        free(decode(t, ids, 40, false)); /* checks every increment */
    }
    tokenizer_free(t);
}

/* A long run is merged in n log n: a megabyte takes far less than the test's time-out. */
Test(tokenizer, long_runs) {
    struct tokenizer *t = load(BUNDLED);
    size_t n = 1 << 20;
    char *text = xmalloc(n);
    memset(text, 'a', n);
    struct token_list list = {0};
    struct error err;
    cr_assert(tokenizer_encode(t, &list, text, n, false, &err) == STATUS_OK, "%s", err.text);
    char *back = decode(t, list.ids, list.n, true);
    cr_assert(strlen(back) == n && memcmp(back, text, n) == 0);
    free(back);
    free(text);
    token_list_free(&list);
    tokenizer_free(t);
}

static void check_refused(const char *json, const char *words) {
    struct tokenizer *t;
    struct error err = {0};
    cr_assert(tokenizer_parse(&t, json, strlen(json), &err) == STATUS_INVALID_ARGUMENT, "%s", json);
    cr_assert(strstr(err.text, words) != NULL, "\"%s\" lacks \"%s\"", err.text, words);
}

Test(tokenizer, refusals_name_the_field) {
    check_refused("[]", "not an object");
    check_refused("{\"model\":{\"type\":\"Unigram\"}}", "model.type is Unigram");
    check_refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":-1},\"merges\":[]}}", "token \"a\"");
    check_refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[\"a b\"]}}",
                  "model.merges[0]");
    check_refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[]}}", "model.vocab is empty");
    check_refused("{\"normalizer\":{\"type\":\"BertNormalizer\"}}", "normalizer.type is BertNormalizer");
    check_refused("{\"pre_tokenizer\":{\"type\":\"Whitespace\"}}", "pre_tokenizer.type is Whitespace");
    check_refused("{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(\"},"
                  "\"behavior\":\"Isolated\"}}",
                  "regex");
    check_refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[]},"
                  "\"decoder\":{\"type\":\"WordPiece\"}}",
                  "decoder.type is WordPiece");
}

Test(tokenizer, fingerprints_tell_contents_apart) {
    const char *const jsons[] = {
        "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[\"a b\"]}}",
        "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":1,\"b\":0,\"ab\":2},\"merges\":[\"a b\"]}}",
        "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[]}}",
    };
    uint64_t prints[3];
    for (int i = 0; i < 3; i++) {
        struct tokenizer *t;
        struct error err;
        cr_assert(tokenizer_parse(&t, jsons[i], strlen(jsons[i]), &err) == STATUS_OK);
        prints[i] = tokenizer_fingerprint(t);
        tokenizer_free(t);
    }
    cr_assert(prints[0] != prints[1] && prints[0] != prints[2] && prints[1] != prints[2]);
}
