/* What every bench says of the machine, and the bandwidth that it compares with. */
#pragma once
#include <stddef.h>

/* Prints processor, cores and load. */
void machine_print(void);

/* Zeroed memory in huge pages where possible; touched. */
void *machine_alloc(size_t bytes);
void machine_free(void *memory, size_t bytes);

/* Reads all bytes once with n_threads at once, each a share, pinned to processor i, as 1 or as 4
 * sequential streams: processors differ in which they fetch faster. bytes: a multiple of 1024. */
void machine_read(const void *memory, size_t bytes, int n_streams, int n_threads);

/* Bytes per second of the faster of the two. */
double machine_read_bandwidth(const void *memory, size_t bytes, int n_threads);
