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

/* Any ids, in any order: increments are whole characters (test_detokenizer.c: which ones). */
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
    check_refused("{\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"ByteLevel\"},"
                  "{\"type\":\"Digits\"}]}}",
                  "ByteLevel at the end");
    check_refused("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[]},\"post_processor\":{"
                  "\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"a\"}}],"
                  "\"special_tokens\":{\"a\":{\"ids\":[4294967296]}}}}",
                  "outside the vocabulary");
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

static struct token_list ids_of(const char *json, const char *text, size_t n) {
    struct tokenizer *t = NULL;
    struct token_list list = {0};
    struct error err = {0};
    cr_assert(tokenizer_parse(&t, json, strlen(json), &err) == STATUS_OK, "%s", err.text);
    cr_assert(tokenizer_encode(t, &list, text, n, false, &err) == STATUS_OK, "%s", err.text);
    tokenizer_free(t);
    return list;
}

/* A text with NUL bytes never equals a token that ends where its first NUL stands. */
Test(tokenizer, nul_bytes_are_text) {
    static const char json[] = "{\"model\":{\"type\":\"BPE\",\"ignore_merges\":true,\"unk_token\":\"u\","
                               "\"vocab\":{\"a\":0,\"u\":1},\"merges\":[]}}";
    for (int i = 0; i < 4096; i++) {
        char text[4] = {'a', 0, (char)('0' + i % 64), (char)('0' + i / 64)};
        struct token_list list = ids_of(json, text, sizeof text);
        cr_assert(list.n == 4 && list.ids[0] == 0 && list.ids[1] == 1, "text %d: %zu ids", i, list.n);
        token_list_free(&list);
    }
}

/* A character falls back to bytes when all of them are tokens; otherwise it is unknown. */
Test(tokenizer, byte_fallback_takes_whole_characters) {
    struct token_list some = ids_of("{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"unk_token\":"
                                    "\"u\",\"vocab\":{\"u\":0,\"<0xC3>\":1},\"merges\":[]}}",
                                    "\xC3\xA9", 2);
    cr_assert(some.n == 1 && some.ids[0] == 0, "%zu ids", some.n);
    token_list_free(&some);
    struct token_list all = ids_of("{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"unk_token\":"
                                   "\"u\",\"vocab\":{\"u\":0,\"<0xC3>\":1,\"<0xA9>\":2},\"merges\":[]}}",
                                   "\xC3\xA9", 2);
    cr_assert(all.n == 2 && all.ids[0] == 1 && all.ids[1] == 2, "%zu ids", all.n);
    token_list_free(&all);
}

/* --- merging against the definition ---------------------------------------------------------- */

/* Letters a..d, and merges of them: any two tokens whose whole is a token. */
enum { N_LETTERS = 4, N_MERGED = 40 };

struct plain_bpe {
    char spellings[N_LETTERS + N_MERGED][64];
    int left[N_MERGED], right[N_MERGED];
    int n_tokens;
};

