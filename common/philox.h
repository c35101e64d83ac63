/* Counter-based random bits: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
 * 1, 2, 3", SC 2011). A pure function of key and counter: the same on every rank, backend, batch.
 *
 * Key = the request's seed. Counter = (position low, position high, token id / 4, purpose); the
 * four output words belong to token ids 4i .. 4i+3. */
#pragma once
#include <stdint.h>

/* Kernels read these headers too. */
#if defined(__CUDACC__)
#define PHILOX_ANYWHERE static __host__ __device__ inline
#else
#define PHILOX_ANYWHERE static inline
#endif

enum philox_purpose { PHILOX_COUPLE = 0, PHILOX_ACCEPT = 1, PHILOX_RESIDUAL = 2 };

PHILOX_ANYWHERE void philox4x32_10(uint32_t out[4], const uint32_t counter[4],
                                   const uint32_t key[2]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0;
        uint64_t p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        uint32_t n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* Random bits to a uniform float strictly inside (0, 1): (h + 1/2) / 2^23 with h the top 23 bits,
 * exact in f32; never 0, never 1. */
PHILOX_ANYWHERE float philox_uniform(uint32_t bits) {
    return ((float)(bits >> 9) + 0.5f) * 0x1p-23f;
}
