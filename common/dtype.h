/* Number formats of checkpoints and kernels, and their conversions (round to nearest even). */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum dtype { DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_I8, DTYPE_F8 /* e4m3 */ };

static inline size_t dtype_bytes(enum dtype dtype) {
    return dtype == DTYPE_F32 ? 4 : dtype == DTYPE_I8 || dtype == DTYPE_F8 ? 1 : 2;
}

static inline const char *dtype_name(enum dtype dtype) {
    static const char *const names[] = {"f32", "f16", "bf16", "int8", "fp8"};
    return names[dtype];
}

/* A format that weights can be kept in, by its name on command lines; -1: none of bf16, int8, fp8. */
static inline int dtype_of_weights(const char *name) {
    if (strcmp(name, "bf16") == 0) return DTYPE_BF16;
    if (strcmp(name, "int8") == 0) return DTYPE_I8;
    return strcmp(name, "fp8") == 0 ? DTYPE_F8 : -1;
}

static inline float bf16_to_f32(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

static inline uint16_t bf16_from_f32(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u); /* NaN */
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float f16_to_f32(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = (half >> 10) & 0x1fu;
    uint32_t mantissa = half & 0x3ffu;
    uint32_t bits;
    if (exponent == 0x1f) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent != 0) {
        bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
    } else {
        float magnitude = (float)mantissa * 0x1p-24f; /* subnormal: exact */
        memcpy(&bits, &magnitude, sizeof bits);
        bits |= sign;
    }
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

/* One element of a checkpoint tensor as f32. `data` points at element 0. */
static inline float dtype_load_f32(const void *data, enum dtype dtype, size_t index) {
    if (dtype == DTYPE_F32) {
        float value;
        memcpy(&value, (const char *)data + index * 4, 4);
        return value;
    }
    uint16_t half;
    memcpy(&half, (const char *)data + index * 2, 2);
    return dtype == DTYPE_BF16 ? bf16_to_f32(half) : f16_to_f32(half);
}
