/* Reads tokenizer.json (and tokenizer_config.json) into a tokenizer. What is not understood is refused
 * by name: a tokenizer that almost fits would corrupt every text. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "model/tokenizer_internal.h"
#include "model/tokenizer_load.h"
#include "model/utf8.h"

/* Where errors are said to be. */
struct reader {
    struct tokenizer *t;
    const char *path;
    struct error *err;
};

static enum status bad(const struct reader *r, const char *field, const char *seen,
                       const char *expected) {
    return error_set(r->err, STATUS_INVALID_ARGUMENT, "%s: %s is %s, expected %s", r->path, field,
                     seen, expected);
}

static const char *type_of(const json_t *json) {
    const char *type = json_string_value(json_object_get(json, "type"));
    return type ? type : "without a type";
}

static bool is_null(const json_t *json) {
    return json == NULL || json_is_null(json);
}

/* --- the byte-level alphabet ----------------------------------------------------------------- */

/* GPT-2's: printable Latin-1 bytes stand for themselves, the others are U+0100 and up, in order. */
static bool stands_for_itself(int byte) {
    return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}

uint32_t byte_level_char(unsigned char byte) {
    if (stands_for_itself(byte)) return byte;
    uint32_t n = 0;
    for (int b = 0; b < byte; b++) n += !stands_for_itself(b);
    return 256 + n;
}

int byte_level_byte(uint32_t character) {
    if (character < 256) return stands_for_itself((int)character) ? (int)character : -1;
    uint32_t n = 256;
    for (int b = 0; b < 256; b++) {
        if (!stands_for_itself(b) && n++ == character) return b;
    }
    return -1;
}

/* --- vocabulary and merges ------------------------------------------------------------------- */

static void map_insert(struct tokenizer *t, int32_t id) {
    const char *spelling = t->tokens[id].spelling;
    uint32_t at = (uint32_t)XXH3_64bits(spelling, strlen(spelling));
    while (t->map.ids[at & t->map.mask] >= 0) at++;
    t->map.ids[at & t->map.mask] = id;
}

static void map_create(struct tokenizer *t) {
    uint32_t size = 64;
    while (size < 2 * (uint32_t)t->n_tokens) size *= 2;
    t->map.mask = size - 1;
    t->map.ids = xmalloc(size * sizeof *t->map.ids);
    memset(t->map.ids, 0xff, size * sizeof *t->map.ids);
}

static enum status set_token(const struct reader *r, json_int_t id, const char *spelling) {
    struct tokenizer *t = r->t;
    if (t->tokens[id].spelling != NULL) {
        if (strcmp(t->tokens[id].spelling, spelling) == 0) return STATUS_OK;
        return error_set(r->err, STATUS_INVALID_ARGUMENT,
                         "%s: token id %lld belongs to \"%s\" and to \"%s\"", r->path,
                         (long long)id, t->tokens[id].spelling, spelling);
    }
    t->tokens[id].spelling = xstrdup(spelling);
    t->tokens[id].byte = -1;
    map_insert(t, (int32_t)id);
    return STATUS_OK;
}

enum { MAX_TOKENS = 4 * 1024 * 1024 };

static enum status check_id(const struct reader *r, const json_t *id, const char *spelling) {
    if (json_is_integer(id) && json_integer_value(id) >= 0 &&
        json_integer_value(id) < MAX_TOKENS) {
        return STATUS_OK;
    }
    return error_set(r->err, STATUS_INVALID_ARGUMENT,
                     "%s: the id of token \"%.60s\" is not an integer in 0..%d", r->path, spelling,
                     MAX_TOKENS - 1);
}

