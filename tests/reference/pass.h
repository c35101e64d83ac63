/* Passes of tests that call ops by themselves: the rows are those that the segments cover. The pass
 * must live until its ops are called. */
#pragma once
#include "kernels/backend.h"

static inline void begin_pass(struct backend *backend, struct backend_pass *pass,
                              const struct backend_segment *segments, int n_segments) {
    *pass = (struct backend_pass){.segments = segments, .n_segments = n_segments};
    for (int i = 0; i < n_segments; i++) {
        int end = segments[i].row + segments[i].n_rows;
        if (end > pass->n_rows) pass->n_rows = end;
    }
    backend_pass_begin(backend, pass);
}
