/* What a rank computes on: the option --device, resolved on the machine it runs on. */
#pragma once
#include <stdint.h>
#include <stdio.h>

#include "common/error.h"
#include "kernels/backend.h"

struct device {
    enum backend_isa isa; /* never AUTO */
    int index;            /* CUDA: which, from 0 */
    char text[64];        /* "cpu (avx512)", "cuda:0 (9.0)", "emulated" */
    int64_t memory_bytes; /* free memory of the device; -1: the host's memory is what counts */
};

/* `wanted`: "auto" (a CUDA device where there is one, else the CPU), "cpu", "cuda" (of several, the one
 * that local_rank counts off), "cuda:K", "emulated". isa: the CPU's, or AUTO. INVALID_ARGUMENT for
 * another text; UNAVAILABLE, in one sentence, when a forced device is not there; FAILED_PRECONDITION
 * for an instruction set that is not. */
enum status device_resolve(struct device *out, const char *wanted, enum backend_isa isa,
                           int local_rank, struct error *err);

/* A line for everything that --device can name here, with its free memory; the CUDA devices come first. */
void device_list(FILE *out);
