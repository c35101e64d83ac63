/* Which backends a test can look into: those whose memory is the host's. A GPU's is not; tests/gpu/ has
 * its tests. */
#pragma once
#include <stdio.h>
#include <stdlib.h>

#include "kernels/backend.h"

static inline bool computes_here(enum backend_isa isa) {
    return isa != BACKEND_CUDA && backend_isa_available(isa);
}

/* Ends the test's process where that fails. */
static inline struct backend *open_backend(enum backend_isa isa, int n_threads, int max_rows,
                                           int max_width) {
    struct backend_options options = {isa, n_threads, max_rows, max_width, 0};
    struct backend *backend = NULL;
    struct error err = {0};
    if (backend_create(&backend, &options, &err) != STATUS_OK) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    return backend;
}
