/* The emulated device: CUDA C++ compiled by the host's compiler, one fiber per CUDA thread.
 *
 * A block's threads are fibers of the launching OS thread, switched at barriers and warp operations
 * only, in one of five scheduling orders, so that a missing barrier shows in at least one of them.
 * Shared memory starts as NaN in every block; cp.async lands late (orders 0 to 2) or early
 * (3 and 4); a divergent warp operation or a barrier that not all reach ends the program with the
 * state of the threads. Tensor-core operations use the fragment layouts of the PTX manual.
 * For tests: hundreds of times slower than the CPU backend.
 *
 * The scheduling order is the emulator's one piece of global state, set by tests before a launch. */
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <vector>

#include "kernels/emulation/cuda_runtime.h"
#include "kernels/emulation/order.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return uint4{x, y, z, w};
}
static inline float4 make_float4(float x, float y, float z, float w) {
    return float4{x, y, z, w};
}

namespace emulation {

enum lane_state : uint8_t { READY, WAIT_BLOCK, WAIT_WARP, DONE };
enum warp_op : uint8_t { SHUFFLE, BALLOT, SYNC, COLLECTIVE };

struct copy {
    void *to;
    const void *from; /* nullptr: zeros */
    size_t bytes;
};

struct lane {
    void *stack_pointer = nullptr, *stack = nullptr, *fake_stack = nullptr;
    dim3 thread;
    lane_state state = READY;
    warp_op op = SHUFFLE;
    uint32_t mask = 0;
    bool predicate = false;
    int source = 0;
    uint64_t value = 0, result = 0;
    void *argument = nullptr;
    void (*collective)(void **) = nullptr;
    std::vector<copy> open;
    std::vector<std::vector<copy>> groups;
};

/* Static shared memory of one declaration in one block. */
struct shared_object {
    const void *where;
    std::vector<char> bytes;
};

struct block {
    std::vector<shared_object> objects;
    dim3 index, size, grid;
    std::vector<lane> lanes;
    int n = 0, n_live = 0, n_arrived = 0, current = 0, n_true = 0, last_true = 0;
    uint32_t warp_arrived[32] = {};
    std::vector<char> memory; /* dynamic shared memory */
    void *scheduler = nullptr, *fake_stack = nullptr;
    const void *os_stack = nullptr;
    size_t os_stack_bytes = 0;
    const std::function<void()> *kernel = nullptr;
    ~block();
};

extern thread_local block *current_block;
extern thread_local lane *current_lane;

/* What CU_SHARED declares at `where`: the same for all threads of a block, NaN at first. */
void *shared_of(const void *where, size_t bytes);
[[noreturn]] void die(const char *why);
extern thread_local size_t allowed_shared_bytes; /* of the next launch; static memory has what is left of 48 KB */
void pause(); /* lets others run, within the block and beside it */
int barrier(bool predicate); /* how many arrived with true */
uint64_t warp_operation(warp_op op, uint32_t mask, uint64_t value, int source, bool predicate);
void collective(void *argument, void (*all)(void **lanes));
void launch(dim3 grid, dim3 size, size_t shared_bytes, cudaStream_t stream,
            std::function<void()> kernel);

template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
    std::tuple<Parameters...> bound(static_cast<Parameters>(arguments)...);
    launch(grid, size, shared_bytes, stream, [kernel, bound] { std::apply(kernel, bound); });
}

template <class T> T shuffle(uint32_t mask, T value, int source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = warp_operation(SHUFFLE, mask, bits, source, false);
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline int lane_i() {
    return current_block->current & 31;
}

} // namespace emulation

#define threadIdx (emulation::current_lane->thread)
#define blockIdx (emulation::current_block->index)
#define blockDim (emulation::current_block->size)
#define gridDim (emulation::current_block->grid)