static enum status count_tokens(const struct reader *r, const json_t *vocab, const json_t *added) {
    const char *spelling;
    json_t *id, *entry;
    size_t i;
    json_int_t largest = -1;
    json_object_foreach((json_t *)vocab, spelling, id) {
        TRY(check_id(r, id, spelling));
        if (json_integer_value(id) > largest) largest = json_integer_value(id);
    }
    json_array_foreach(added, i, entry) {
        const char *content = json_string_value(json_object_get(entry, "content"));
        if (content == NULL) return bad(r, "added_tokens[].content", "missing", "a string");
        id = json_object_get(entry, "id");
        TRY(check_id(r, id, content));
        if (json_integer_value(id) > largest) largest = json_integer_value(id);
    }
    if (largest < 0) return bad(r, "model.vocab", "empty", "at least one token");
    r->t->n_tokens = (int)largest + 1;
    return STATUS_OK;
}

static enum status read_vocab(const struct reader *r, const json_t *vocab, const json_t *added) {
    struct tokenizer *t = r->t;
    if (!json_is_object(vocab)) return bad(r, "model.vocab", "missing", "an object");
    TRY(count_tokens(r, vocab, added));
    t->tokens = xcalloc((size_t)t->n_tokens, sizeof *t->tokens);
    map_create(t);
    const char *spelling;
    json_t *id, *entry;
    size_t i;
    json_object_foreach((json_t *)vocab, spelling, id) {
        TRY(set_token(r, json_integer_value(id), spelling));
    }
    json_array_foreach(added, i, entry) {
        json_int_t added_id = json_integer_value(json_object_get(entry, "id"));
        TRY(set_token(r, added_id, json_string_value(json_object_get(entry, "content"))));
        t->tokens[added_id].added = true;
        t->tokens[added_id].special = json_is_true(json_object_get(entry, "special"));
    }
    return STATUS_OK;
}

/* The two halves of a merge: "a b", or ["a", "b"]. */
static bool merge_halves(const json_t *merge, const char **left, size_t *n_left, const char **right) {
    if (json_is_array(merge) && json_array_size(merge) == 2) {
        *left = json_string_value(json_array_get(merge, 0));
        *right = json_string_value(json_array_get(merge, 1));
        if (*left == NULL || *right == NULL) return false;
        *n_left = strlen(*left);
        return true;
    }
    const char *text = json_string_value(merge);
    const char *space = text ? strchr(text, ' ') : NULL;
    if (space == NULL || space == text) return false;
    *left = text;
    *n_left = (size_t)(space - text);
    *right = space + 1;
    return **right != 0;
}

static void insert_merge(struct tokenizer *t, struct merge merge) {
    uint64_t key = (uint64_t)(uint32_t)merge.left << 32 | (uint32_t)merge.right;
    uint32_t at = (uint32_t)((key * 0x9E3779B97F4A7C15u) >> 32);
    while (t->merges.merges[at & t->merges.mask].left >= 0) at++;
    t->merges.merges[at & t->merges.mask] = merge;
}

static enum status read_merges(const struct reader *r, const json_t *merges) {
    struct tokenizer *t = r->t;
    if (!json_is_array(merges)) return bad(r, "model.merges", "missing", "an array");
    uint32_t size = 64;
    while (size < 2 * json_array_size(merges)) size *= 2;
    t->merges.mask = size - 1;
    t->merges.merges = xmalloc(size * sizeof *t->merges.merges);
    for (uint32_t i = 0; i < size; i++) t->merges.merges[i].left = -1;
    t->space_starts = !t->byte_level;
    size_t i;
    json_t *entry;
    json_array_foreach(merges, i, entry) {
        const char *left, *right;
        size_t n_left;
        if (!merge_halves(entry, &left, &n_left, &right)) {
            char field[64];
            snprintf(field, sizeof field, "model.merges[%zu]", i);
            return bad(r, field, "malformed", "\"left right\" or [\"left\", \"right\"]");
        }
        size_t n_right = strlen(right);
        char whole[1024];
        if (n_left + n_right >= sizeof whole) return bad(r, "model.merges", "too long", "1023 bytes");
        memcpy(whole, left, n_left);
        memcpy(whole + n_left, right, n_right);
        struct merge merge = {token_map_find(t, left, n_left), token_map_find(t, right, n_right),
                              (int32_t)i, token_map_find(t, whole, n_left + n_right)};
        if (merge.left < 0 || merge.right < 0 || merge.id < 0) {
            return error_set(r->err, STATUS_INVALID_ARGUMENT,
                             "%s: model.merges[%zu] is \"%.*s\" + \"%.60s\": a part or the whole is "
                             "not in model.vocab", r->path, i, (int)n_left, left, right);
        }
        if (merge_map_find(t, merge.left, merge.right) == NULL) insert_merge(t, merge);
        bool joins_words = strncmp(right, "\xE2\x96\x81", 3) == 0 &&
                           !(n_left >= 3 && memcmp(left + n_left - 3, "\xE2\x96\x81", 3) == 0);
        if (joins_words) t->space_starts = false;
    }
    t->merges.n = (int)json_array_size(merges);
    return STATUS_OK;
}

