/* Text to token ids and back, as the checkpoint's tokenizer.json says (BPE: byte-level, or
 * Metaspace with byte fallback). Immutable after loading: any number of threads may encode and
 * decode at once. Texts are bytes with a length and must be valid UTF-8 for encoding. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/error.h"

struct tokenizer;

/* Loads DIR/tokenizer.json and DIR/tokenizer_config.json. Unsupported pieces are refused by name. */
enum status tokenizer_load(struct tokenizer **out, const char *dir, struct error *err);
void tokenizer_free(struct tokenizer *tokenizer);

struct token_list { /* growable; zero-initialise; free with token_list_free */
    int32_t *ids;
    size_t n, capacity;
};
void token_list_push(struct token_list *list, int32_t id);
void token_list_free(struct token_list *list);

/* Appends the ids of text[0..n_bytes). Special tokens spelled in the text are recognised.
 * add_special: run the post-processor (BOS and the like). INVALID_ARGUMENT for bad UTF-8, with the
 * offset of the first bad byte. */
enum status tokenizer_encode(const struct tokenizer *tokenizer, struct token_list *out,
                             const char *text, size_t n_bytes, bool add_special, struct error *err);

/* Ids 0 .. size-1 exist (holes possible: tokenizer_has). */
int tokenizer_size(const struct tokenizer *tokenizer);
bool tokenizer_has(const struct tokenizer *tokenizer, int32_t id);
bool tokenizer_is_special(const struct tokenizer *tokenizer, int32_t id);

/* Content of the token as spelled in tokenizer.json (NUL-terminated), NULL for a hole. */
const char *tokenizer_token(const struct tokenizer *tokenizer, int32_t id);

/* Id of a token by its exact spelling, -1 if none. */
int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *token);

/* 64-bit hash of the whole content (ids, spellings, merges, special flags): equal for equal ones. */
uint64_t tokenizer_fingerprint(const struct tokenizer *tokenizer);

/* Incremental decoding: push ids, take text. Never emits part of a UTF-8 character; what can not
 * become valid any more becomes U+FFFD. One per stream. */
struct detokenizer;
struct detokenizer *detokenizer_create(const struct tokenizer *tokenizer, bool skip_special);
void detokenizer_free(struct detokenizer *detokenizer);

/* Adds one token. *text / *n_bytes: the newly complete text (may be empty), borrowed until the next
 * call. */
void detokenizer_push(struct detokenizer *detokenizer, int32_t id, const char **text,
                      size_t *n_bytes);
/* The rest at the end of the stream (an unfinished character as U+FFFD). */
void detokenizer_finish(struct detokenizer *detokenizer, const char **text, size_t *n_bytes);
