/* Text to ids: added tokens are cut out, the rest is normalised, cut into pieces, and merged. */
#include "model/tokenizer.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "model/json.h"
#include "model/tokenizer_internal.h"
#include "model/tokenizer_load.h"
#include "model/utf8.h"

/* A growable text. */
struct text {
    char *bytes;
    size_t n, capacity;
};

static void text_append(struct text *text, const char *bytes, size_t n) {
    if (text->n + n > text->capacity) {
        text->capacity = 2 * (text->n + n) + 64;
        text->bytes = xrealloc(text->bytes, text->capacity);
    }
    if (n > 0) memcpy(text->bytes + text->n, bytes, n);
    text->n += n;
}

void token_list_push(struct token_list *list, int32_t id) {
    if (list->n == list->capacity) {
        list->capacity = list->capacity ? 2 * list->capacity : 64;
        list->ids = xrealloc(list->ids, list->capacity * sizeof *list->ids);
    }
    list->ids[list->n++] = id;
}

void token_list_free(struct token_list *list) {
    free(list->ids);
    *list = (struct token_list){0};
}

/* --- normalising ----------------------------------------------------------------------------- */

static enum status compose(struct text *out, const struct text *in, enum normalizer_kind kind,
                           struct error *err) {
    static const utf8proc_option_t options[] = {
        [NORMALIZE_NFC] = UTF8PROC_STABLE | UTF8PROC_COMPOSE,
        [NORMALIZE_NFD] = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE,
        [NORMALIZE_NFKC] = UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT,
        [NORMALIZE_NFKD] = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT,
    };
    utf8proc_uint8_t *result;
    utf8proc_ssize_t n = utf8proc_map((const utf8proc_uint8_t *)in->bytes, (utf8proc_ssize_t)in->n,
                                      &result, options[kind]);
    if (n < 0) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "the text cannot be normalised: %s",
                         utf8proc_errmsg(n));
    }
    text_append(out, (const char *)result, (size_t)n);
    free(result);
    return STATUS_OK;
}

static void replace(struct text *out, const struct text *in, const struct normalizer *step) {
    size_t n_pattern = strlen(step->pattern), n_content = strlen(step->content), at = 0;
    while (at < in->n) {
        const char *found = memmem(in->bytes + at, in->n - at, step->pattern, n_pattern);
        size_t end = found ? (size_t)(found - in->bytes) : in->n;
        text_append(out, in->bytes + at, end - at);
        if (found == NULL) return;
        text_append(out, step->content, n_content);
        at = end + n_pattern;
    }
}

static bool only_ascii(const struct text *text) {
    for (size_t i = 0; i < text->n; i++) {
        if ((unsigned char)text->bytes[i] >= 0x80) return false;
    }
    return true;
}

/* in and out change places at every step; the result is in `in`. */
static enum status normalize(const struct tokenizer *t, struct text *in, struct text *spare,
                             struct error *err) {
    for (int i = 0; i < t->n_normalizers && in->n > 0; i++) {
        const struct normalizer *step = &t->normalizers[i];
        if (step->kind <= NORMALIZE_NFKD && only_ascii(in)) continue;
        spare->n = 0;
        if (step->kind == NORMALIZE_PREPEND) {
            text_append(spare, step->content, strlen(step->content));
            text_append(spare, in->bytes, in->n);
        } else if (step->kind == NORMALIZE_REPLACE) {
            replace(spare, in, step);
        } else {
            TRY(compose(spare, in, step->kind, err));
        }
        struct text swap = *in;
        *in = *spare;
        *spare = swap;
    }
    return STATUS_OK;
}

/* --- pieces ---------------------------------------------------------------------------------- */

/* What one encoding works with; freed at its end. */
struct encoding {
    const struct tokenizer *t;
    struct token_list *out;
    struct text text, spare;
    struct text steps[TOKENIZER_MAX_STEPS]; /* rewritten pieces, one for each pre-tokeniser */
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
    bool first; /* the section at the start of the whole text */
    struct error *err;
};

static enum status piece_step(struct encoding *e, const char *piece, size_t n, int step_i);

static int match_at(struct encoding *e, const pcre2_code *regex, const char *text, size_t n,
                    size_t at) {
    int code = pcre2_match(regex, (PCRE2_SPTR)text, n, at, PCRE2_NO_UTF_CHECK, e->match, e->context);
    if (code == PCRE2_ERROR_JIT_STACKLIMIT) {
        code = pcre2_match(regex, (PCRE2_SPTR)text, n, at, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                           e->match, e->context);
    }
    return code;
}

