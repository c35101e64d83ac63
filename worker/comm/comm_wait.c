/* The wait that all makers of groups share. */
#include <sched.h>

#include "common/relax.h"
#include "worker/comm/comm_internal.h"

/* Spinning lasts a few microseconds: a peer that was put on this same processor cannot run
 * meanwhile. Yielding, which goes on for about a millisecond, sees a mark nearly as soon. */
enum { SPIN_TURNS = 100, CROWDED_SPIN_TURNS = 20, YIELD_TURNS = 5000, CROWDED_YIELD_TURNS = 300 };

bool comm_wait_turn(struct comm_wait *wait) {
    uint32_t spins = wait->crowded ? CROWDED_SPIN_TURNS : SPIN_TURNS;
    uint32_t yields = wait->crowded ? CROWDED_YIELD_TURNS : YIELD_TURNS;
    if (wait->turns >= spins + yields) return false;
    if (wait->turns++ >= spins) {
        sched_yield();
        return true;
    }
    cpu_relax();
    return true;
}
