/* Ops that work row by row: embedding, RMSNorm, the sum of the leaf tree (with the next RMSNorm), SwiGLU.
 *
 * Bytes: each value read once and written once; a few microseconds a launch. Where the next op is a
 * product, the result is written as packed bf16 rows as well (layout.h), which saves it a launch. A
 * block has one row; the order of the sum of squares follows from the width alone. */
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/arithmetic.h"

enum { THREADS = 256 };

static __device__ __forceinline__ void put_packed(uint16_t *packed, int row, int column, int n_units,
                                                  float value) {
    if (packed == NULL) return;
    packed[packed_row_at(row, column / 32, column % 32, n_units)] = (uint16_t)bf16_bits(value);
}

/* Columns past the width in the last unit are zero. */
static __device__ __forceinline__ void put_tail(uint16_t *packed, int row, int width) {
    int n_units = (width + 31) / 32, column = width + (int)threadIdx.x;
    if (packed == NULL || column >= n_units * 32) return;
    packed[packed_row_at(row, column / 32, column % 32, n_units)] = 0;
}

static __device__ __forceinline__ float norm_scale(float squares, float eps, int width, float *sums) {
    return 1.0f / sqrtf(block_sum<THREADS>(squares, sums) / (float)width + eps);
}

static __global__ void __launch_bounds__(THREADS)
    rmsnorm_kernel(float *out, uint16_t *packed, const float *in, const float *weight, float eps,
                   int width) {
    CU_SHARED(float, sums, THREADS / 32);
    grid_wait();
    const int row = blockIdx.x;
    in += (size_t)row * width;
    out += (size_t)row * width;
    float squares = 0;
    for (int i = threadIdx.x; i < width; i += THREADS) squares += in[i] * in[i];
    float scale = norm_scale(squares, eps, width, sums);
    grid_go_on();
    for (int i = threadIdx.x; i < width; i += THREADS) {
        float value = in[i] * scale * weight[i];
        out[i] = value;
        put_packed(packed, row, i, (width + 31) / 32, value);
    }
    put_tail(packed, row, width);
}

extern "C" void launch_rmsnorm(struct cuda_queue queue, float *out, void *packed, const float *in,
                               const float *weight, float eps, int n_rows, int width) {
    CU_LAUNCH_OVERLAPPED(rmsnorm_kernel, dim3(n_rows), dim3(THREADS), 0, queue, out,
                         (uint16_t *)packed, in, weight, eps, width);
}

static __device__ __forceinline__ float root_tree(const float *roots, size_t stride, int n) {
    float sums[MAX_LEAVES];
#pragma unroll
    for (int i = 0; i < MAX_LEAVES; i++) sums[i] = i < n ? roots[i * stride] : 0;
    return binary_tree(sums, n);
}

static __global__ void __launch_bounds__(THREADS)
    tree_sum_kernel(float *residual, float *normed, uint16_t *packed, const float *roots,
                    int n_roots, size_t root_stride, const float *bias, const float *weight,
                    float eps, int width) {
    CU_SHARED(float, sums, THREADS / 32);
    grid_wait();
    const int row = blockIdx.x;
    residual += (size_t)row * width;
    roots += (size_t)row * width;
    float squares = 0;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        float sum = root_tree(roots + i, root_stride, n_roots);
        if (bias != NULL) sum += bias[i];
        float value = residual[i] + sum;
        residual[i] = value;
        squares += value * value;
    }
    if (normed == NULL) return;
    float scale = norm_scale(squares, eps, width, sums);
    grid_go_on();
    normed += (size_t)row * width;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        float value = residual[i] * scale * weight[i];
        normed[i] = value;
        put_packed(packed, row, i, (width + 31) / 32, value);
    }
    put_tail(packed, row, width);
}

extern "C" void launch_tree_sum(struct cuda_queue queue, float *residual, float *normed,
                                void *packed, const float *roots, int n_roots, size_t root_stride,
                                const float *bias, const float *weight, float eps, int n_rows,
                                int width) {
    CU_LAUNCH_OVERLAPPED(tree_sum_kernel, dim3(n_rows), dim3(THREADS), 0, queue, residual, normed,
                         (uint16_t *)packed, roots, n_roots, root_stride, bias, weight, eps, width);
}

static __global__ void __launch_bounds__(THREADS)
    swiglu_kernel(float *out, uint16_t *packed, const float *gate_up, int width, int n_units) {
    grid_wait();
    int i = blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y;
    if (i >= n_units * 32) return;
    float value = 0;
    if (i < width) {
        float gate = gate_up[(size_t)row * 2 * width + i];
        float up = gate_up[(size_t)row * 2 * width + width + i];
        /* Below -87 the exponential would overflow; the product is 0 there anyway. */
        float clamped = gate > -87.0f ? gate : -87.0f;
        value = gate / (1.0f + exp_f32(-clamped)) * up;
        out[(size_t)row * width + i] = value;
    }
    put_packed(packed, row, i, n_units, value);
}

extern "C" void launch_swiglu(struct cuda_queue queue, float *out, void *packed,
                              const float *gate_up, int n_rows, int width) {
    int n_units = (width + 31) / 32;
    CU_LAUNCH_OVERLAPPED(swiglu_kernel, dim3((n_units * 32 + THREADS - 1) / THREADS, n_rows),
                         dim3(THREADS), 0, queue, out, (uint16_t *)packed, gate_up, width, n_units);
}

/* --- embedding and rows -------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(THREADS)
    embed_kernel(float *out, const void *table, enum source_type type, const int32_t *tokens,
                 const int32_t *fed, int width) {
    grid_wait();
    const int row = blockIdx.x;
    int32_t token = tokens[row];
    if (token < 0) token = fed[-1 - token];
    const size_t first = (size_t)token * width;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        out[(size_t)row * width + i] = load_source(table, type, first + i);
    }
}

extern "C" void launch_embed(struct cuda_queue queue, float *out, const void *table,
                             enum source_type type, const int32_t *tokens, const int32_t *fed,
                             int n_rows, int width) {
    CU_LAUNCH_OVERLAPPED(embed_kernel, dim3(n_rows), dim3(THREADS), 0, queue, out, table, type,
                         tokens, fed, width);
}

static __global__ void __launch_bounds__(THREADS)
    take_rows_kernel(float *out, const float *in, const int32_t *rows, int width) {
    grid_wait();
    const float *from = in + (size_t)rows[blockIdx.x] * width;
    for (int i = threadIdx.x; i < width; i += THREADS) out[(size_t)blockIdx.x * width + i] = from[i];
}

extern "C" void launch_take_rows(struct cuda_queue queue, float *out, const float *in,
                                 const int32_t *rows, int n_rows, int width) {
    CU_LAUNCH_OVERLAPPED(take_rows_kernel, dim3(n_rows), dim3(THREADS), 0, queue, out, in, rows,
                         width);
}
