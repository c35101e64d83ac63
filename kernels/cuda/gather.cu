/* All-gather through memory that ranks write into each other's: one launch, no host, no library.
 *
 * Idea: a rank's piece travels as lines of 8 bytes, 4 of data and 4 of flag, written in one store, so
 * that whoever sees the flag of this exchange has the data (the LL protocol of NCCL, by its published
 * description). Each rank writes its lines into every inbox, then reads its own. Flags are exchange
 * numbers, counted on the device, so that a graph can replay an exchange. An inbox has two halves for
 * even and odd exchanges: a rank begins exchange e + 2 only after all have sent e + 1, which they do
 * after they have read e.
 *
 * Waiting is bounded: past the limit the kernel notes which rank is missing and goes on with what it has;
 * the host finds the note at its next wait. Blocks wait for other ranks' blocks, so ranks that share a
 * device must all fit on it at once: GATHER_BLOCKS is small.
 *
 * Bytes: twice the data to every rank. A thread has one line of every rank underway at a time. */
#include "kernels/cuda/device.h"
#include "kernels/cuda/gather.h"

enum { THREADS = 256, GATHER_BLOCKS = 16 };

/* Line i of what `from` sent, in a rank's inbox. */
static __device__ __forceinline__ uint2 *line_at(uint2 *inbox, const struct gather &g, int from,
                                                 uint32_t exchange, size_t i) {
    return inbox + ((size_t)(exchange & 1) * g.size + from) * g.max_words + i;
}

/* The same line until it is this exchange's. */
static __device__ __forceinline__ uint32_t wait_for(const uint2 *at, const struct gather &g, int from,
                                                    uint32_t exchange) {
    uint2 line = load_line(at);
    const unsigned long long begin = device_ns();
    while (line.y != exchange && device_ns() - begin < g.max_ns) {
        if (load_flag(&g.state->missing) != 0) break; /* one long wait is enough */
        spin_pause();
        line = load_line(at);
    }
    /* The first note stays: who gave up because of it has not waited long enough to blame anybody. */
    if (line.y != exchange) atomicCAS(&g.state->missing, 0u, (uint32_t)from + 1);
    return line.x;
}

static __global__ void __launch_bounds__(THREADS, 1)
    gather_kernel(uint32_t *recv, const uint32_t *send, size_t n_words,
                  const __grid_constant__ struct gather g) {
    CU_SHARED(uint32_t, number, 2);
    grid_wait();
    if (threadIdx.x == 0) {
        uint32_t next = load_flag(&g.state->n_exchanges) + 1;
        number[0] = next != 0 ? next : 2; /* 0 is the flag of a line never written; halves alternate on */
        number[1] = load_flag(&g.state->missing);
    }
    __syncthreads();
    const uint32_t exchange = number[0];
    const bool has_failed = number[1] != 0;
    const size_t first = (size_t)blockIdx.x * THREADS + threadIdx.x;
    const size_t stride = (size_t)gridDim.x * THREADS;
    /* Who waited in vain has nothing to tell. */
    for (size_t i = first; i < n_words && !has_failed; i += stride) {
        uint2 line;
        line.x = send[i];
        line.y = exchange;
        for (int rank = 0; rank < g.size; rank++) {
            store_line(line_at(g.inboxes[rank], g, g.rank, exchange, i), line);
        }
    }
    for (size_t i = first; i < n_words; i += stride) {
        uint2 lines[GATHER_MAX_RANKS];
#pragma unroll
        for (int from = 0; from < GATHER_MAX_RANKS; from++) {
            if (from >= g.size) break;
            lines[from] = load_line(line_at(g.inboxes[g.rank], g, from, exchange, i));
        }
#pragma unroll
        for (int from = 0; from < GATHER_MAX_RANKS; from++) {
            if (from >= g.size) break;
            uint32_t word = lines[from].x;
            if (lines[from].y != exchange) {
                word = wait_for(line_at(g.inboxes[g.rank], g, from, exchange, i), g, from, exchange);
            }
            recv[(size_t)from * n_words + i] = word;
        }
    }
    /* The last block to come here counts the exchange; all have read the number by then. */
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (atomicInc(&g.state->n_arrived, gridDim.x - 1) == gridDim.x - 1) {
        store_flag(&g.state->n_exchanges, exchange);
    }
}

extern "C" void launch_gather(struct cuda_queue queue, void *recv, const void *send, size_t bytes,
                              const struct gather *gather) {
    size_t n_words = bytes / 4, n_blocks = (n_words + THREADS - 1) / THREADS;
    if (n_blocks > GATHER_BLOCKS) n_blocks = GATHER_BLOCKS;
    CU_LAUNCH_OVERLAPPED(gather_kernel, dim3((unsigned)n_blocks), dim3(THREADS), 0, queue,
                         (uint32_t *)recv, (const uint32_t *)send, n_words, *gather);
}