static enum status split_regex(struct encoding *e, const pcre2_code *regex, bool removes,
                               const char *text, size_t n, int step_i) {
    size_t at = 0, gap = 0;
    while (at < n) {
        int code = match_at(e, regex, text, n, at);
        if (code == PCRE2_ERROR_NOMATCH) break;
        if (code < 0) {
            return error_set(e->err, STATUS_RESOURCE_EXHAUSTED,
                             "the pre-tokeniser's regex gave up at byte %zu of %zu (code %d)", at, n,
                             code);
        }
        const PCRE2_SIZE *range = pcre2_get_ovector_pointer(e->match);
        size_t begin = range[0], end = range[1];
        if (end == begin) { /* an empty match moves on by a character */
            int length = utf8_length(text + begin, n - begin);
            at = begin + (size_t)(length > 0 ? length : 1);
            continue;
        }
        if (begin > gap) TRY(piece_step(e, text + gap, begin - gap, step_i + 1));
        if (!removes) TRY(piece_step(e, text + begin, end - begin, step_i + 1));
        at = gap = end;
    }
    if (gap < n) return piece_step(e, text + gap, n - gap, step_i + 1);
    return STATUS_OK;
}

static const char mark[] = "\xE2\x96\x81";

static enum status metaspace(struct encoding *e, const struct pretokenizer *step, const char *piece,
                             size_t n, int step_i) {
    struct text *out = &e->steps[step_i];
    out->n = 0;
    bool starts_with_mark = (n > 0 && piece[0] == ' ') || (n >= 3 && memcmp(piece, mark, 3) == 0);
    bool prepends = step->prepend == 2 || (step->prepend == 1 && e->first);
    if (prepends && !starts_with_mark) text_append(out, mark, 3);
    for (size_t i = 0; i < n; i++) {
        if (piece[i] == ' ') text_append(out, mark, 3);
        else text_append(out, piece + i, 1);
    }
    if (!step->split) return piece_step(e, out->bytes, out->n, step_i + 1);
    size_t begin = 0;
    for (size_t at = 1; at + 2 < out->n; at++) {
        if (memcmp(out->bytes + at, mark, 3) != 0) continue;
        TRY(piece_step(e, out->bytes + begin, at - begin, step_i + 1));
        begin = at;
    }
    return piece_step(e, out->bytes + begin, out->n - begin, step_i + 1);
}

static enum status piece_step(struct encoding *e, const char *piece, size_t n, int step_i) {
    if (n == 0) return STATUS_OK;
    if (step_i == e->t->n_pretokenizers) {
        bpe_encode(e->t, e->out, piece, n);
        return STATUS_OK;
    }
    const struct pretokenizer *step = &e->t->pretokenizers[step_i];
    if (step->kind == PRETOKENIZE_METASPACE) return metaspace(e, step, piece, n, step_i);
    if (step->kind == PRETOKENIZE_BYTE_LEVEL && step->prefix_space && piece[0] != ' ') {
        struct text *out = &e->steps[step_i];
        out->n = 0;
        text_append(out, " ", 1);
        text_append(out, piece, n);
        piece = out->bytes;
        n = out->n;
    }
    if (step->regex == NULL) return piece_step(e, piece, n, step_i + 1);
    return split_regex(e, step->regex, step->removes, piece, n, step_i);
}

/* --- sections between added tokens ----------------------------------------------------------- */

static enum status encode_section(struct encoding *e, const char *section, size_t n) {
    if (n == 0) return STATUS_OK;
    e->text.n = 0;
    text_append(&e->text, section, n);
    TRY(normalize(e->t, &e->text, &e->spare, e->err));
    return piece_step(e, e->text.bytes, e->text.n, 0);
}

static bool is_word_byte(unsigned char byte) {
    return byte >= 0x80 || byte == '_' || isalnum(byte);
}

static const struct added_token *added_at(const struct tokenizer *t, const char *text, size_t n,
                                          size_t at) {
    for (int i = 0; i < t->n_added; i++) {
        const struct added_token *token = &t->added[i];
        if (token->n_bytes > n - at || memcmp(text + at, token->content, token->n_bytes) != 0) {
            continue;
        }
        size_t end = at + token->n_bytes;
        bool joined = (at > 0 && is_word_byte((unsigned char)text[at - 1])) ||
                      (end < n && is_word_byte((unsigned char)text[end]));
        if (token->single_word && joined) continue;
        return token;
    }
    return NULL;
}

