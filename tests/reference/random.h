/* Random test inputs: splitmix64, so that a printed seed gives the same inputs anywhere. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

struct test_random {
    uint64_t state;
};

static inline uint64_t random_u64(struct test_random *random) {
    uint64_t z = random->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* 0 .. n - 1 */
static inline int random_below(struct test_random *random, int n) {
    return (int)(random_u64(random) % (uint64_t)n);
}

/* low .. high */
static inline float random_f32(struct test_random *random, float low, float high) {
    return low + (high - low) * (float)(random_u64(random) >> 40) * 0x1p-24f;
}

/* [n] values of low .. high; the caller frees. One element at least, so that it is never NULL. */
static inline float *random_floats(struct test_random *random, size_t n, float low, float high) {
    float *values = calloc(n + 1, sizeof *values);
    if (values == NULL) abort();
    for (size_t i = 0; i < n; i++) values[i] = random_f32(random, low, high);
    return values;
}
