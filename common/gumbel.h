/* Exponential, logarithm and Gumbel noise in plain f32 arithmetic: the same bits wherever IEEE
 * additions, multiplications and fmaf are, on every CPU and GPU. No library function. */
#pragma once
#include <stdint.h>
#include <string.h>

#include "common/philox.h"

PHILOX_ANYWHERE float gumbel_bits_to_f32(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

PHILOX_ANYWHERE uint32_t gumbel_f32_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Natural logarithm of a positive normal x, within 2 ulp or 1e-7 near 1: x = m * 2^e with m in
 * [sqrt(1/2), sqrt(2)), log m = 2 artanh(s), s = (m-1)/(m+1), as a series in s^2. */
PHILOX_ANYWHERE float gumbel_log(float x) {
    uint32_t bits = gumbel_f32_to_bits(x);
    int32_t exponent = (int32_t)(bits - 0x3f3504f3u) >> 23; /* 0x3f3504f3: sqrt(1/2) */
    float m = gumbel_bits_to_f32(bits - ((uint32_t)exponent << 23));
    float s = (m - 1.0f) / (m + 1.0f);
    float z = s * s;
    float series = 0.11111111f * z + 0.14285715f;
    series = series * z + 0.2f;
    series = series * z + 0.33333334f;
    float log_m = 2.0f * s + 2.0f * s * z * series;
    return (float)exponent * 0.693145752f + ((float)exponent * 1.42860677e-6f + log_m);
}

/* e^x, within 2 ulp; 0 below -87.3, where results stop being normal; x at most 88. */
PHILOX_ANYWHERE float gumbel_exp(float x) {
    if (!(x > -87.3f)) return 0.0f;
    float k = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer in the low bits */
    int32_t n = (int32_t)(gumbel_f32_to_bits(k) - 0x4b400000u);
    k -= 12582912.0f;
    float r = x - k * 0.693359375f;
    r -= k * -2.12194440e-4f;
    float p = 1.9875691e-4f * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    return p * gumbel_bits_to_f32((uint32_t)(n + 127) << 23);
}

/* Standard Gumbel noise of 32 random bits: -log(-log u). Its range, for skipping what cannot win: */
#define GUMBEL_MAX 16.64f
#define GUMBEL_MIN (-2.82f)
PHILOX_ANYWHERE float gumbel_noise(uint32_t bits) {
    return -gumbel_log(-gumbel_log(philox_uniform(bits)));
}

/* The four random words of tokens 4i .. 4i+3 at a position of a request. */
PHILOX_ANYWHERE void gumbel_words(uint32_t out[4], uint64_t seed, int64_t position,
                                  uint32_t token_i4) {
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t counter[4] = {(uint32_t)position, (uint32_t)((uint64_t)position >> 32), token_i4,
                           (uint32_t)PHILOX_COUPLE};
    philox4x32_10(out, counter, key);
}