/* What every token stands for in text. */
static void set_bytes(struct tokenizer *t, struct token *token) {
    size_t n = strlen(token->spelling);
    token->bytes = xmalloc(n + 1);
    token->n_bytes = 0;
    unsigned byte;
    char end;
    if (t->byte_fallback && sscanf(token->spelling, "<0x%2X%c", &byte, &end) == 2 && end == '>' &&
        n == 6) {
        token->byte = (int16_t)byte;
    }
    bool mapped = t->byte_level && !token->added;
    for (size_t at = 0; at < n && mapped;) {
        unsigned char c = (unsigned char)token->spelling[at];
        uint32_t character = c;
        if (c >= 0x80) character = (uint32_t)(c & 0x1F) << 6 | (token->spelling[at + 1] & 0x3F);
        int mapped_byte = c < 0xE0 ? byte_level_byte(character) : -1;
        if (mapped_byte < 0) mapped = false;
        else token->bytes[token->n_bytes++] = (char)mapped_byte;
        at += c < 0x80 ? 1 : 2;
    }
    if (mapped) return;
    memcpy(token->bytes, token->spelling, n + 1);
    token->n_bytes = (uint32_t)n;
}

static enum status read_model(const struct reader *r, const json_t *root) {
    struct tokenizer *t = r->t;
    const json_t *model = json_object_get(root, "model");
    const json_t *merges = json_object_get(model, "merges");
    const char *type = json_string_value(json_object_get(model, "type"));
    /* Old files name no type; only BPE has merges. */
    if (type == NULL ? !json_is_array(merges) : strcmp(type, "BPE") != 0) {
        return bad(r, "model.type", type ? type : "missing", "BPE");
    }
    const char *const absent[] = {"continuing_subword_prefix", "end_of_word_suffix", "dropout"};
    for (int i = 0; i < 3; i++) {
        const json_t *value = json_object_get(model, absent[i]);
        bool empty = is_null(value) || (json_is_string(value) && *json_string_value(value) == 0) ||
                     (json_is_number(value) && json_number_value(value) == 0);
        if (!empty) return bad(r, absent[i], "set", "null (it is not supported)");
    }
    t->ignore_merges = json_is_true(json_object_get(model, "ignore_merges"));
    t->byte_fallback = json_is_true(json_object_get(model, "byte_fallback"));
    t->fuse_unk = json_is_true(json_object_get(model, "fuse_unk"));
    TRY(read_vocab(r, json_object_get(model, "vocab"), json_object_get(root, "added_tokens")));
    TRY(read_merges(r, merges));
    const char *unk = json_string_value(json_object_get(model, "unk_token"));
    t->unk = unk ? token_map_find(t, unk, strlen(unk)) : -1;
    for (int i = 0; i < t->n_tokens; i++) {
        if (t->tokens[i].spelling != NULL) set_bytes(t, &t->tokens[i]);
    }
    for (int b = 0; b < 256; b++) {
        char spelling[8];
        size_t n;
        uint32_t c = byte_level_char((unsigned char)b);
        if (!t->byte_level) {
            n = (size_t)snprintf(spelling, sizeof spelling, "<0x%02X>", b);
        } else if (c < 0x80) {
            spelling[0] = (char)c;
            n = 1;
        } else {
            spelling[0] = (char)(0xC0 | c >> 6);
            spelling[1] = (char)(0x80 | (c & 0x3F));
            n = 2;
        }
        t->byte_ids[b] = token_map_find(t, spelling, n);
    }
    return STATUS_OK;
}

