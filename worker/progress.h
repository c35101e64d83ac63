/* How far loading is, for whoever watches the worker's standard error: a bar on a terminal, else a line
 * every few seconds. Nothing for what loads at once. */
#pragma once
#include <stddef.h>
#include <stdint.h>

struct progress {
    int64_t start_ns, shown_ns; /* zeros at first */
};

/* After every piece, and with bytes_done == bytes_total in the end. Any one thread. */
void progress_show(struct progress *progress, size_t bytes_done, size_t bytes_total);

/* The bar's text, "[#####.....]  50 %  8.0 of 16.1 GB, 1.2 GB/s", in out; for tests. */
void progress_text(char *out, size_t size, size_t bytes_done, size_t bytes_total, int64_t took_ns);
