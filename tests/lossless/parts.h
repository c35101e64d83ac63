/* The parts of the exactness suite; each prints what it did and returns how many failures it saw. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "kernels/backend.h"

struct part_options {
    bool full; /* the whole grid, not the reduced one */
    uint64_t seed;
    enum backend_isa isa; /* of part_lossless */
};

int part_lossless(const struct part_options *options);
int part_law(const struct part_options *options);
int part_calibration(const struct part_options *options);
int part_ends(const struct part_options *options);
int part_sync(const struct part_options *options);