/* --- normaliser ------------------------------------------------------------------------------ */

static enum status read_normalizer(const struct reader *r, const json_t *json) {
    struct tokenizer *t = r->t;
    if (is_null(json)) return STATUS_OK;
    const char *type = type_of(json);
    if (strcmp(type, "Sequence") == 0) {
        size_t i;
        json_t *step;
        json_array_foreach(json_object_get(json, "normalizers"), i, step) {
            TRY(read_normalizer(r, step));
        }
        return STATUS_OK;
    }
    if (t->n_normalizers == TOKENIZER_MAX_STEPS) return bad(r, "normalizer", "too long", "8 steps");
    struct normalizer *step = &t->normalizers[t->n_normalizers];
    static const char *const forms[] = {"NFC", "NFD", "NFKC", "NFKD"};
    for (int i = 0; i < 4; i++) {
        if (strcmp(type, forms[i]) != 0) continue;
        step->kind = (enum normalizer_kind)i;
        t->n_normalizers++;
        return STATUS_OK;
    }
    if (strcmp(type, "Prepend") == 0) {
        const char *text = json_string_value(json_object_get(json, "prepend"));
        if (text == NULL) return bad(r, "normalizer.prepend", "missing", "a string");
        step->kind = NORMALIZE_PREPEND;
        step->content = xstrdup(text);
        t->n_normalizers++;
        return STATUS_OK;
    }
    if (strcmp(type, "Replace") == 0) {
        const char *pattern =
            json_string_value(json_object_get(json_object_get(json, "pattern"), "String"));
        const char *content = json_string_value(json_object_get(json, "content"));
        if (pattern == NULL || *pattern == 0 || content == NULL) {
            return bad(r, "normalizer.pattern", "not a string", "{\"String\": …} and content");
        }
        step->kind = NORMALIZE_REPLACE;
        step->pattern = xstrdup(pattern);
        step->content = xstrdup(content);
        t->n_normalizers++;
        return STATUS_OK;
    }
    return bad(r, "normalizer.type", type, "NFC, NFD, NFKC, NFKD, Prepend, Replace or Sequence");
}

/* --- pre-tokeniser --------------------------------------------------------------------------- */

static const char gpt2_pattern[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

static enum status compile(const struct reader *r, pcre2_code **out, const char *pattern) {
    int code;
    PCRE2_SIZE offset;
    *out = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &code,
                         &offset, NULL);
    if (*out == NULL) {
        PCRE2_UCHAR words[128];
        pcre2_get_error_message(code, words, sizeof words);
        return error_set(r->err, STATUS_INVALID_ARGUMENT,
                         "%s: the pre_tokenizer's regex is refused at offset %zu: %s (\"%.80s\")",
                         r->path, offset, (const char *)words, pattern);
    }
    pcre2_jit_compile(*out, PCRE2_JIT_COMPLETE); /* without it the interpreter serves */
    return STATUS_OK;
}

static enum status read_split(const struct reader *r, struct pretokenizer *step, const json_t *json) {
    const json_t *pattern = json_object_get(json, "pattern");
    const char *regex = json_string_value(json_object_get(pattern, "Regex"));
    const char *behavior = json_string_value(json_object_get(json, "behavior"));
    if (regex == NULL) return bad(r, "pre_tokenizer.pattern", "not a Regex", "{\"Regex\": …}");
    bool isolated = behavior && strcmp(behavior, "Isolated") == 0;
    bool removed = behavior && strcmp(behavior, "Removed") == 0;
    if (!isolated && !removed) {
        return bad(r, "pre_tokenizer.behavior", behavior ? behavior : "missing",
                   "Isolated or Removed");
    }
    bool inverted = json_is_true(json_object_get(json, "invert"));
    if (inverted && removed) return bad(r, "pre_tokenizer.invert", "true", "false with Removed");
    step->kind = PRETOKENIZE_SPLIT;
    step->removes = removed;
    return compile(r, &step->regex, regex);
}