static bool is_space(char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static enum status encode_sections(struct encoding *e, const char *text, size_t n) {
    size_t begin = 0;
    for (size_t at = 0; at < n;) {
        const struct added_token *token =
            e->t->added_first[(unsigned char)text[at]] ? added_at(e->t, text, n, at) : NULL;
        if (token == NULL) {
            at++;
            continue;
        }
        size_t section_end = at, next = at + token->n_bytes;
        while (token->lstrip && section_end > begin && is_space(text[section_end - 1])) section_end--;
        while (token->rstrip && next < n && is_space(text[next])) next++;
        e->first = begin == 0;
        TRY(encode_section(e, text + begin, section_end - begin));
        token_list_push(e->out, token->id);
        at = begin = next;
    }
    e->first = begin == 0;
    return encode_section(e, text + begin, n - begin);
}

static void encoding_begin(struct encoding *e) {
    enum { MATCH_LIMIT = 10 * 1000 * 1000, STACK_START = 32 * 1024, STACK_MAX = 1024 * 1024 };
    e->match = pcre2_match_data_create(8, NULL);
    e->context = pcre2_match_context_create(NULL);
    e->stack = pcre2_jit_stack_create(STACK_START, STACK_MAX, NULL);
    CHECK(e->match != NULL && e->context != NULL);
    pcre2_set_match_limit(e->context, MATCH_LIMIT);
    if (e->stack != NULL) pcre2_jit_stack_assign(e->context, NULL, e->stack);
}

static void encoding_end(struct encoding *e) {
    pcre2_match_data_free(e->match);
    pcre2_match_context_free(e->context);
    pcre2_jit_stack_free(e->stack);
    free(e->text.bytes);
    free(e->spare.bytes);
    for (int i = 0; i < TOKENIZER_MAX_STEPS; i++) free(e->steps[i].bytes);
}

enum status tokenizer_encode(const struct tokenizer *t, struct token_list *out, const char *text,
                             size_t n_bytes, bool add_special, struct error *err) {
    size_t valid = utf8_check(text, n_bytes);
    if (valid != n_bytes) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "the text is not valid UTF-8: byte 0x%02x at offset %zu",
                         (unsigned char)text[valid], valid);
    }
    struct encoding e = {.t = t, .out = out, .err = err};
    encoding_begin(&e);
    for (int i = 0; i < t->n_prefix && add_special; i++) token_list_push(out, t->prefix[i]);
    enum status status = encode_sections(&e, text, n_bytes);
    for (int i = 0; i < t->n_suffix && add_special; i++) token_list_push(out, t->suffix[i]);
    encoding_end(&e);
    return status;
}

/* --- loading and looking up ------------------------------------------------------------------ */

enum { MAX_FILE_BYTES = 256 * 1024 * 1024 };

static enum status load_config(struct tokenizer *t, const char *dir, struct error *err) {
    char path[4096];
    char *text;
    size_t n;
    snprintf(path, sizeof path, "%s/tokenizer_config.json", dir);
    enum status status = json_read_file(&text, &n, path, MAX_FILE_BYTES, err);
    if (status == STATUS_NOT_FOUND) return STATUS_OK; /* it only refines */
    TRY(status);
    json_t *config;
    status = json_parse_reals(&config, path, text, n, err);
    free(text);
    TRY(status);
    tokenizer_apply_config(t, config);
    json_decref(config);
    return STATUS_OK;
}

static enum status parse(struct tokenizer **out, const char *json, size_t n_bytes, const char *path,
                         struct error *err) {
    json_t *root;
    TRY(json_parse(&root, path, json, n_bytes, err));
    struct tokenizer *t = xcalloc(1, sizeof *t);
    enum status status = tokenizer_load_json(t, root, path, err);
    json_decref(root);
    if (status != STATUS_OK) {
        tokenizer_free(t);
        return status;
    }
    *out = t;
    return STATUS_OK;
}

enum status tokenizer_parse(struct tokenizer **out, const char *json, size_t n_bytes,
                            struct error *err) {
    return parse(out, json, n_bytes, "tokenizer.json", err);
}

enum status tokenizer_load(struct tokenizer **out, const char *dir, struct error *err) {
    char path[4096];
    char *text;
    size_t n;
    snprintf(path, sizeof path, "%s/tokenizer.json", dir);
    TRY(json_read_file(&text, &n, path, MAX_FILE_BYTES, err));
    struct tokenizer *t;
    enum status status = parse(&t, text, n, path, err);
    free(text);
    TRY(status);
    status = load_config(t, dir, err);
    if (status != STATUS_OK) {
        tokenizer_free(t);
        return status;
    }
    *out = t;
    return STATUS_OK;
}

void tokenizer_free(struct tokenizer *t) {
    if (t == NULL) return;
    for (int i = 0; i < t->n_tokens && t->tokens != NULL; i++) {
        free(t->tokens[i].spelling);
        free(t->tokens[i].bytes);
    }
    for (int i = 0; i < TOKENIZER_MAX_STEPS; i++) {
        free(t->normalizers[i].pattern);
        free(t->normalizers[i].content);
        pcre2_code_free(t->pretokenizers[i].regex);
    }
    for (int i = 0; i < t->n_added; i++) free(t->added[i].content);
    free(t->added);
    free(t->tokens);
    free(t->map.ids);
    free(t->merges.merges);
    free(t);
}

int tokenizer_size(const struct tokenizer *t) {
    return t->n_tokens;
}

bool tokenizer_has(const struct tokenizer *t, int32_t id) {
    return id >= 0 && id < t->n_tokens && t->tokens[id].spelling != NULL;
}

bool tokenizer_is_special(const struct tokenizer *t, int32_t id) {
    return tokenizer_has(t, id) && t->tokens[id].special;
}

const char *tokenizer_token(const struct tokenizer *t, int32_t id) {
    return tokenizer_has(t, id) ? t->tokens[id].spelling : NULL;
}

int32_t tokenizer_find(const struct tokenizer *t, const char *token) {
    return token_map_find(t, token, strlen(token));
}

uint64_t tokenizer_fingerprint(const struct tokenizer *t) {
    return t->fingerprint;
}
