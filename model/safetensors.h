/* One safetensors file: 8 bytes of header length (little endian), a JSON header naming every
 * tensor's dtype, shape and byte range, then the data. Everything the header says is checked
 * before a tensor is handed out: ranges inside the file, disjoint, without holes, as long as shape
 * and dtype ask. Immutable after opening; any thread may read. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/error.h"

enum { SAFETENSORS_MAX_DIMS = 8 };

struct safetensors_tensor {
    char *name;
    const char *dtype; /* as spelled in the file, one of the format's known ones: "BF16" */
    int n_dims;
    int64_t shape[SAFETENSORS_MAX_DIMS];
    uint64_t begin, end; /* bytes from the start of the data */
};

struct safetensors {
    char *path;
    const uint8_t *bytes; /* the whole file */
    size_t n_bytes;
    const uint8_t *data; /* behind the header */
    size_t header_bytes; /* length prefix included */
    struct safetensors_tensor *tensors; /* sorted by name */
    size_t n_tensors;
};

/* Maps the file and checks it. NOT_FOUND when it does not exist; INVALID_ARGUMENT naming file,
 * tensor, value seen and expected when it is not as it should be. On failure nothing stays open. */
enum status safetensors_open(struct safetensors **out, const char *path, struct error *err);
void safetensors_close(struct safetensors *file);

/* The same checks over bytes in memory; fills the caller's struct, which borrows `bytes`. Release
 * with safetensors_parse_free. `path` is for the error's words. On failure nothing is left. */
enum status safetensors_parse(struct safetensors *out, const char *path, const void *bytes,
                              size_t n_bytes, struct error *err);
void safetensors_parse_free(struct safetensors *file);

/* NULL when the file has no such tensor. */
const struct safetensors_tensor *safetensors_find(const struct safetensors *file,
                                                  const char *name);
