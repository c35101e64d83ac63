/* The bodies of kernels/cuda/device.h on the emulator. */
#pragma once
#include <chrono>

#include "kernels/emulation/emulation.h"

namespace emulation {
int order();

static inline float bf16_half(uint32_t pair, int high) {
    uint32_t bits = high ? pair & 0xffff0000u : pair << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

struct mma_arguments {
    void *c;
    uint32_t a[4], b[2];
};

/* Element (row, k) of A and (k, column) of B out of 32 lanes' registers; a register holds `per`
 * elements, k advances by 4 * per from one half of the registers to the other. */
static inline int lane_of(int k, int row_or_column, int per) {
    return (row_or_column % 8) * 4 + k % (4 * per) / per;
}

static inline void mma_bf16_all(void **lanes) {
    float a[16][16], b[16][8];
    for (int k = 0; k < 16; k++) {
        for (int row = 0; row < 16; row++) {
            const mma_arguments *from = (const mma_arguments *)lanes[lane_of(k, row, 2)];
            a[row][k] = bf16_half(from->a[k / 8 * 2 + row / 8], k % 2);
        }
        for (int column = 0; column < 8; column++) {
            const mma_arguments *from = (const mma_arguments *)lanes[lane_of(k, column, 2)];
            b[k][column] = bf16_half(from->b[k / 8], k % 2);
        }
    }
    for (int row = 0; row < 16; row++) {
        float sums[8] = {0};
        for (int k = 0; k < 16; k++) {
            for (int column = 0; column < 8; column++) sums[column] += a[row][k] * b[k][column];
        }
        for (int column = 0; column < 8; column++) {
            const mma_arguments *to = (const mma_arguments *)lanes[row % 8 * 4 + column / 2];
            ((float *)to->c)[row / 8 * 2 + column % 2] += sums[column];
        }
    }
}

static inline void mma_s8_all(void **lanes) {
    int a[16][32], b[32][8];
    for (int k = 0; k < 32; k++) {
        for (int row = 0; row < 16; row++) {
            const mma_arguments *from = (const mma_arguments *)lanes[lane_of(k, row, 4)];
            a[row][k] = (int8_t)(from->a[k / 16 * 2 + row / 8] >> k % 4 * 8);
        }
        for (int column = 0; column < 8; column++) {
            const mma_arguments *from = (const mma_arguments *)lanes[lane_of(k, column, 4)];
            b[k][column] = (int8_t)(from->b[k / 16] >> k % 4 * 8);
        }
    }
    for (int row = 0; row < 16; row++) {
        for (int column = 0; column < 8; column++) {
            const mma_arguments *to = (const mma_arguments *)lanes[row % 8 * 4 + column / 2];
            int sum = 0;
            for (int k = 0; k < 32; k++) sum += a[row][k] * b[k][column];
            ((int *)to->c)[row / 8 * 2 + column % 2] += sum;
        }
    }
}

struct ldmatrix_arguments {
    uint32_t *registers;
    const void *row;
};

static inline void ldmatrix_all(void **lanes) {
    for (int matrix = 0; matrix < 4; matrix++) {
        for (int l = 0; l < 32; l++) {
            const ldmatrix_arguments *row = (const ldmatrix_arguments *)lanes[matrix * 8 + l / 4];
            ldmatrix_arguments *to = (ldmatrix_arguments *)lanes[l];
            memcpy(&to->registers[matrix], (const char *)row->row + l % 4 * 4, 4);
        }
    }
}

} // namespace emulation

#define CU_LAUNCH_OVERLAPPED(kernel, grid, size, shared_bytes, queue, ...)                          \
    CU_LAUNCH(kernel, grid, size, shared_bytes, (queue).stream, __VA_ARGS__)

static inline void grid_wait() {
}
static inline void grid_go_on() {
}

static inline void mma_bf16(float (&c)[4], uint4 a, uint32_t b0, uint32_t b1) {
    emulation::mma_arguments arguments = {c, {a.x, a.y, a.z, a.w}, {b0, b1}};
    emulation::collective(&arguments, emulation::mma_bf16_all);
}
static inline void mma_s8(int (&c)[4], uint4 a, uint32_t b0, uint32_t b1) {
    emulation::mma_arguments arguments = {c, {a.x, a.y, a.z, a.w}, {b0, b1}};
    emulation::collective(&arguments, emulation::mma_s8_all);
}
static inline void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    if ((uintptr_t)row % 16 != 0) emulation::die("ldmatrix row not aligned to 16 bytes");
    emulation::ldmatrix_arguments arguments = {r, row};
    emulation::collective(&arguments, emulation::ldmatrix_all);
}
/* Early or late, both are legal; a copy that nobody waits for never lands in orders 0 to 2. */
static inline void cp_async16(void *to, const void *from) {
    if (((uintptr_t)to | (uintptr_t)from) % 16 != 0) {
        emulation::die("cp.async address not aligned to 16 bytes");
    }
    if (emulation::order() >= 3) memcpy(to, from, 16);
    else emulation::current_lane->open.push_back({to, from, 16});
}
static inline void cp_async_commit() {
    emulation::lane *l = emulation::current_lane;
    l->groups.push_back(std::move(l->open));
    l->open.clear();
}
template <int N> static inline void cp_async_wait() {
    std::vector<std::vector<emulation::copy>> &groups = emulation::current_lane->groups;
    while ((int)groups.size() > N) {
        for (const emulation::copy &c : groups.front()) memcpy(c.to, c.from, c.bytes);
        groups.erase(groups.begin());
    }
}
static inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (int half = 0; half < 2; half++) {
        float value = emulation::bf16_half(a, half) * emulation::bf16_half(b, half);
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        bits = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        product |= bits << (16 * half);
    }
    return product;
}
static inline uint4 load_streamed(const uint4 *at) {
    if ((uintptr_t)at % 16 != 0) emulation::die("a 16-byte load is not aligned");
    return *at;
}
static inline float load_fresh(const float *at) {
    return *at;
}
static inline uint32_t spread_bytes(uint32_t word, bool high) {
    uint32_t half = high ? word >> 16 : word & 0xffffu;
    return (half & 0xffu) | (half & 0xff00u) << 8;
}
static inline uint2 load_line(const uint2 *at) {
    uint64_t bits = __atomic_load_n((const uint64_t *)at, __ATOMIC_RELAXED);
    return uint2{(unsigned)bits, (unsigned)(bits >> 32)};
}
static inline void store_line(uint2 *at, uint2 v) {
    __atomic_store_n((uint64_t *)at, (uint64_t)v.y << 32 | v.x, __ATOMIC_RELAXED);
}
static inline uint32_t load_flag(const uint32_t *at) {
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}
static inline void store_flag(uint32_t *at, uint32_t v) {
    __atomic_store_n(at, v, __ATOMIC_RELAXED);
}
static inline unsigned long long device_ns() {
    return (unsigned long long)std::chrono::steady_clock::now().time_since_epoch().count();
}
/* Other threads of the block go on, and other ranks, which are other threads of the host. */
static inline void spin_pause() {
    emulation::pause();
}
static inline float add_f32(float a, float b) {
    return a + b;
}
static inline float mul_f32(float a, float b) {
    return a * b;
}
