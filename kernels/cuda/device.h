/* What every .cu file includes: CUDA as nvcc knows it, or as the emulator gives it (kernels/emulation/),
 * and the few PTX instructions the kernels use, each behind one function with both bodies.
 *
 * Kernels are launched by CU_LAUNCH, take dynamic shared memory by CU_DYN_SMEM and static by CU_SHARED
 * (T *name of n elements, unwritten at first); PTX stands nowhere else. mma fragments, by lane = 4 * g + t (g = lane / 4, t = lane % 4), as in the PTX manual:
 *   A m16 x k16 bf16: a[0] rows g, k 2t 2t+1; a[1] rows g+8; a[2] rows g, k 2t+8 2t+9; a[3] rows g+8, those k
 *   B k16 x n8 bf16:  b[0] k 2t 2t+1, column g; b[1] k 2t+8 2t+9
 *   C m16 x n8 f32:   c[0] c[1] row g, columns 2t 2t+1; c[2] c[3] row g+8
 *   int8: the same with k32 and four bytes a register. */
#pragma once

#include <stdint.h>

#include "kernels/cuda/queue.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define CU_DYN_SMEM(T, name)                                                                        \
    extern __shared__ __align__(16) unsigned char name##_bytes[];                                   \
    T *name = reinterpret_cast<T *>(name##_bytes)
#define CU_SHARED(T, name, n) __shared__ T name[n]
#define CU_LAUNCH(kernel, grid, size, shared_bytes, stream, ...)                                    \
    kernel<<<(grid), (size), (shared_bytes), (cudaStream_t)(stream)>>>(__VA_ARGS__)

/* Before a launch with more shared memory than any kernel may have without asking, 48 KB. */
#define CU_ALLOW_SHARED(kernel, bytes)                                                              \
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(bytes))

/* Programmatic dependent launch: a kernel that calls grid_wait before it reads or writes what others
 * write may be started while its predecessor drains. All kernels launched this way call it. */
template <class... Parameters, class... Arguments>
static inline void launch_overlapped(void (*kernel)(Parameters...), dim3 grid, dim3 size,
                                     size_t shared_bytes, void *stream, bool overlaps,
                                     Arguments... arguments) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = size;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = (cudaStream_t)stream;
    config.attrs = &attribute;
    config.numAttrs = overlaps ? 1 : 0;
    cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}
#define CU_LAUNCH_OVERLAPPED(kernel, grid, size, shared_bytes, queue, ...)                          \
    launch_overlapped(kernel, grid, size, shared_bytes, (queue).stream, (queue).overlaps, __VA_ARGS__)

static __device__ __forceinline__ void grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* Lets the next kernel's blocks take the places of this one's as they end. */
static __device__ __forceinline__ void grid_go_on() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

static __device__ __forceinline__ void mma_bf16(float (&c)[4], uint4 a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
static __device__ __forceinline__ void mma_s8(int (&c)[4], uint4 a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
/* Four 8x8 matrices of 16-bit elements: lanes 8i..8i+7 give the rows of matrix i. */
static __device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
/* 16 bytes from global to shared memory, landing when waited for. */
static __device__ __forceinline__ void cp_async16(void *to, const void *from) {
    uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(at), "l"(from) : "memory");
}
static __device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> static __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
/* A pair of bf16 times a pair of bf16, each rounded once. */
static __device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    uint32_t product;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
}
/* Weights are read once: they shall not push activations out of the first-level cache. */
static __device__ __forceinline__ uint4 load_streamed(const uint4 *at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}
/* What another block wrote during this launch. */
static __device__ __forceinline__ float load_fresh(const float *at) {
    return __ldcg(at);
}
/* The low (or high) two bytes of a word, each in 16 bits of its own. */
static __device__ __forceinline__ uint32_t spread_bytes(uint32_t word, bool high) {
    return __byte_perm(word, 0, high ? 0x4342 : 0x4140);
}
/* What a peer wrote, and what a peer shall read: 8 bytes of data and flag in one piece, which a scalar
 * access is and a vector of two is not promised to be. */
static __device__ __forceinline__ uint2 load_line(const uint2 *at) {
    unsigned long long v;
    asm volatile("ld.relaxed.sys.global.u64 %0,[%1];" : "=l"(v) : "l"(at) : "memory");
    return make_uint2((uint32_t)v, (uint32_t)(v >> 32));
}
static __device__ __forceinline__ void store_line(uint2 *at, uint2 v) {
    unsigned long long both = (unsigned long long)v.y << 32 | v.x;
    asm volatile("st.relaxed.sys.global.u64 [%0],%1;" ::"l"(at), "l"(both) : "memory");
}
static __device__ __forceinline__ uint32_t load_flag(const uint32_t *at) {
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0,[%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}
static __device__ __forceinline__ void store_flag(uint32_t *at, uint32_t v) {
    asm volatile("st.relaxed.sys.global.u32 [%0],%1;" ::"l"(at), "r"(v) : "memory");
}
static __device__ __forceinline__ unsigned long long device_ns() {
    unsigned long long ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
}
static __device__ __forceinline__ void spin_pause() {
    __nanosleep(20);
}
static __device__ __forceinline__ float add_f32(float a, float b) {
    return __fadd_rn(a, b);
}
static __device__ __forceinline__ float mul_f32(float a, float b) {
    return __fmul_rn(a, b);
}

#else

#include "kernels/emulation/device_emulated.h"

#endif

static __device__ __forceinline__ float bf16_value(uint32_t low_bits) {
    return __uint_as_float(low_bits << 16);
}
/* Round to nearest even; NaN stays NaN. The same bits as common/dtype.h. */
static __device__ __forceinline__ uint32_t bf16_bits(float value) {
    uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16 | 0x40u) & 0xffffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
static __device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
    return bf16_bits(low) | bf16_bits(high) << 16;
}

/* Sum over a warp, every lane the same bits: a tree over lanes by distance. */
static __device__ __forceinline__ float warp_sum(float v) {
    for (int with = 16; with > 0; with /= 2) v += __shfl_xor_sync(~0u, v, with);
    return v;
}
static __device__ __forceinline__ float warp_max(float v) {
    for (int with = 16; with > 0; with /= 2) {
        float other = __shfl_xor_sync(~0u, v, with);
        v = other > v ? other : v;
    }
    return v;
}
