/* Which backends a test can look into: those whose memory is the host's. A GPU's is not; tests/gpu/ has
 * its tests. */
#pragma once
#include "kernels/backend.h"

static inline bool computes_here(enum backend_isa isa) {
    return isa != BACKEND_CUDA && backend_isa_available(isa);
}
