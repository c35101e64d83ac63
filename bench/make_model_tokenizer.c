/* The tokenizer of a made-up model: generated, or copied from another folder. */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/make_model.h"
#include "model/json.h"

/* Words are spelled over 27 first letters (a blank, a..z) and 26 following ones, 2 to 4 letters
 * long. */
enum {
    N_BYTES = 256,
    N_SPECIAL = 2,
    FIRST = 27,
    NEXT = 26,
    N_WORDS = FIRST * NEXT + FIRST * NEXT * NEXT + FIRST * NEXT * NEXT * NEXT,
    MAX_TOKENIZER_BYTES = 256 << 20,
};

/* GPT-2's spelling of a byte as a printable character: itself where printable, else from U+0100
 * on. */
static int byte_character(int byte) {
    int next = 256;
    for (int b = 0; b < 256; b++) {
        bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        int character = printable ? b : next++;
        if (b == byte) return character;
    }
    return -1;
}

/* The character as UTF-8, escaped as JSON asks. */
static void byte_spelling(char out[8], int byte) {
    int c = byte_character(byte);
    if (c == '"' || c == '\\') {
        snprintf(out, 8, "\\%c", c);
    } else if (c < 128) {
        snprintf(out, 8, "%c", c);
    } else {
        snprintf(out, 8, "%c%c", 0xc0 | c >> 6, 0x80 | (c & 0x3f));
    }
}

/* Word number `word` as the word it grows from and its last letter. Every shorter word has a
 * smaller number, so that merges can be listed in order. */
static void word_spelling(char left[16], char right[2], int word) {
    char spaced[8], letters[5] = "";
    byte_spelling(spaced, ' ');
    int length = 2, count = FIRST * NEXT;
    while (word >= count) {
        word -= count;
        count *= NEXT;
        length++;
    }
    for (int i = length - 1; i > 0; i--) {
        letters[i - 1] = (char)('a' + word % NEXT);
        word /= NEXT;
    }
    char first[2] = {(char)('a' + word - 1), '\0'};
    snprintf(right, 2, "%c", letters[length - 2]);
    letters[length - 2] = '\0';
    snprintf(left, 16, "%s%s", word == 0 ? spaced : first, letters);
}

static void write_added(FILE *out, int id, const char *name, const char *comma) {
    fprintf(out,
            "    {\"id\": %d, \"content\": \"%s\", \"single_word\": false, \"lstrip\": false, "
            "\"rstrip\": false, \"normalized\": false, \"special\": true}%s\n", id, name, comma);
}

static void write_pipeline(FILE *out, int bos) {
    fprintf(out,
            "  \"normalizer\": null,\n"
            "  \"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
            "\"trim_offsets\": true, \"use_regex\": true},\n"
            "  \"post_processor\": {\n    \"type\": \"TemplateProcessing\",\n"
            "    \"single\": [{\"SpecialToken\": {\"id\": \"<|begin|>\", \"type_id\": 0}}, "
            "{\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}],\n"
            "    \"pair\": [{\"SpecialToken\": {\"id\": \"<|begin|>\", \"type_id\": 0}}, "
            "{\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}, "
            "{\"Sequence\": {\"id\": \"B\", \"type_id\": 1}}],\n"
            "    \"special_tokens\": {\"<|begin|>\": {\"id\": \"<|begin|>\", \"ids\": [%d], "
            "\"tokens\": [\"<|begin|>\"]}}\n  },\n"
            "  \"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": true, "
            "\"trim_offsets\": true, \"use_regex\": true},\n", bos);
}

static void write_model(FILE *out, int n_words) {
    char left[16], right[2], spelling[8];
    fprintf(out, "  \"model\": {\n    \"type\": \"BPE\", \"dropout\": null, \"unk_token\": null, "
                 "\"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null, "
                 "\"fuse_unk\": false, \"byte_fallback\": false, \"ignore_merges\": false,\n"
                 "    \"vocab\": {");
    for (int byte = 0; byte < N_BYTES; byte++) {
        byte_spelling(spelling, byte);
        fprintf(out, "%s\n      \"%s\": %d", byte > 0 ? "," : "", spelling, byte);
    }
    for (int word = 0; word < n_words; word++) {
        word_spelling(left, right, word);
        fprintf(out, ",\n      \"%s%s\": %d", left, right, N_BYTES + word);
    }
    fprintf(out, "\n    },\n    \"merges\": [");
    for (int word = 0; word < n_words; word++) {
        word_spelling(left, right, word);
        fprintf(out, "%s\n      \"%s %s\"", word > 0 ? "," : "", left, right);
    }
    fprintf(out, "\n    ]\n  }\n}\n");
}

