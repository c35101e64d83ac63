/* Kernels with planted bugs, and one without: test_emulation.c shows that the emulator finds them. */
#include "kernels/cuda/device.h"

enum { N = 256 };

static __global__ void reversed_kernel(float *out, bool with_barrier) {
    CU_SHARED(float, values, N);
    values[threadIdx.x] = (float)threadIdx.x;
    if (with_barrier) __syncthreads();
    out[threadIdx.x] = values[N - 1 - threadIdx.x];
}

extern "C" void planted_reversed(float *out, bool with_barrier) {
    CU_LAUNCH(reversed_kernel, dim3(1), dim3(N), 0, NULL, out, with_barrier);
}

/* The second round overwrites what slow warps still read in the first. */
static __global__ void rounds_kernel(float *out, bool with_barrier) {
    CU_DYN_SMEM(float, values);
    float sum = 0;
    for (int round = 0; round < 4; round++) {
        values[threadIdx.x] = (float)(round * N + (int)threadIdx.x);
        __syncthreads();
        sum += values[N - 1 - threadIdx.x];
        if (with_barrier) __syncthreads();
    }
    out[threadIdx.x] = sum;
}

extern "C" void planted_rounds(float *out, bool with_barrier) {
    CU_LAUNCH(rounds_kernel, dim3(1), dim3(N), N * sizeof(float), NULL, out, with_barrier);
}

/* Copies that land late are not there without the wait. */
static __global__ void copies_kernel(float *out, const float *in, bool with_wait) {
    CU_DYN_SMEM(float, values);
    cp_async16(values + threadIdx.x * 4, in + threadIdx.x * 4);
    cp_async_commit();
    if (with_wait) cp_async_wait<0>();
    __syncthreads();
    for (int i = 0; i < 4; i++) out[i * 64 + threadIdx.x] = values[i * 64 + threadIdx.x];
}

extern "C" void planted_copies(float *out, const float *in, bool with_wait) {
    CU_LAUNCH(copies_kernel, dim3(1), dim3(64), N * sizeof(float), NULL, out, in, with_wait);
}

/* Half of a warp takes part in what all of it must. */
static __global__ void diverged_kernel(float *out) {
    float sum = 0;
    if (threadIdx.x < 16) sum = __shfl_xor_sync(~0u, 1.0f, 1);
    out[threadIdx.x] = sum;
}

extern "C" void planted_diverged(float *out) {
    CU_LAUNCH(diverged_kernel, dim3(1), dim3(32), 0, NULL, out);
}

static __global__ void unreached_kernel(float *out) {
    if (threadIdx.x != 7) __syncthreads();
    while (threadIdx.x == 7) __syncwarp(1u << 7 | 1u << 8); /* waits for a thread in the barrier */
    out[threadIdx.x] = 1;
}

extern "C" void planted_unreached(float *out) {
    CU_LAUNCH(unreached_kernel, dim3(1), dim3(32), 0, NULL, out);
}

/* Writes `past` elements behind its shared memory. */
static __global__ void overrun_kernel(float *out, int past) {
    CU_DYN_SMEM(float, values);
    values[threadIdx.x + past] = 1;
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x];
}

extern "C" void planted_overrun(float *out, int past) {
    CU_LAUNCH(overrun_kernel, dim3(1), dim3(32), 32 * sizeof(float), NULL, out, past);
}

/* Fragments by their definition: C += A B with ldmatrix for A and plain loads for B, bf16. */
static __global__ void fragments_kernel(float *c, const uint16_t *a, const uint16_t *b) {
    CU_DYN_SMEM(uint16_t, tile); /* A, [16][16] */
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (int i = lane; i < 256; i += 32) tile[i] = a[i];
    __syncthreads();
    uint32_t r[4];
    ldmatrix_x4(r, tile + lane % 16 * 16 + lane / 16 * 8);
    uint32_t b0 = b[(2 * t) * 8 + g] | (uint32_t)b[(2 * t + 1) * 8 + g] << 16;
    uint32_t b1 = b[(2 * t + 8) * 8 + g] | (uint32_t)b[(2 * t + 9) * 8 + g] << 16;
    float sums[4] = {0, 0, 0, 0};
    mma_bf16(sums, make_uint4(r[0], r[1], r[2], r[3]), b0, b1);
    for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

extern "C" void planted_fragments(float *c, const uint16_t *a, const uint16_t *b) {
    CU_LAUNCH(fragments_kernel, dim3(1), dim3(32), 512, NULL, c, a, b);
}
