#include "model/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/json.h"

enum { LENGTH_BYTES = 8, MAX_HEADER_BYTES = 100 * 1000 * 1000 };

static const struct {
    const char *name;
    unsigned bytes;
} dtypes[] = {
    {"F64", 8}, {"F32", 4}, {"F16", 2},  {"BF16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I64", 8},
    {"I32", 4}, {"I16", 2}, {"I8", 1},   {"U64", 8},  {"U32", 4},     {"U16", 2},     {"U8", 1},
    {"BOOL", 1},
};

/* --- one tensor's entry --------------------------------------------------------------------- */

static enum status read_dtype(struct safetensors_tensor *tensor, unsigned *element_bytes,
                              const struct json_place *place, struct error *err) {
    const char *name = NULL;
    TRY(json_get_string(&name, place, "dtype", JSON_REQUIRED, err));
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
        if (strcmp(name, dtypes[i].name) == 0) {
            tensor->dtype = dtypes[i].name;
            *element_bytes = dtypes[i].bytes;
            return STATUS_OK;
        }
    }
    return json_refuse(place, "dtype", "a safetensors dtype such as \"BF16\"", err);
}

/* The shape, and in *n_bytes what it comes to. */
static enum status read_shape(struct safetensors_tensor *tensor, uint64_t *n_bytes,
                              const struct json_place *place, struct error *err) {
    static const char expected[] = "a list of at most 8 sizes, each 0 or more, within 2^63 bytes";
    const json_t *list = json_object_get(place->object, "shape");
    if (!json_is_array(list) || json_array_size(list) > SAFETENSORS_MAX_DIMS) {
        return json_refuse(place, "shape", expected, err);
    }
    tensor->n_dims = (int)json_array_size(list);
    for (int i = 0; i < tensor->n_dims; i++) {
        const json_t *size = json_array_get(list, (size_t)i);
        json_int_t value = json_integer_value(size);
        if (!json_is_integer(size) || value < 0 ||
            __builtin_mul_overflow(*n_bytes, (uint64_t)value, n_bytes) || *n_bytes > INT64_MAX) {
            return json_refuse(place, "shape", expected, err);
        }
        tensor->shape[i] = value;
    }
    return STATUS_OK;
}

static enum status read_offsets(struct safetensors_tensor *tensor, uint64_t n_bytes,
                                uint64_t data_bytes, const struct json_place *place,
                                struct error *err) {
    const json_t *list = json_object_get(place->object, "data_offsets");
    const json_t *begin = json_array_get(list, 0), *end = json_array_get(list, 1);
    if (json_array_size(list) != 2 || !json_is_integer(begin) || !json_is_integer(end) ||
        json_integer_value(begin) < 0 || json_integer_value(end) < json_integer_value(begin)) {
        return json_refuse(place, "data_offsets", "two byte offsets [begin, end], begin <= end",
                           err);
    }
    tensor->begin = (uint64_t)json_integer_value(begin);
    tensor->end = (uint64_t)json_integer_value(end);
    if (tensor->end - tensor->begin != n_bytes) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "%s: field %sdata_offsets spans %" PRIu64 " bytes; expected %" PRIu64
                         ", as its shape and dtype %s ask",
                         place->file, place->prefix, tensor->end - tensor->begin, n_bytes,
                         tensor->dtype);
    }
    if (tensor->end > data_bytes) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "%s: field %sdata_offsets ends at byte %" PRIu64 " of the data; the file "
                         "has %" PRIu64 " (is it truncated?)",
                         place->file, place->prefix, tensor->end, data_bytes);
    }
    return STATUS_OK;
}

static enum status read_tensor(struct safetensors_tensor *tensor, const struct safetensors *file,
                               const char *name, const json_t *value, struct error *err) {
    char prefix[200];
    snprintf(prefix, sizeof prefix, "\"%.190s\".", name);
    struct json_place place = {value, file->path, prefix};
    if (!json_is_object(value)) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "%s: tensor \"%.190s\" is not an object",
                         file->path, name);
    }
    unsigned element_bytes = 0;
    TRY(read_dtype(tensor, &element_bytes, &place, err));
    uint64_t n_bytes = element_bytes;
    TRY(read_shape(tensor, &n_bytes, &place, err));
    TRY(read_offsets(tensor, n_bytes, file->n_bytes - file->header_bytes, &place, err));
    tensor->name = xstrdup(name);
    return STATUS_OK;
}

