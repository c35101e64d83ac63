#include "common/error.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum status error_set(struct error *err, enum status status, const char *format, ...) {
    if (err == NULL) return status;
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    err->status = status;
    return status;
}

enum status error_prefix(struct error *err, const char *format, ...) {
    char old[sizeof err->text];
    snprintf(old, sizeof old, "%s", err->text);
    va_list args;
    va_start(args, format);
    int n = vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    if (n >= 0 && (size_t)n < sizeof err->text) {
        snprintf(err->text + n, sizeof err->text - (size_t)n, ": %s", old);
    }
    return err->status;
}

const char *status_name(enum status status) {
    static const char *const names[] = {
        "OK",           "CANCELLED",           "UNKNOWN",           "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED", "NOT_FOUND",      "ALREADY_EXISTS",    "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",     "OUT_OF_RANGE",
        "UNIMPLEMENTED", "INTERNAL",           "UNAVAILABLE",       "DATA_LOSS",
        "UNAUTHENTICATED",
    };
    if ((size_t)status >= sizeof names / sizeof *names) return "UNKNOWN";
    return names[status];
}

_Noreturn void check_failed(const char *condition, const char *file, int line) {
    fprintf(stderr, "tandem: internal error: CHECK(%s) failed at %s:%d\n", condition, file, line);
    abort();
}

void *xmalloc(size_t bytes) {
    void *memory = malloc(bytes ? bytes : 1);
    CHECK(memory != NULL);
    return memory;
}

void *xcalloc(size_t count, size_t bytes) {
    void *memory = calloc(count ? count : 1, bytes ? bytes : 1);
    CHECK(memory != NULL);
    return memory;
}

void *xrealloc(void *memory, size_t bytes) {
    memory = realloc(memory, bytes ? bytes : 1);
    CHECK(memory != NULL);
    return memory;
}

char *xstrdup(const char *text) {
    char *copy = strdup(text);
    CHECK(copy != NULL);
    return copy;
}
