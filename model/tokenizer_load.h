/* From parsed JSON to a tokenizer: between tokenizer_json.c and tokenizer.c, and for the fuzzer. */
#pragma once
#include <jansson.h>

#include "model/tokenizer.h"

/* Fills a zeroed tokenizer; on failure it is partly filled and tokenizer_free takes it. `path` names
 * the file in errors. */
enum status tokenizer_load_json(struct tokenizer *tokenizer, const json_t *root, const char *path,
                                struct error *err);
/* What tokenizer_config.json changes. */
void tokenizer_apply_config(struct tokenizer *tokenizer, const json_t *config);

/* The same from memory (the fuzzer's way in): a whole tokenizer, or INVALID_ARGUMENT. */
enum status tokenizer_parse(struct tokenizer **out, const char *json, size_t n_bytes,
                            struct error *err);
