/* NCCL without devices: the calls that worker/comm/comm_nccl.c makes, over the threads of one
 * process, with faults on demand. Memory is the host's. Streams are lists of what was put on them;
 * they move when somebody looks (an event's query, a communicator's state), so an operation is done
 * only once it was waited for. Compiled with the toolkit's headers, in place of its libraries:
 * nccl_double.c has NCCL's names, cuda_double.c the CUDA runtime's.
 *
 * One group of settings for the process, changed only while no rank runs. */
#pragma once
#include <stdbool.h>

enum { NCCL_DOUBLE_MAX_RANKS = 16 };

struct nccl_double_settings {
    bool immediate;    /* streams are somebody else's and execute at once: a communicator is "in
                          progress" until its call is done, and its `stream` is not looked at */
    int launch_polls;  /* looks at the state until a call is on its stream */
    int lazy;          /* streams move at one look in so many; 0: at each */
    int init_polls;    /* looks until a communicator that everybody joined is ready */
    int silent_rank;   /* its operations never arrive anywhere; -1: nobody's */
    bool abort_is_seen; /* a rank's abort is an asynchronous error of the others */
    /* Faults: an ncclResult_t or cudaError_t, 0 for none. `_rank` -1: of all ranks. */
    int id_code;                            /* of ncclGetUniqueId */
    int init_code, init_code_rank;          /* asynchronous, when all have joined */
    int fail_code, fail_rank, fail_call;    /* asynchronous, at that call of a rank (1..) */
    int refuse_code, refuse_rank, refuse_call; /* returned by that call */
    int device_code, memory_code;           /* of cudaSetDevice, cudaMalloc */
    int query_code;                         /* of cudaEventQuery */
    void (*on_query)(void);                 /* called by cudaEventQuery before it looks; or NULL */
};

/* No faults, three looks here and there; lets go of what was set before. */
struct nccl_double_settings nccl_double_usual(void);
void nccl_double_set(const struct nccl_double_settings *settings);

/* What is alive, and how communicators ended, since nccl_double_set. */
struct nccl_double_counts {
    int comms, events, allocations;
    int destroyed, aborted;
};
struct nccl_double_counts nccl_double_counts(void);

/* A cudaStream_t. Destroyed once nobody uses it; what is left on it is dropped. */
void *nccl_double_stream_create(void);
void nccl_double_stream_destroy(void *stream);