static enum status read_metaspace(const struct reader *r, struct pretokenizer *step,
                                  const json_t *json) {
    const char *replacement = json_string_value(json_object_get(json, "replacement"));
    if (replacement == NULL || strcmp(replacement, "\xE2\x96\x81") != 0) {
        return bad(r, "pre_tokenizer.replacement", replacement ? replacement : "missing", "U+2581");
    }
    const char *scheme = json_string_value(json_object_get(json, "prepend_scheme"));
    const json_t *legacy = json_object_get(json, "add_prefix_space");
    step->kind = PRETOKENIZE_METASPACE;
    step->split = !json_is_false(json_object_get(json, "split"));
    if (scheme == NULL) step->prepend = json_is_false(legacy) ? 0 : 2;
    else if (strcmp(scheme, "never") == 0) step->prepend = 0;
    else if (strcmp(scheme, "first") == 0) step->prepend = 1;
    else if (strcmp(scheme, "always") == 0) step->prepend = 2;
    else return bad(r, "pre_tokenizer.prepend_scheme", scheme, "first, always or never");
    return STATUS_OK;
}

static enum status read_pretokenizer(const struct reader *r, const json_t *json) {
    struct tokenizer *t = r->t;
    if (is_null(json)) return STATUS_OK;
    const char *type = type_of(json);
    if (strcmp(type, "Sequence") == 0) {
        size_t i;
        json_t *step;
        json_array_foreach(json_object_get(json, "pretokenizers"), i, step) {
            TRY(read_pretokenizer(r, step));
        }
        return STATUS_OK;
    }
    if (t->n_pretokenizers == TOKENIZER_MAX_STEPS) {
        return bad(r, "pre_tokenizer", "too long", "8 steps");
    }
    /* What follows would have to see the byte-level alphabet instead of the text. */
    if (t->byte_level) return bad(r, "pre_tokenizer", "ByteLevel and more", "ByteLevel at the end");
    struct pretokenizer *step = &t->pretokenizers[t->n_pretokenizers++];
    if (strcmp(type, "Split") == 0) return read_split(r, step, json);
    if (strcmp(type, "Metaspace") == 0) return read_metaspace(r, step, json);
    if (strcmp(type, "ByteLevel") == 0) {
        t->byte_level = true;
        step->kind = PRETOKENIZE_BYTE_LEVEL;
        step->prefix_space = json_is_true(json_object_get(json, "add_prefix_space"));
        if (json_is_false(json_object_get(json, "use_regex"))) return STATUS_OK;
        return compile(r, &step->regex, gpt2_pattern);
    }
    if (strcmp(type, "Digits") == 0) {
        step->kind = PRETOKENIZE_DIGITS;
        step->individual = json_is_true(json_object_get(json, "individual_digits"));
        return compile(r, &step->regex, step->individual ? "\\p{N}" : "\\p{N}+");
    }
    return bad(r, "pre_tokenizer.type", type, "ByteLevel, Split, Metaspace, Digits or Sequence");
}

/* --- post-processor -------------------------------------------------------------------------- */

static enum status read_template(const struct reader *r, const json_t *json) {
    struct tokenizer *t = r->t;
    const json_t *specials = json_object_get(json, "special_tokens");
    bool seen_text = false;
    size_t i, j;
    json_t *part, *id;
    json_array_foreach(json_object_get(json, "single"), i, part) {
        const json_t *special = json_object_get(part, "SpecialToken");
        if (special == NULL) {
            seen_text = true;
            continue;
        }
        const char *name = json_string_value(json_object_get(special, "id"));
        const json_t *ids = json_object_get(json_object_get(specials, name ? name : ""), "ids");
        if (!json_is_array(ids)) {
            return bad(r, "post_processor.special_tokens", name ? name : "missing", "ids for it");
        }
        json_array_foreach(ids, j, id) {
            int *n = seen_text ? &t->n_suffix : &t->n_prefix;
            int32_t *out = seen_text ? t->suffix : t->prefix;
            if (*n == TOKENIZER_MAX_EXTRA) return bad(r, "post_processor", "too long", "8 tokens");
            json_int_t value = json_is_integer(id) ? json_integer_value(id) : -1;
            if (value < 0 || value >= t->n_tokens || !tokenizer_has(t, (int32_t)value)) {
                return bad(r, "post_processor.special_tokens", "outside the vocabulary", "its ids");
            }
            out[(*n)++] = (int32_t)value;
        }
    }
    return STATUS_OK;
}

