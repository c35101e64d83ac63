/* What inbox.c tells the kernel of gather.cu. Pointers are the device's. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kernels/cuda/device_types.h"
#include "kernels/cuda/queue.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { GATHER_MAX_RANKS = 8 }; /* BACKEND_MAX_PEERS */

struct gather_state {
    uint32_t n_exchanges; /* done */
    unsigned n_arrived;   /* blocks at the end of this one */
    uint32_t missing;     /* a rank + 1 that did not send in time; 0: none */
};

struct gather {
    uint2 *inboxes[GATHER_MAX_RANKS]; /* [2][size][max_words] of each rank */
    struct gather_state *state;       /* this rank's */
    int rank, size;
    size_t max_words;
    unsigned long long max_ns; /* of waiting for one line */
};

/* recv[size][bytes] from everybody's send[bytes]; bytes: a multiple of 4, at most 4 * max_words. */
void launch_gather(struct cuda_queue queue, void *recv, const void *send, size_t bytes,
                   const struct gather *gather);

#ifdef __cplusplus
}
#endif
