/* tandem-bench device: kernels on a GPU against the bandwidth of its memory. */
#pragma once
#include <stddef.h>

#include "kernels/backend.h"

int bench_device(int argc, char **argv);

/* Bytes per second that a device's memory gives: a copy of `bytes` inside it, counting what is read and
 * what is written; the fastest of a few. */
double device_bandwidth(struct backend *backend, size_t bytes);
