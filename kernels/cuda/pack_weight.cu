/* Weights from rows of a checkpoint, as they came over, to the order of layout.h. Runs once at loading;
 * reads and writes each weight once. Formats follow kernels/cpu/weight.c: int8 and fp8 are symmetric
 * with one scale per output and leaf. */
#include "kernels/cuda/device.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/arithmetic.h"

enum { THREADS = 128 };

/* e4m3 nearest to a value of at most 448, ties to even: subnormals are multiples of 2^-9. */
static __device__ __forceinline__ uint32_t f8_bits(float value) {
    uint32_t bits = __float_as_uint(value), sign = bits >> 24 & 0x80u;
    float magnitude = fabsf(value);
    if (magnitude >= 448.0f) return sign | 0x7eu;
    int exponent = (int)(__float_as_uint(magnitude) >> 23) - 127;
    if (exponent < -6) exponent = -6;
    /* magnitude / 2^(exponent - 3), rounded to an integer 0..16 by adding 1.5 * 2^23. */
    float steps = mul_f32(magnitude, __uint_as_float((uint32_t)(127 + 3 - exponent) << 23));
    uint32_t rounded = __float_as_uint(add_f32(steps, 12582912.0f)) & 0x1fu;
    /* 8 more steps are one more exponent, by carry. */
    return sign | ((uint32_t)(exponent + 6) * 8u + rounded);
}

/* A block has one output and one leaf. */
template <enum product_format F>
static __global__ void __launch_bounds__(THREADS)
    pack_weight_kernel(void *weights, float *scales, int n_padded, const void *raw,
                       enum source_type type, int first, int k, struct leaf_units leaves) {
    const int output = first + (int)blockIdx.x, leaf = blockIdx.y, UNIT = F == PRODUCT_I8 ? 64 : 32;
    const int begin = leaves.column[leaf], n = leaves.column[leaf + 1] - begin;
    const int padded = (leaves.unit[leaf + 1] - leaves.unit[leaf]) * UNIT;
    const size_t from = (size_t)blockIdx.x * k + begin;
    const size_t quads = (size_t)leaves.unit[leaves.n_leaves] * (F == PRODUCT_F8 ? LANES : 2 * LANES);
    char *panel = (char *)weights + (size_t)(output / PANEL) * quads * 16;
    float inverse = 0, scale = 0;
    if (F != PRODUCT_BF16) {
        CU_SHARED(float, largest, THREADS / 32);
        float most = 0;
        for (int i = threadIdx.x; i < n; i += THREADS) {
            float magnitude = fabsf(load_source(raw, type, from + i));
            most = magnitude > most ? magnitude : most;
        }
        most = warp_max(most);
        if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
        __syncthreads();
        for (int w = 0; w < THREADS / 32; w++) most = largest[w] > most ? largest[w] : most;
        scale = most / (F == PRODUCT_I8 ? 127.0f : 448.0f);
        inverse = scale > 0 ? 1.0f / scale : 0;
        if (threadIdx.x == 0) scales[(size_t)leaf * n_padded + output] = scale;
    }
    for (int i = threadIdx.x; i < padded; i += THREADS) {
        float value = i < n ? load_source(raw, type, from + i) : 0;
        int unit = leaves.unit[leaf] + i / UNIT, column = i % UNIT;
        if (F == PRODUCT_BF16) {
            ((uint16_t *)panel)[weight_bf16_at(output, unit, column)] = (uint16_t)bf16_bits(value);
        } else if (F == PRODUCT_I8) {
            int q = (int)rintf(value * inverse);
            q = q > 127 ? 127 : q < -127 ? -127 : q;
            ((int8_t *)panel)[weight_i8_at(output, unit, column)] = (int8_t)q;
        } else {
            ((uint8_t *)panel)[weight_f8_at(output, unit, column)] =
                (uint8_t)f8_bits(value * inverse);
        }
    }
}

extern "C" void launch_pack_weight(struct cuda_queue queue, enum product_format format, void *weights,
                                   float *scales, int n_padded, const void *raw,
                                   enum source_type type, int first, int n_rows, int k,
                                   struct leaf_units leaves) {
    dim3 grid(n_rows, leaves.n_leaves), size(THREADS);
    switch (format) {
    case PRODUCT_BF16:
        CU_LAUNCH(pack_weight_kernel<PRODUCT_BF16>, grid, size, 0, queue.stream, weights, scales,
                  n_padded, raw, type, first, k, leaves);
        break;
    case PRODUCT_I8:
        CU_LAUNCH(pack_weight_kernel<PRODUCT_I8>, grid, size, 0, queue.stream, weights, scales,
                  n_padded, raw, type, first, k, leaves);
        break;
    case PRODUCT_F8:
        CU_LAUNCH(pack_weight_kernel<PRODUCT_F8>, grid, size, 0, queue.stream, weights, scales,
                  n_padded, raw, type, first, k, leaves);
        break;
    }
}
