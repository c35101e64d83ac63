/* A growable run of bytes. Zero-initialise; free with bytes_free. */
#pragma once
#include <stdlib.h>
#include <string.h>

#include "common/error.h"

struct bytes {
    char *data;
    size_t n, capacity;
};

static inline void bytes_append(struct bytes *bytes, const void *data, size_t n) {
    if (n == 0) return;
    if (bytes->n + n > bytes->capacity) {
        bytes->capacity = (bytes->n + n) * 2;
        bytes->data = xrealloc(bytes->data, bytes->capacity);
    }
    memcpy(bytes->data + bytes->n, data, n);
    bytes->n += n;
}

/* Takes the first n bytes out. */
static inline void bytes_drop(struct bytes *bytes, size_t n) {
    if (n == 0) return;
    memmove(bytes->data, bytes->data + n, bytes->n - n);
    bytes->n -= n;
}

static inline void bytes_free(struct bytes *bytes) {
    free(bytes->data);
    *bytes = (struct bytes){0};
}
