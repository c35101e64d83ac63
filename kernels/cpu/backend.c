/* A backend of one rank: its instruction set, threads and scratch. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/ops.h"

enum status backend_create(struct backend **out, const struct backend_options *options,
                           struct error *err) {
    CHECK(options->n_threads >= 1);
    enum backend_isa isa = options->isa == BACKEND_AUTO ? backend_isa_best() : options->isa;
    if (!backend_isa_available(isa)) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "instruction set %s is not available on this processor; the best here is %s",
                         backend_isa_to_name(isa), backend_isa_to_name(backend_isa_best()));
    }
    struct backend *backend = xcalloc(1, sizeof *backend);
    backend->options = *options;
    backend->isa = isa;
    backend->ops = isa == BACKEND_PORTABLE ? &cpu_ops_portable
                   : isa == BACKEND_AVX2   ? &cpu_ops_avx2
                                           : &cpu_ops_avx512;
    if (options->n_threads > 1) {
        enum status status = pool_create(&backend->pool, options->n_threads, err);
        if (status != STATUS_OK) {
            free(backend);
            return status;
        }
    }
    *out = backend;
    return STATUS_OK;
}

void backend_destroy(struct backend *backend) {
    if (backend == NULL) return;
    pool_destroy(backend->pool);
    free(backend->packed);
    free(backend->sample_scratch);
    free(backend->sample_order);
    free(backend);
}

const char *backend_isa_name(const struct backend *backend) {
    return backend_isa_to_name(backend->isa);
}

enum backend_isa backend_isa(const struct backend *backend) {
    return backend->isa;
}

void *backend_alloc(struct backend *backend, size_t bytes) {
    (void)backend;
    size_t rounded = (bytes + 63) / 64 * 64;
    void *memory = aligned_alloc(64, rounded ? rounded : 64);
    if (memory != NULL) memset(memory, 0, rounded);
    return memory;
}

void backend_free(struct backend *backend, void *memory) {
    (void)backend;
    free(memory);
}

void *backend_packed(struct backend *backend, size_t bytes) {
    if (bytes > backend->packed_bytes) {
        free(backend->packed);
        backend->packed_bytes = (bytes + 4095) / 4096 * 4096;
        backend->packed = aligned_alloc(64, backend->packed_bytes);
        CHECK(backend->packed != NULL);
    }
    return backend->packed;
}