/* --- the whole header ----------------------------------------------------------------------- */

static int compare_begin(const void *a, const void *b) {
    const struct safetensors_tensor *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static int compare_name(const void *a, const void *b) {
    const struct safetensors_tensor *x = a, *y = b;
    return strcmp(x->name, y->name);
}

/* In order of their offsets the tensors follow each other without overlap or hole, to the end. */
static enum status check_layout(struct safetensors *file, struct error *err) {
    uint64_t at = 0, data_bytes = file->n_bytes - file->header_bytes;
    qsort(file->tensors, file->n_tensors, sizeof *file->tensors, compare_begin);
    for (size_t i = 0; i < file->n_tensors; i++) {
        const struct safetensors_tensor *tensor = &file->tensors[i];
        if (tensor->begin != at) {
            return error_set(err, STATUS_INVALID_ARGUMENT,
                             "%s: data_offsets of \"%.190s\" begin at %" PRIu64
                             "; expected %" PRIu64 ", where the tensor before it ends: %s",
                             file->path, tensor->name, tensor->begin, at,
                             tensor->begin < at ? "they overlap" : "there is a hole");
        }
        at = tensor->end;
    }
    if (at != data_bytes) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "%s: the file has %" PRIu64 " bytes of data; its tensors cover %" PRIu64,
                         file->path, data_bytes, at);
    }
    return STATUS_OK;
}

static enum status check_metadata(const struct safetensors *file, json_t *metadata,
                                  struct error *err) {
    if (!json_is_object(metadata)) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "%s: __metadata__ is not an object",
                         file->path);
    }
    const char *key;
    json_t *value;
    json_object_foreach(metadata, key, value) {
        if (!json_is_string(value)) {
            return error_set(err, STATUS_INVALID_ARGUMENT,
                             "%s: field __metadata__.%.100s is not a string", file->path, key);
        }
    }
    return STATUS_OK;
}

static enum status read_header(struct safetensors *file, json_t *header, struct error *err) {
    if (!json_is_object(header)) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "%s: header is not a JSON object",
                         file->path);
    }
    file->tensors = xcalloc(json_object_size(header), sizeof *file->tensors);
    const char *name;
    json_t *value;
    json_object_foreach(header, name, value) {
        if (strcmp(name, "__metadata__") == 0) {
            TRY(check_metadata(file, value, err));
            continue;
        }
        TRY(read_tensor(&file->tensors[file->n_tensors], file, name, value, err));
        file->n_tensors++;
    }
    TRY(check_layout(file, err));
    qsort(file->tensors, file->n_tensors, sizeof *file->tensors, compare_name);
    return STATUS_OK;
}

static enum status read_length(struct safetensors *file, struct error *err) {
    if (file->n_bytes < LENGTH_BYTES) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "%s: truncated: the file has %zu bytes; a safetensors file begins with "
                         "%d bytes of header length", file->path, file->n_bytes, LENGTH_BYTES);
    }
    uint64_t length = 0;
    for (int i = LENGTH_BYTES - 1; i >= 0; i--) length = length << 8 | file->bytes[i];
    if (length > MAX_HEADER_BYTES) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "%s: header length is %" PRIu64 " bytes; expected at most %d (is this a "
                         "safetensors file?)", file->path, length, MAX_HEADER_BYTES);
    }
    if (length > file->n_bytes - LENGTH_BYTES) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "%s: truncated: the header takes %" PRIu64 " bytes; the file has %zu",
                         file->path, length + LENGTH_BYTES, file->n_bytes);
    }
    file->header_bytes = LENGTH_BYTES + (size_t)length;
    file->data = file->bytes + file->header_bytes;
    if (length == 0 || file->bytes[LENGTH_BYTES] != '{') {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "%s: header does not begin with '{' (is this a safetensors file?)",
                         file->path);
    }
    return STATUS_OK;
}