static enum status open_output(FILE **out, char path[PATH_MAX], const char *dir, const char *name,
                               struct error *err) {
    snprintf(path, PATH_MAX, "%s/%s", dir, name);
    *out = fopen(path, "w");
    if (*out != NULL) return STATUS_OK;
    return error_set(err, STATUS_INTERNAL, "%s: cannot write: %s", path, strerror(errno));
}

static enum status close_output(FILE *out, const char *path, struct error *err) {
    bool failed = ferror(out) != 0;
    if (fclose(out) != 0) failed = true;
    if (!failed) return STATUS_OK;
    return error_set(err, STATUS_INTERNAL, "%s: cannot write: %s", path, strerror(errno));
}

enum status make_model_write_tokenizer(const char *dir, int vocab, struct error *err) {
    int n_words = vocab - N_BYTES - N_SPECIAL;
    if (n_words < 0 || n_words > N_WORDS) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "--vocab is %d; expected %d to %d, or --tokenizer DIR", vocab,
                         N_BYTES + N_SPECIAL, N_BYTES + N_SPECIAL + N_WORDS);
    }
    char path[PATH_MAX];
    FILE *out;
    TRY(open_output(&out, path, dir, "tokenizer.json", err));
    fprintf(out, "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n"
                 "  \"added_tokens\": [\n");
    write_added(out, vocab - 2, "<|begin|>", ",");
    write_added(out, vocab - 1, "<|end|>", "");
    fprintf(out, "  ],\n");
    write_pipeline(out, vocab - 2);
    write_model(out, n_words);
    TRY(close_output(out, path, err));
    TRY(open_output(&out, path, dir, "tokenizer_config.json", err));
    fprintf(out, "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n"
                 "  \"bos_token\": \"<|begin|>\",\n  \"eos_token\": \"<|end|>\",\n"
                 "  \"add_bos_token\": true,\n  \"clean_up_tokenization_spaces\": false\n}\n");
    return close_output(out, path, err);
}

/* --- copying -------------------------------------------------------------------------------- */

static enum status copy_parsed(json_t **root, const char *dir, const char *from, const char *name,
                               struct error *err) {
    char path[PATH_MAX], *text;
    size_t n_bytes;
    FILE *out;
    snprintf(path, sizeof path, "%s/%s", from, name);
    TRY(json_read_file(&text, &n_bytes, path, MAX_TOKENIZER_BYTES, err));
    enum status status = json_parse(root, path, text, n_bytes, err);
    if (status == STATUS_OK) {
        status = open_output(&out, path, dir, name, err);
        if (status == STATUS_OK) {
            fwrite(text, 1, n_bytes, out);
            status = close_output(out, path, err);
        }
        if (status != STATUS_OK) json_decref(*root);
    }
    free(text);
    return status;
}

/* The id of the token that tokenizer_config.json names under `field`, -1 if it names none. */
static int named_id(const json_t *config, const json_t *tokenizer, const char *field) {
    const json_t *name = json_object_get(config, field);
    if (json_is_object(name)) name = json_object_get(name, "content");
    if (!json_is_string(name)) return -1;
    size_t i;
    json_t *token;
    json_array_foreach(json_object_get(tokenizer, "added_tokens"), i, token) {
        if (json_equal(json_object_get(token, "content"), name)) {
            return (int)json_integer_value(json_object_get(token, "id"));
        }
    }
    const json_t *vocab = json_object_get(json_object_get(tokenizer, "model"), "vocab");
    const json_t *id = json_object_get(vocab, json_string_value(name));
    return json_is_integer(id) ? (int)json_integer_value(id) : -1;
}

static int tokenizer_ids(const json_t *tokenizer) {
    json_int_t most = -1;
    size_t i;
    const char *name;
    json_t *token;
    json_array_foreach(json_object_get(tokenizer, "added_tokens"), i, token) {
        json_int_t id = json_integer_value(json_object_get(token, "id"));
        if (id > most) most = id;
    }
    json_t *vocab = json_object_get(json_object_get(tokenizer, "model"), "vocab");
    json_object_foreach(vocab, name, token) {
        if (json_integer_value(token) > most) most = json_integer_value(token);
    }
    return most < INT_MAX ? (int)most + 1 : INT_MAX;
}

enum status make_model_copy_tokenizer(const char *dir, const char *from, int *bos, int *eos,
                                      int *size, struct error *err) {
    json_t *tokenizer, *config;
    TRY(copy_parsed(&tokenizer, dir, from, "tokenizer.json", err));
    enum status status = copy_parsed(&config, dir, from, "tokenizer_config.json", err);
    if (status == STATUS_OK) {
        *bos = named_id(config, tokenizer, "bos_token");
        *eos = named_id(config, tokenizer, "eos_token");
        *size = tokenizer_ids(tokenizer);
        json_decref(config);
    }
    json_decref(tokenizer);
    return status;
}
