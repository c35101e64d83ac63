/* Errors of the world (input, peer, file, capacity, device) and checks of ourselves.
 *
 * A function that can fail for a reason outside this program returns `enum status` and fills a
 * `struct error` with the words a person needs: what failed, where, the value seen, what was
 * expected. Programmer errors are CHECKs, which stay in release builds. */
#pragma once
#include <stddef.h>

/* Numbers are gRPC's status codes, so that a status crosses the wire unchanged. */
enum status {
    STATUS_OK = 0,
    STATUS_CANCELLED = 1,
    STATUS_UNKNOWN = 2,
    STATUS_INVALID_ARGUMENT = 3,
    STATUS_DEADLINE_EXCEEDED = 4,
    STATUS_NOT_FOUND = 5,
    STATUS_ALREADY_EXISTS = 6,
    STATUS_PERMISSION_DENIED = 7,
    STATUS_RESOURCE_EXHAUSTED = 8,
    STATUS_FAILED_PRECONDITION = 9,
    STATUS_ABORTED = 10,
    STATUS_OUT_OF_RANGE = 11,
    STATUS_UNIMPLEMENTED = 12,
    STATUS_INTERNAL = 13,
    STATUS_UNAVAILABLE = 14,
    STATUS_DATA_LOSS = 15,
    STATUS_UNAUTHENTICATED = 16,
};

struct error {
    enum status status;
    char text[640];
};

/* Fills `err` (may be NULL) and returns `status`. */
enum status error_set(struct error *err, enum status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Puts words in front of the text already in `err`: "prefix: text". Returns err->status. */
enum status error_prefix(struct error *err, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* The status's upper-case name, e.g. "INVALID_ARGUMENT". */
const char *status_name(enum status status);

/* Propagates a failure: TRY(config_load(&config, path, err)); */
#define TRY(call)                                                                                  \
    do {                                                                                           \
        enum status try_status_ = (call);                                                          \
        if (try_status_ != STATUS_OK) return try_status_;                                          \
    } while (0)

/* The same where something must be released first: jumps to `fail:` with `status` set. */
#define TRY_OR_FAIL(call)                                                                          \
    do {                                                                                           \
        status = (call);                                                                           \
        if (status != STATUS_OK) goto fail;                                                        \
    } while (0)

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) check_failed(#condition, __FILE__, __LINE__);                            \
    } while (0)

_Noreturn void check_failed(const char *condition, const char *file, int line);

/* malloc family that never returns NULL: running out of host memory for book-keeping is fatal. */
void *xmalloc(size_t bytes);
void *xcalloc(size_t count, size_t bytes);
void *xrealloc(void *memory, size_t bytes);
char *xstrdup(const char *text);
