/* Between the two halves of the double: the streams. All calls with the lock held. */
#pragma once
#include <nccl.h>

#include "tests/doubles/nccl_double.h"

/* One side of a message inside a group of calls. */
struct double_part {
    bool is_send, done;
    void *buffer;
    size_t bytes;
    int peer;
};

enum double_kind { DOUBLE_COPY, DOUBLE_EVENT, DOUBLE_COLLECTIVE, DOUBLE_PARTS };

struct double_task {
    struct double_task *next;
    enum double_kind kind;
    bool done;
    /* copies and collectives */
    void *to;
    const void *from;
    size_t bytes;
    int root;              /* of a broadcast; -1: an all-gather */
    /* events */
    cudaEvent_t event;     /* NULL: destroyed meanwhile */
    unsigned long number;
    /* of a communicator; NULL: not, or aborted meanwhile */
    ncclComm_t comm;
    struct double_part parts[2 * NCCL_DOUBLE_MAX_RANKS];
    int n_parts;
};

struct CUstream_st {
    struct double_task *head;
    struct CUstream_st *next;
};

struct CUevent_st {
    unsigned long recorded, reached;
};

void double_lock(void);
void double_unlock(void);
/* Puts a copy of *task at the stream's end. */
void double_push(cudaStream_t stream, const struct double_task *task);
/* Runs whatever can run, sometimes (settings.lazy). */
void double_progress(void);
void double_forget_event(cudaEvent_t event);
extern struct nccl_double_settings double_settings;
extern struct nccl_double_counts double_counts;