static inline void __syncthreads() {
    emulation::barrier(false);
}
static inline int __syncthreads_count(int predicate) {
    return emulation::barrier(predicate != 0);
}
static inline int __syncthreads_or(int predicate) {
    return emulation::barrier(predicate != 0) != 0;
}
static inline void __syncwarp(uint32_t mask = ~0u) {
    emulation::warp_operation(emulation::SYNC, mask, 0, 0, false);
}
static inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
    return (uint32_t)emulation::warp_operation(emulation::BALLOT, mask, 0, 0, predicate != 0);
}
static inline int __any_sync(uint32_t mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
static inline int __all_sync(uint32_t mask, int predicate) {
    return __ballot_sync(mask, predicate == 0) == 0;
}
template <class T> T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
    return emulation::shuffle(mask, value,
                              (emulation::lane_i() & ~(width - 1)) + (source & (width - 1)));
}
template <class T> T __shfl_xor_sync(uint32_t mask, T value, int with) {
    return emulation::shuffle(mask, value, emulation::lane_i() ^ with);
}
template <class T> T __shfl_down_sync(uint32_t mask, T value, int by, int width = 32) {
    int lane = emulation::lane_i(), source = lane + by;
    bool inside = (source & ~(width - 1)) == (lane & ~(width - 1));
    return emulation::shuffle(mask, value, inside ? source : lane);
}
template <class T> T __shfl_up_sync(uint32_t mask, T value, int by, int width = 32) {
    int lane = emulation::lane_i(), source = lane - by;
    bool inside = source >= (lane & ~(width - 1));
    return emulation::shuffle(mask, value, inside ? source : lane);
}

template <class T> T __ldg(const T *at) {
    return *at;
}
template <class T> T __ldcs(const T *at) {
    return *at;
}
template <class T> T atomicAdd(T *at, T value) {
    T old = *at;
    *at = old + value;
    return old;
}
template <class T> T atomicMax(T *at, T value) {
    T old = *at;
    if (value > old) *at = value;
    return old;
}
template <class T> T atomicMin(T *at, T value) {
    T old = *at;
    if (value < old) *at = value;
    return old;
}
template <class T> T atomicOr(T *at, T value) {
    T old = *at;
    *at = old | value;
    return old;
}
template <class T> T atomicExch(T *at, T value) {
    T old = *at;
    *at = value;
    return old;
}
template <class T> T atomicCAS(T *at, T expected, T value) {
    T old = *at;
    if (old == expected) *at = value;
    return old;
}
static inline unsigned atomicInc(unsigned *at, unsigned limit) {
    unsigned old = *at;
    *at = old >= limit ? 0 : old + 1;
    return old;
}
static inline void __threadfence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
static inline void __threadfence_system() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
static inline void __threadfence_block() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
static inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
static inline int __popcll(unsigned long long x) {
    return __builtin_popcountll(x);
}
static inline int __clz(int x) {
    return x == 0 ? 32 : __builtin_clz((unsigned)x);
}
static inline int __ffs(int x) {
    return __builtin_ffs(x);
}
static inline float __int_as_float(int x) {
    float y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static inline float __uint_as_float(unsigned x) {
    float y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static inline int __float_as_int(float x) {
    int y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static inline unsigned __float_as_uint(float x) {
    unsigned y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static inline int min(int a, int b) {
    return a < b ? a : b;
}
static inline int max(int a, int b) {
    return a > b ? a : b;
}

#define CU_LAUNCH(kernel, grid, size, shared_bytes, stream, ...)                                    \
    emulation::launch_kernel(kernel, (grid), (size), (shared_bytes), (cudaStream_t)(stream),        \
                             __VA_ARGS__)
#define CU_ALLOW_SHARED(kernel, bytes) (emulation::allowed_shared_bytes = (bytes))
#define CU_SHARED(T, name, n)                                                                       \
    static const char name##_where = 0;                                                             \
    T *name = static_cast<T *>(emulation::shared_of(&name##_where, sizeof(T) * (n)))
#define CU_DYN_SMEM(T, name) T *name = reinterpret_cast<T *>(emulation::current_block->memory.data())
