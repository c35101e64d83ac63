/* What the two products, for few rows and for many, do alike. */
#pragma once
#include "kernels/cuda/arithmetic.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"

enum { WARPS = 8, THREADS = WARPS * LANES }; /* of a block; stripes of a leaf */

template <enum product_format F> struct accumulator {
    typedef float type;
};
template <> struct accumulator<PRODUCT_I8> {
    typedef int type;
};

/* Two e4m3 bytes, in 16 bits each, to two bf16, exactly: the exponent moves over as it is, and a
 * multiplication by 2^120 makes up for the difference of the biases. */
static __device__ __forceinline__ uint32_t widen_f8(uint32_t spread) {
    uint32_t bits = (spread & 0x00800080u) << 8 | (spread & 0x007f007fu) << 4;
    return mul_bf16x2(bits, 0x7b807b80u);
}

static __device__ __forceinline__ uint4 widen_f8_tile(uint32_t low, uint32_t high) {
    return make_uint4(widen_f8(spread_bytes(low, false)), widen_f8(spread_bytes(low, true)),
                      widen_f8(spread_bytes(high, false)), widen_f8(spread_bytes(high, true)));
}

/* One unit of one panel times one tile of 8 tokens. */
static __device__ __forceinline__ void multiply(float (&c)[4], const uint4 (&a)[2], uint4 b) {
    mma_bf16(c, a[0], b.x, b.y);
    mma_bf16(c, a[1], b.z, b.w);
}
static __device__ __forceinline__ void multiply(int (&c)[4], const uint4 (&a)[2], uint4 b) {
    mma_s8(c, a[0], b.x, b.y);
    mma_s8(c, a[1], b.z, b.w);
}
static __device__ __forceinline__ void multiply(float (&c)[4], const uint4 (&a)[1], uint4 b) {
    mma_bf16(c, widen_f8_tile(a[0].x, a[0].y), b.x, b.y);
    mma_bf16(c, widen_f8_tile(a[0].z, a[0].w), b.z, b.w);
}

/* The leaf's sum with its scales. */
template <enum product_format F, class C>
static __device__ __forceinline__ float finish(C sum, const struct product &p, int leaf, int output,
                                               int row) {
    if (F == PRODUCT_BF16) return (float)sum;
    float scale = p.w_scales[(size_t)leaf * p.n_padded + output];
    if (F == PRODUCT_I8) scale = p.x_scales[(size_t)row * p.leaves.n_leaves + leaf] * scale;
    return (float)sum * scale;
}

static __device__ __forceinline__ float leaf_tree(const float *partial, size_t stride, int n_leaves) {
    float sums[MAX_LEAVES];
#pragma unroll
    for (int i = 0; i < MAX_LEAVES; i++) {
        sums[i] = i < n_leaves ? load_fresh(partial + i * stride) : 0;
    }
    return binary_tree(sums, n_leaves);
}

/* Whether this block is the last of `group`'s, one for each leaf, to have written its part; then it may read
 * the others'. */
static __device__ __forceinline__ bool is_last_leaf(const struct product &p, unsigned group) {
    CU_SHARED(unsigned, n_before, 1);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *n_before = atomicInc(&p.counters[group], (unsigned)p.leaves.n_leaves - 1);
    }
    __syncthreads();
    if (*n_before != (unsigned)p.leaves.n_leaves - 1) return false;
    __threadfence();
    return true;
}

/* Of n_outputs outputs and n_tokens rows, by the whole block. */
static __device__ __forceinline__ void finish_tree(const struct product &p, int first_output,
                                                   int n_outputs, int first_row, int n_tokens) {
    const size_t leaf_stride = (size_t)p.n_rows * p.n;
    for (int i = threadIdx.x; i < n_outputs * n_tokens; i += THREADS) {
        int output = first_output + i % n_outputs, row = first_row + i / n_outputs;
        if (output >= p.n || row >= p.n_rows) continue;
        size_t at = (size_t)row * p.n + output;
        p.out[at] = leaf_tree(p.partial + at, leaf_stride, p.leaves.n_leaves);
    }
}
