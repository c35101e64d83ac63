/* What every bench says of the machine, and the bandwidth that it compares with. */
#pragma once
#include <stddef.h>

/* Prints processor, cores and load. */
void machine_print(void);

/* Zeroed memory in huge pages where possible; touched. */
void *machine_alloc(size_t bytes);
void machine_free(void *memory, size_t bytes);

/* Reads all bytes once, as fast as one thread can: four streams, prefetched. bytes: a multiple of 1024. */
void machine_read(const void *memory, size_t bytes);

/* The same by n_threads at once, each a share, pinned to processor i; starts and joins threads. */
void machine_read_threads(const void *memory, size_t bytes, int n_threads);
