#include "worker/spec/accept.h"

#include <stddef.h>

#include "common/philox.h"

static float uniform(enum philox_purpose purpose, uint64_t seed, int64_t position) {
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t counter[4] = {(uint32_t)position, (uint32_t)((uint64_t)position >> 32), 0,
                           (uint32_t)purpose};
    uint32_t words[4];
    philox4x32_10(words, counter, key);
    return philox_uniform(words[0]);
}

bool accept_by_rejection(float p, float q, uint64_t seed, int64_t position) {
    return uniform(PHILOX_ACCEPT, seed, position) * q < p;
}

static double excess(const float *p, const float *q, int v) {
    return p[v] > q[v] ? (double)p[v] - (double)q[v] : 0;
}

/* The first id at which the running sum of weights passes `share` of their total; ids of no weight
 * are never taken. */
static int32_t invert(const float *p, const float *q, int vocab, double total, double share) {
    double sum = 0;
    int32_t last = 0;
    for (int v = 0; v < vocab; v++) {
        double weight = q != NULL ? excess(p, q, v) : (double)p[v];
        if (weight <= 0) continue;
        sum += weight;
        last = v;
        if (sum > share * total) return v;
    }
    return last;
}

int32_t accept_residual(const float *p, const float *q, int vocab, uint64_t seed,
                        int64_t position) {
    double share = (double)uniform(PHILOX_RESIDUAL, seed, position), total = 0, all = 0;
    for (int v = 0; v < vocab; v++) {
        total += excess(p, q, v);
        all += (double)p[v];
    }
    if (total > 0) return invert(p, q, vocab, total, share);
    return invert(p, NULL, vocab, all, share);
}