static enum status read_post_processor(const struct reader *r, const json_t *json) {
    if (is_null(json)) return STATUS_OK;
    const char *type = type_of(json);
    if (strcmp(type, "Sequence") == 0) {
        size_t i;
        json_t *step;
        json_array_foreach(json_object_get(json, "processors"), i, step) {
            TRY(read_post_processor(r, step));
        }
        return STATUS_OK;
    }
    if (strcmp(type, "ByteLevel") == 0) return STATUS_OK; /* moves offsets only */
    if (strcmp(type, "TemplateProcessing") == 0) return read_template(r, json);
    return bad(r, "post_processor.type", type, "TemplateProcessing, ByteLevel or Sequence");
}

/* --- decoder --------------------------------------------------------------------------------- */

static enum status read_decoder(const struct reader *r, const json_t *json) {
    struct tokenizer *t = r->t;
    if (is_null(json)) return STATUS_OK;
    const char *type = type_of(json);
    if (strcmp(type, "Sequence") == 0) {
        size_t i;
        json_t *step;
        json_array_foreach(json_object_get(json, "decoders"), i, step) TRY(read_decoder(r, step));
        return STATUS_OK;
    }
    if (strcmp(type, "ByteLevel") == 0 || strcmp(type, "ByteFallback") == 0 ||
        strcmp(type, "Fuse") == 0) {
        return STATUS_OK;
    }
    if (strcmp(type, "Replace") == 0) {
        const char *pattern =
            json_string_value(json_object_get(json_object_get(json, "pattern"), "String"));
        const char *content = json_string_value(json_object_get(json, "content"));
        if (pattern == NULL || content == NULL || strcmp(pattern, "\xE2\x96\x81") != 0 ||
            strcmp(content, " ") != 0) {
            return bad(r, "decoder.Replace", pattern ? pattern : "missing", "U+2581 by a space");
        }
        t->decodes_metaspace = true;
        return STATUS_OK;
    }
    if (strcmp(type, "Strip") == 0) {
        json_int_t start = json_integer_value(json_object_get(json, "start"));
        json_int_t stop = json_integer_value(json_object_get(json, "stop"));
        const char *content = json_string_value(json_object_get(json, "content"));
        if (start > 1 || stop != 0 || content == NULL || strcmp(content, " ") != 0) {
            return bad(r, "decoder.Strip", "of another kind", "at most one space at the start");
        }
        t->strips_first_space = start == 1;
        return STATUS_OK;
    }
    if (strcmp(type, "Metaspace") == 0) {
        const char *scheme = json_string_value(json_object_get(json, "prepend_scheme"));
        t->decodes_metaspace = true;
        t->strips_first_space = scheme ? strcmp(scheme, "never") != 0
                                       : !json_is_false(json_object_get(json, "add_prefix_space"));
        return STATUS_OK;
    }
    return bad(r, "decoder.type", type,
               "ByteLevel, ByteFallback, Fuse, Replace, Strip, Metaspace or Sequence");
}

/* --- added tokens ---------------------------------------------------------------------------- */