static uint32_t next_random(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

static bool is_taken(const struct plain_bpe *plain, const char *spelling) {
    for (int i = 0; i < plain->n_tokens; i++) {
        if (strcmp(plain->spellings[i], spelling) == 0) return true;
    }
    return false;
}

static void make_plain(struct plain_bpe *plain, uint32_t *seed) {
    for (int i = 0; i < N_LETTERS; i++) snprintf(plain->spellings[i], 64, "%c", 'a' + i);
    plain->n_tokens = N_LETTERS;
    while (plain->n_tokens < N_LETTERS + N_MERGED) {
        int left = (int)(next_random(seed) % (uint32_t)plain->n_tokens);
        int right = (int)(next_random(seed) % (uint32_t)plain->n_tokens);
        char whole[128];
        snprintf(whole, sizeof whole, "%s%s", plain->spellings[left], plain->spellings[right]);
        if (strlen(whole) > 8 || is_taken(plain, whole)) continue;
        plain->left[plain->n_tokens - N_LETTERS] = left;
        plain->right[plain->n_tokens - N_LETTERS] = right;
        strcpy(plain->spellings[plain->n_tokens++], whole);
    }
}

static struct tokenizer *plain_tokenizer(const struct plain_bpe *plain) {
    char *json = NULL;
    size_t n_json;
    FILE *file = open_memstream(&json, &n_json);
    fprintf(file, "{\"model\":{\"type\":\"BPE\",\"vocab\":{");
    for (int i = 0; i < plain->n_tokens; i++) {
        fprintf(file, "%s\"%s\":%d", i ? "," : "", plain->spellings[i], i);
    }
    fprintf(file, "},\"merges\":[");
    for (int i = 0; i < N_MERGED; i++) {
        fprintf(file, "%s[\"%s\",\"%s\"]", i ? "," : "", plain->spellings[plain->left[i]],
                plain->spellings[plain->right[i]]);
    }
    fprintf(file, "]}}");
    fclose(file);
    struct tokenizer *t = NULL;
    struct error err = {0};
    cr_assert(tokenizer_parse(&t, json, n_json, &err) == STATUS_OK, "%s", err.text);
    free(json);
    return t;
}

/* One merge at a time: the first rule that applies anywhere, at its leftmost place. */
static int merge_plainly(const struct plain_bpe *plain, int32_t *ids, int n) {
    for (int rule = 0; rule < N_MERGED; rule++) {
        int at = 0;
        while (at + 1 < n && !(ids[at] == plain->left[rule] && ids[at + 1] == plain->right[rule])) at++;
        if (at + 1 >= n) continue;
        ids[at] = N_LETTERS + rule;
        memmove(ids + at + 1, ids + at + 2, (size_t)(n - at - 2) * sizeof *ids);
        n--;
        rule = -1; /* from the first rule again */
    }
    return n;
}

Test(tokenizer, short_and_long_pieces_merge_by_rank) {
    for (uint32_t round = 1; round <= 200; round++) {
        uint32_t seed = round;
        struct plain_bpe plain;
        make_plain(&plain, &seed);
        struct tokenizer *t = plain_tokenizer(&plain);
        int32_t ids[200];
        char text[200];
        int n = 1 + (int)(next_random(&seed) % 199);
        for (int i = 0; i < n; i++) {
            ids[i] = (int32_t)(next_random(&seed) % N_LETTERS);
            text[i] = (char)('a' + ids[i]);
        }
        int n_ids = merge_plainly(&plain, ids, n);
        struct token_list list = {0};
        struct error err;
        cr_assert(tokenizer_encode(t, &list, text, (size_t)n, false, &err) == STATUS_OK);
        bool same = (int)list.n == n_ids && memcmp(list.ids, ids, list.n * sizeof *ids) == 0;
        cr_assert(same, "seed %u: %d letters: %zu ids, expected %d", round, n, list.n, n_ids);
        token_list_free(&list);
        tokenizer_free(t);
    }
}

/* LlamaTokenizer's switches decide on BOS and EOS, with or without a template. */
Test(tokenizer, config_switches_bos_and_eos) {
    static const char json[] = "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"<s>\":1,\"</s>\":2},"
                               "\"merges\":[]}}";
    static const struct {
        const char *config;
        size_t n;
        int32_t ids[3];
    } cases[] = {
        {"{\"tokenizer_class\":\"LlamaTokenizer\",\"add_bos_token\":true,\"bos_token\":\"<s>\"}",
         2, {1, 0}},
        {"{\"tokenizer_class\":\"LlamaTokenizerFast\",\"add_bos_token\":true,\"add_eos_token\":true,"
         "\"bos_token\":{\"content\":\"<s>\"},\"eos_token\":\"</s>\"}", 3, {1, 0, 2}},
        {"{\"tokenizer_class\":\"LlamaTokenizer\",\"add_bos_token\":false,\"bos_token\":\"<s>\"}",
         1, {0}},
        {"{\"tokenizer_class\":\"GPT2Tokenizer\",\"add_bos_token\":true,\"bos_token\":\"<s>\"}",
         1, {0}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct tokenizer *t = NULL;
        struct token_list list = {0};
        struct error err;
        cr_assert(tokenizer_parse(&t, json, strlen(json), &err) == STATUS_OK);
        json_t *config = json_loads(cases[i].config, 0, NULL);
        tokenizer_apply_config(t, config);
        json_decref(config);
        cr_assert(tokenizer_encode(t, &list, "a", 1, true, &err) == STATUS_OK);
        cr_assert(list.n == cases[i].n && memcmp(list.ids, cases[i].ids, 4 * list.n) == 0, "case %zu", i);
        token_list_free(&list);
        tokenizer_free(t);
    }
}