/* A file cut short in its data: said with the whole lengths, before any single tensor is blamed. */
static enum status check_total(const struct safetensors *file, const json_t *header,
                               struct error *err) {
    uint64_t most = 0;
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)header, name, value) {
        json_int_t end = json_integer_value(json_array_get(json_object_get(value, "data_offsets"),
                                                           1));
        if (end > 0 && (uint64_t)end > most) most = (uint64_t)end;
    }
    if (most <= file->n_bytes - file->header_bytes) return STATUS_OK;
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "%s: truncated: the file has %zu bytes; its header describes %" PRIu64
                     " (is the download complete?)",
                     file->path, file->n_bytes, most + file->header_bytes);
}

enum status safetensors_parse(struct safetensors *out, const char *path, const void *bytes,
                              size_t n_bytes, struct error *err) {
    *out = (struct safetensors){.path = xstrdup(path), .bytes = bytes, .n_bytes = n_bytes};
    json_t *header = NULL;
    enum status status;
    TRY_OR_FAIL(read_length(out, err));
    TRY_OR_FAIL(json_parse(&header, path, (const char *)out->bytes + LENGTH_BYTES,
                           out->header_bytes - LENGTH_BYTES, err));
    TRY_OR_FAIL(check_total(out, header, err));
    TRY_OR_FAIL(read_header(out, header, err));
    json_decref(header);
    return STATUS_OK;

fail:
    json_decref(header);
    safetensors_parse_free(out);
    return status;
}

void safetensors_parse_free(struct safetensors *file) {
    for (size_t i = 0; i < file->n_tensors; i++) free(file->tensors[i].name);
    free(file->tensors);
    free(file->path);
    *file = (struct safetensors){0};
}

const struct safetensors_tensor *safetensors_find(const struct safetensors *file,
                                                  const char *name) {
    struct safetensors_tensor key = {.name = (char *)name};
    return bsearch(&key, file->tensors, file->n_tensors, sizeof key, compare_name);
}

/* --- mapping -------------------------------------------------------------------------------- */

static enum status map_file(const void **bytes, size_t *n_bytes, const char *path,
                            struct error *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return error_set(err, errno == ENOENT ? STATUS_NOT_FOUND : STATUS_INTERNAL,
                         "%s: cannot open: %s", path, strerror(errno));
    }
    struct stat info;
    enum status status = STATUS_OK;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        status = error_set(err, STATUS_INVALID_ARGUMENT, "%s: not a regular file", path);
    } else if (info.st_size < LENGTH_BYTES) {
        status = error_set(err, STATUS_INVALID_ARGUMENT,
                           "%s: truncated: the file has %lld bytes; a safetensors file begins with "
                           "%d bytes of header length",
                           path, (long long)info.st_size, LENGTH_BYTES);
    } else {
        *n_bytes = (size_t)info.st_size;
        *bytes = mmap(NULL, *n_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        if (*bytes == MAP_FAILED) {
            status = error_set(err, STATUS_RESOURCE_EXHAUSTED, "%s: cannot map %zu bytes: %s", path,
                               *n_bytes, strerror(errno));
        }
    }
    close(fd);
    return status;
}

enum status safetensors_open(struct safetensors **out, const char *path, struct error *err) {
    const void *bytes = NULL;
    size_t n_bytes = 0;
    TRY(map_file(&bytes, &n_bytes, path, err));
    struct safetensors *file = xcalloc(1, sizeof *file);
    enum status status = safetensors_parse(file, path, bytes, n_bytes, err);
    if (status != STATUS_OK) {
        munmap((void *)bytes, n_bytes);
        free(file);
        return status;
    }
    *out = file;
    return STATUS_OK;
}

void safetensors_close(struct safetensors *file) {
    if (file == NULL) return;
    munmap((void *)file->bytes, file->n_bytes);
    safetensors_parse_free(file);
    free(file);
}
