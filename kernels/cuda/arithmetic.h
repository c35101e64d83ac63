/* Arithmetic of kernels beyond single instructions. */
#pragma once
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"

/* e^x within 2 ulp; 0 below -87.3, where results stop being normal; x at most 88. In plain f32, so that
 * every device gives the same bits; the series is common/gumbel.h's. */
static __device__ __forceinline__ float exp_f32(float x) {
    if (!(x > -87.3f)) return 0.0f;
    float k = add_f32(mul_f32(x, 1.44269504f), 12582912.0f);
    int n = (int)(__float_as_uint(k) - 0x4b400000u);
    k -= 12582912.0f;
    float r = x - mul_f32(k, 0.693359375f);
    r = r - mul_f32(k, -2.12194440e-4f);
    float p = add_f32(mul_f32(1.9875691e-4f, r), 1.3981999e-3f);
    p = add_f32(mul_f32(p, r), 8.3334519e-3f);
    p = add_f32(mul_f32(p, r), 4.1665796e-2f);
    p = add_f32(mul_f32(p, r), 1.6666665e-1f);
    p = add_f32(mul_f32(p, r), 0.5f);
    p = add_f32(add_f32(mul_f32(p, mul_f32(r, r)), r), 1.0f);
    return p * __uint_as_float((uint32_t)(n + 127) << 23);
}

/* ((l0+l1)+(l2+l3))+((l4+l5)+(l6+l7)), or the same over fewer: n is a power of two. Takes sums apart. */
static __device__ __forceinline__ float binary_tree(float (&sums)[MAX_LEAVES], int n) {
#pragma unroll
    for (int width = 1; width < MAX_LEAVES; width *= 2) {
        if (width >= n) break;
#pragma unroll
        for (int i = 0; i < MAX_LEAVES; i += 2 * width) sums[i] += sums[i + width];
    }
    return sums[0];
}

/* Sum over a block of N threads, the same bits in all: warps by warp_sum, then warps in order. `sums`
 * has room for N / 32; the block must have passed a barrier since its last use. */
template <int N> static __device__ __forceinline__ float block_sum(float v, float *sums) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    v = sums[0];
    for (int w = 1; w < N / 32; w++) v += sums[w];
    return v;
}

static __device__ __forceinline__ float f16_value(uint32_t half) {
    uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 0x1fu, mantissa = half & 0x3ffu;
    if (exponent == 0x1f) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0) return __uint_as_float(sign | (exponent + 112u) << 23 | mantissa << 13);
    float magnitude = (float)mantissa * 5.9604644775390625e-8f; /* 2^-24: subnormal, exact */
    return sign ? -magnitude : magnitude;
}

/* An element of a checkpoint tensor. */
static __device__ __forceinline__ float load_source(const void *raw, enum source_type type,
                                                    size_t at) {
    if (type == SOURCE_F32) return ((const float *)raw)[at];
    uint32_t bits = ((const uint16_t *)raw)[at];
    return type == SOURCE_BF16 ? bf16_value(bits) : f16_value(bits);
}
