/* What the makers of groups share: the table of a group's operations, the common wait, and the
 * algorithm over shared memory. Private to worker/comm/. */
#pragma once
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "worker/comm/comm.h"

struct comm_ops {
    enum status (*broadcast)(struct comm *, void *, size_t, int root, struct error *);
    enum status (*all_gather)(struct comm *, void *, const void *, size_t, struct error *);
    enum status (*gather)(struct comm *, void *, const void *, const size_t *, int root,
                          struct error *);
    enum status (*send)(struct comm *, const void *, size_t, int to, struct error *);
    enum status (*recv)(struct comm *, void *, size_t, int from, struct error *);
    enum status (*complete)(struct comm *, struct error *); /* NULL: calls wait */
    enum status (*check)(struct comm *, struct error *);
    void (*abort)(struct comm *, const char *reason);
    void (*destroy)(struct comm *);
};

/* The head of every group; makers put their own fields behind it. */
struct comm {
    const struct comm_ops *ops;
    int rank, size;
    size_t recordable_bytes;
};

/* --- waiting --------------------------------------------------------------------------------- */

/* One wait: spins, then yields the processor. `crowded`: there are more ranks than processors,
 * spinning would keep the awaited one from running. */
struct comm_wait {
    bool crowded;
    uint32_t turns;
};
/* A turn of spinning or yielding; false, and nothing done, when it is time to sleep. */
bool comm_wait_turn(struct comm_wait *wait);

/* --- groups over shared memory --------------------------------------------------------------- */

/* The region that n ranks share; size from comm_shared_bytes, zeroed before the first use. */
struct comm_region;
size_t comm_shared_bytes(int n_ranks);

/* A rank's view. `region` is borrowed; `release` (may be NULL) is called at destroy. pid: whether
 * members are processes of their own, whose death can be seen. */
struct comm *comm_shared_create(struct comm_region *region, int rank, int size, bool processes,
                                void (*release)(void *user), void *user);
