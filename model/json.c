#include "model/json.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static enum status parse(json_t **out, const char *file, const char *text, size_t n_bytes,
                         size_t flags, struct error *err) {
    json_error_t reason;
    flags |= JSON_REJECT_DUPLICATES | JSON_DECODE_ANY;
    *out = json_loadb(text, n_bytes, flags, &reason);
    if (*out != NULL) return STATUS_OK;
    return error_set(err, STATUS_INVALID_ARGUMENT, "%s: not valid JSON at line %d, column %d: %s",
                     file, reason.line, reason.column, reason.text);
}

enum status json_parse(json_t **out, const char *file, const char *text, size_t n_bytes,
                       struct error *err) {
    return parse(out, file, text, n_bytes, 0, err);
}

enum status json_parse_reals(json_t **out, const char *file, const char *text, size_t n_bytes,
                             struct error *err) {
    return parse(out, file, text, n_bytes, JSON_DECODE_INT_AS_REAL, err);
}

static enum status read_stream(char **text, size_t *n_bytes, FILE *stream, const char *path,
                               size_t max_bytes, struct error *err) {
    size_t capacity = 4096, n = 0;
    char *buffer = xmalloc(capacity);
    size_t got;
    while ((got = fread(buffer + n, 1, capacity - n, stream)) > 0) {
        n += got;
        if (n > max_bytes) {
            free(buffer);
            return error_set(err, STATUS_INVALID_ARGUMENT,
                             "%s: larger than %zu bytes, the most that such a file may have", path,
                             max_bytes);
        }
        if (n == capacity) buffer = xrealloc(buffer, capacity *= 2);
    }
    if (ferror(stream)) {
        free(buffer);
        return error_set(err, STATUS_INTERNAL, "%s: cannot read: %s", path, strerror(errno));
    }
    *text = buffer;
    *n_bytes = n;
    return STATUS_OK;
}

enum status json_read_file(char **text, size_t *n_bytes, const char *path, size_t max_bytes,
                           struct error *err) {
    FILE *stream = fopen(path, "rb");
    if (stream == NULL) {
        enum status status = errno == ENOENT || errno == ENOTDIR ? STATUS_NOT_FOUND
                                                                 : STATUS_INTERNAL;
        return error_set(err, status, "%s: cannot open: %s", path, strerror(errno));
    }
    enum status status = read_stream(text, n_bytes, stream, path, max_bytes, err);
    fclose(stream);
    return status;
}

bool json_has(const struct json_place *place, const char *field) {
    const json_t *value = json_object_get(place->object, field);
    return value != NULL && !json_is_null(value);
}

const char *json_show(char *text, size_t text_bytes, const json_t *value) {
    if (value == NULL) {
        snprintf(text, text_bytes, "missing");
        return text;
    }
    char *whole = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_ENSURE_ASCII);
    int n = snprintf(text, text_bytes, "%s", whole != NULL ? whole : "unprintable");
    if (n >= 0 && (size_t)n >= text_bytes) memcpy(text + text_bytes - 4, "...", 4);
    free(whole);
    return text;
}

enum status json_refuse(const struct json_place *place, const char *field, const char *expected,
                        struct error *err) {
    char seen[120];
    json_show(seen, sizeof seen, json_object_get(place->object, field));
    return error_set(err, STATUS_INVALID_ARGUMENT, "%s: field %s%s is %s; expected %s", place->file,
                     place->prefix, field, seen, expected);
}

/* The field's value in *value, NULL where it is missing or null and may be. */
static enum status get(const json_t **value, const struct json_place *place, const char *field,
                       enum json_need need, const char *expected, struct error *err) {
    *value = json_has(place, field) ? json_object_get(place->object, field) : NULL;
    if (*value == NULL && need == JSON_REQUIRED) return json_refuse(place, field, expected, err);
    return STATUS_OK;
}

enum status json_get_int(int *out, const struct json_place *place, const char *field,
                         enum json_need need, int min, int max, struct error *err) {
    char expected[80];
    snprintf(expected, sizeof expected, "an integer from %d to %d", min, max);
    const json_t *value;
    TRY(get(&value, place, field, need, expected, err));
    if (value == NULL) return STATUS_OK;
    json_int_t number = json_integer_value(value);
    if (!json_is_integer(value) || number < min || number > max) {
        return json_refuse(place, field, expected, err);
    }
    *out = (int)number;
    return STATUS_OK;
}

enum status json_get_float(float *out, const struct json_place *place, const char *field,
                           enum json_need need, double min, double max, struct error *err) {
    char expected[80];
    snprintf(expected, sizeof expected, "a number from %g to %g", min, max);
    const json_t *value;
    TRY(get(&value, place, field, need, expected, err));
    if (value == NULL) return STATUS_OK;
    double number = json_number_value(value);
    if (!json_is_number(value) || !(number >= min && number <= max)) {
        return json_refuse(place, field, expected, err);
    }
    *out = (float)number;
    return STATUS_OK;
}

enum status json_get_bool(bool *out, const struct json_place *place, const char *field,
                          enum json_need need, struct error *err) {
    const json_t *value;
    TRY(get(&value, place, field, need, "true or false", err));
    if (value == NULL) return STATUS_OK;
    if (!json_is_boolean(value)) return json_refuse(place, field, "true or false", err);
    *out = json_is_true(value);
    return STATUS_OK;
}

enum status json_get_string(const char **out, const struct json_place *place, const char *field,
                            enum json_need need, struct error *err) {
    const json_t *value;
    TRY(get(&value, place, field, need, "a string", err));
    if (value == NULL) return STATUS_OK;
    if (!json_is_string(value)) return json_refuse(place, field, "a string", err);
    *out = json_string_value(value);
    return STATUS_OK;
}
