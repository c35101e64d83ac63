/* Reading the JSON files of a checkpoint folder: strict parsing, and typed fields whose errors name
 * file, field, value seen and expected. A thin layer over jansson; keeps nothing. Any thread. */
#pragma once
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/error.h"

/* Parses text[0..n_bytes): one JSON value, duplicate keys refused. `file` is for the error's words.
 * The caller releases *out with json_decref. INVALID_ARGUMENT with line and reason. */
enum status json_parse(json_t **out, const char *file, const char *text, size_t n_bytes,
                       struct error *err);

/* The same with every number a real, for files that hold integers past 64 bits (model_max_length of
 * tokenizer_config.json means "no limit" by such a one). */
enum status json_parse_reals(json_t **out, const char *file, const char *text, size_t n_bytes,
                             struct error *err);

/* Reads a whole file of at most max_bytes: *text is malloc'd for the caller. NOT_FOUND when it does
 * not exist, INVALID_ARGUMENT when it is larger, INTERNAL when reading fails. */
enum status json_read_file(char **text, size_t *n_bytes, const char *path, size_t max_bytes,
                           struct error *err);

/* An object and where it stands: `prefix` goes in front of field names in errors
 * ("rope_scaling."). */
struct json_place {
    const json_t *object;
    const char *file;
    const char *prefix;
};

/* Whether the field is there and not null. */
bool json_has(const struct json_place *place, const char *field);

/* The value as JSON text, shortened to fit (text_bytes >= 8); "missing" for NULL. Returns `text`. */
const char *json_show(char *text, size_t text_bytes, const json_t *value);

/* "FILE: field PREFIXfield is VALUE; expected EXPECTED" as INVALID_ARGUMENT. */
enum status json_refuse(const struct json_place *place, const char *field, const char *expected,
                        struct error *err);

/* The get functions leave *out as it was where an optional field is missing or null; a required one
 * must be there. Values outside min..max are refused with the range. Integral reals such as 1e3 are
 * not integers. */
enum json_need { JSON_REQUIRED, JSON_OPTIONAL };
enum status json_get_int(int *out, const struct json_place *place, const char *field,
                         enum json_need need, int min, int max, struct error *err);
enum status json_get_float(float *out, const struct json_place *place, const char *field,
                           enum json_need need, double min, double max, struct error *err);
enum status json_get_bool(bool *out, const struct json_place *place, const char *field,
                          enum json_need need, struct error *err);
/* *out is borrowed from the object. */
enum status json_get_string(const char **out, const struct json_place *place, const char *field,
                            enum json_need need, struct error *err);
