/* Ids to text, token by token. Bytes wait until their character is complete; what cannot become one
 * is U+FFFD: once for every byte among byte-fallback tokens, once for every maximal subpart otherwise. */
#include <stdlib.h>
#include <string.h>

#include "model/tokenizer_internal.h"
#include "model/utf8.h"

static const char replacement[] = "\xEF\xBF\xBD";
static const char mark[] = "\xE2\x96\x81";

struct detokenizer {
    const struct tokenizer *t;
    bool skip_special;
    bool at_start; /* no text yet: a space here may be the tokenizer's own */
    char pending[4]; /* the beginning of a character */
    size_t n_pending;
    char *text;
    size_t n, capacity;
};

struct detokenizer *detokenizer_create(const struct tokenizer *tokenizer, bool skip_special) {
    struct detokenizer *d = xcalloc(1, sizeof *d);
    d->t = tokenizer;
    d->skip_special = skip_special;
    d->at_start = true;
    return d;
}

void detokenizer_free(struct detokenizer *d) {
    if (d == NULL) return;
    free(d->text);
    free(d);
}

static void append(struct detokenizer *d, const char *bytes, size_t n) {
    if (d->n + n > d->capacity) {
        d->capacity = 2 * (d->n + n) + 64;
        d->text = xrealloc(d->text, d->capacity);
    }
    memcpy(d->text + d->n, bytes, n);
    d->n += n;
}

/* Gives up on the first pending character. */
static void drop_pending(struct detokenizer *d) {
    size_t n = d->t->byte_fallback ? 1 : (size_t)utf8_invalid_length(d->pending, d->n_pending);
    append(d, replacement, 3);
    d->n_pending -= n;
    memmove(d->pending, d->pending + n, d->n_pending);
}

static void push_byte(struct detokenizer *d, char byte) {
    d->pending[d->n_pending++] = byte;
    while (d->n_pending > 0) {
        int length = utf8_length(d->pending, d->n_pending);
        if (length < 0) return; /* wait */
        if (length == 0) {
            drop_pending(d);
            continue;
        }
        append(d, d->pending, (size_t)length);
        d->n_pending -= (size_t)length;
        memmove(d->pending, d->pending + length, d->n_pending);
    }
}

/* Text that is UTF-8 already: nothing can continue what is pending. */
static void push_text(struct detokenizer *d, const char *text, size_t n) {
    while (d->n_pending > 0) drop_pending(d);
    for (size_t at = 0; at < n;) {
        bool space = d->t->decodes_metaspace && n - at >= 3 && memcmp(text + at, mark, 3) == 0;
        append(d, space ? " " : text + at, 1);
        at += space ? 3 : 1;
    }
}

void detokenizer_push(struct detokenizer *d, int32_t id, const char **text, size_t *n_bytes) {
    d->n = 0;
    *n_bytes = 0;
    *text = "";
    if (!tokenizer_has(d->t, id)) return;
    const struct token *token = &d->t->tokens[id];
    if (token->special && d->skip_special) return;
    if (token->byte >= 0) {
        push_byte(d, (char)token->byte);
    } else if (d->t->byte_level) {
        for (uint32_t i = 0; i < token->n_bytes; i++) push_byte(d, token->bytes[i]);
    } else {
        push_text(d, token->bytes, token->n_bytes);
    }
    if (d->n == 0) return;
    bool own_space = d->at_start && d->t->strips_first_space && d->text[0] == ' ';
    d->at_start = false;
    *text = d->text + own_space;
    *n_bytes = d->n - own_space;
}

void detokenizer_finish(struct detokenizer *d, const char **text, size_t *n_bytes) {
    d->n = 0;
    while (d->n_pending > 0) drop_pending(d);
    *text = d->n > 0 ? d->text : "";
    *n_bytes = d->n;
}