static int longest_first(const void *a, const void *b) {
    const struct added_token *x = a, *y = b;
    if (x->n_bytes != y->n_bytes) return x->n_bytes > y->n_bytes ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

static void read_added(const struct reader *r, const json_t *added) {
    struct tokenizer *t = r->t;
    t->added = xcalloc(json_array_size(added), sizeof *t->added);
    size_t i;
    json_t *entry;
    json_array_foreach(added, i, entry) {
        const char *content = json_string_value(json_object_get(entry, "content"));
        if (*content == 0) continue;
        t->added[t->n_added++] = (struct added_token){
            .id = (int32_t)json_integer_value(json_object_get(entry, "id")),
            .content = xstrdup(content),
            .n_bytes = strlen(content),
            .lstrip = json_is_true(json_object_get(entry, "lstrip")),
            .rstrip = json_is_true(json_object_get(entry, "rstrip")),
            .single_word = json_is_true(json_object_get(entry, "single_word")),
            .normalized = json_is_true(json_object_get(entry, "normalized")),
        };
        t->added_first[(unsigned char)content[0]] = 1;
    }
    qsort(t->added, (size_t)t->n_added, sizeof *t->added, longest_first);
}

/* --- the whole ------------------------------------------------------------------------------- */

static void fingerprint(struct tokenizer *t) {
    XXH3_state_t *state = XXH3_createState();
    CHECK(state != NULL);
    XXH3_64bits_reset(state);
    for (int32_t i = 0; i < t->n_tokens; i++) {
        const struct token *token = &t->tokens[i];
        if (token->spelling == NULL) continue;
        char flags[2] = {(char)token->special, (char)token->added};
        XXH3_64bits_update(state, &i, sizeof i);
        XXH3_64bits_update(state, flags, sizeof flags);
        XXH3_64bits_update(state, token->spelling, strlen(token->spelling) + 1);
    }
    for (uint32_t i = 0; i <= t->merges.mask; i++) {
        if (t->merges.merges[i].left < 0) continue;
        XXH3_64bits_update(state, &t->merges.merges[i], sizeof t->merges.merges[i]);
    }
    t->fingerprint = XXH3_64bits_digest(state);
    XXH3_freeState(state);
}

enum status tokenizer_load_json(struct tokenizer *t, const json_t *root, const char *path,
                                struct error *err) {
    struct reader r = {t, path, err};
    if (!json_is_object(root)) return bad(&r, "the file", "not an object", "a tokenizer");
    const json_t *added = json_object_get(root, "added_tokens");
    if (!is_null(added) && !json_is_array(added)) return bad(&r, "added_tokens", "no array", "one");
    TRY(read_normalizer(&r, json_object_get(root, "normalizer")));
    TRY(read_pretokenizer(&r, json_object_get(root, "pre_tokenizer")));
    TRY(read_model(&r, root));
    read_added(&r, added);
    TRY(read_post_processor(&r, json_object_get(root, "post_processor")));
    TRY(read_decoder(&r, json_object_get(root, "decoder")));
    fingerprint(t);
    return STATUS_OK;
}

/* The id of a special token that the config names (a string, or an object with `content`); -1. */
static int32_t config_token(const struct tokenizer *t, const json_t *config, const char *field) {
    const json_t *token = json_object_get(config, field);
    if (json_is_object(token)) token = json_object_get(token, "content");
    return json_is_string(token) ? tokenizer_find(t, json_string_value(token)) : -1;
}

static void apply_switch(const json_t *wanted, int32_t id, int32_t *extra, int *n_extra) {
    if (json_is_false(wanted)) *n_extra = 0;
    if (json_is_true(wanted) && *n_extra == 0 && id >= 0) extra[(*n_extra)++] = id;
}

/* LlamaTokenizer's own switches for what stands around a text; other classes go by the template. */
void tokenizer_apply_config(struct tokenizer *t, const json_t *config) {
    const char *class = json_string_value(json_object_get(config, "tokenizer_class"));
    if (class == NULL || strncmp(class, "LlamaTokenizer", 14) != 0) return;
    apply_switch(json_object_get(config, "add_bos_token"), config_token(t, config, "bos_token"),
                 t->prefix, &t->n_prefix);
    apply_switch(json_object_get(config, "add_eos_token"), config_token(t, config, "eos_token"),
                 t->suffix, &t->n_suffix);
}
