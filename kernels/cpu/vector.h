/* Sixteen lanes, whatever the processor: GCC's vectors, lowered to its registers. The lanes fix the
 * order of sums, so one text gives one order everywhere. Private to the bodies. */
#pragma once
#include <stdint.h>
#include <string.h>

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));

#define VINLINE static inline __attribute__((always_inline))

VINLINE v16 v16_load(const float *at) {
    v16 value;
    memcpy(&value, at, sizeof value);
    return value;
}

VINLINE void v16_store(float *at, v16 value) {
    memcpy(at, &value, sizeof value);
}

VINLINE v16 v16_set(float value) {
    return value - (v16){0};
}

/* The first n (< 16) floats, zero behind them. */
VINLINE v16 v16_load_part(const float *at, int n) {
    float lanes[16] = {0};
    memcpy(lanes, at, (size_t)n * sizeof *lanes);
    return v16_load(lanes);
}

VINLINE void v16_store_part(float *at, v16 value, int n) {
    float lanes[16];
    v16_store(lanes, value);
    memcpy(at, lanes, (size_t)n * sizeof *lanes);
}

/* Halves, then halves of halves: a fixed tree. */
VINLINE float v16_sum(v16 value) {
    float lanes[16];
    v16_store(lanes, value);
    for (int width = 8; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

VINLINE float v16_max(v16 value) {
    float lanes[16];
    v16_store(lanes, value);
    for (int i = 1; i < 16; i++) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
}

VINLINE v16 v16_select(v16i mask, v16 yes, v16 no) {
    return (v16)((mask & (v16i)yes) | (~mask & (v16i)no));
}

/* As gumbel_exp (common/gumbel.h), lane by lane. */
VINLINE v16 v16_exp(v16 x) {
    v16i normal = x > v16_set(-87.3f);
    x = v16_select(normal, x, (v16){0});
    v16 k = x * 1.44269504f + 12582912.0f;
    v16i n = (v16i)k - 0x4b400000;
    k -= 12582912.0f;
    v16 r = x - k * 0.693359375f;
    r -= k * -2.12194440e-4f;
    v16 p = 1.9875691e-4f * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    v16 scaled = p * (v16)((n + 127) << 23);
    return v16_select(normal, scaled, (v16){0});
}

/* Two bf16 values in each lane: the low one, the high one, as floats. */
VINLINE v16 v16_low(v16u pairs) {
    return (v16)(pairs << 16);
}

VINLINE v16 v16_high(v16u pairs) {
    return (v16)(pairs & 0xffff0000u);
}

/* Rounds to bf16 (nearest even) in the upper half of each lane. Not for NaN. */
VINLINE v16u v16_round_bf16(v16 value) {
    v16u bits = (v16u)value;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}
