/* RMSNorm, SwiGLU, the sum of the leaf tree, the maximum of a row: see ops.h. Compiled once per instruction set. */
#include "kernels/cpu/ops.h"
#include "kernels/cpu/vector.h"

static void rmsnorm_row(float *out, const float *in, const float *weight, float eps, int width) {
    v16 squares = {0};
    int i = 0;
    for (; i + 16 <= width; i += 16) {
        v16 x = v16_load(in + i);
        squares += x * x;
    }
    if (i < width) {
        v16 x = v16_load_part(in + i, width - i);
        squares += x * x;
    }
    float mean = v16_sum(squares) / (float)width;
    float scale = 1.0f / __builtin_sqrtf(mean + eps);
    for (i = 0; i + 16 <= width; i += 16) {
        v16_store(out + i, v16_load(in + i) * scale * v16_load(weight + i));
    }
    for (; i < width; i++) out[i] = in[i] * scale * weight[i];
}

VINLINE v16 swiglu_lanes(v16 gate, v16 up) {
    /* Below -87 the exponential would overflow; the product is 0 there anyway. */
    v16 clamped = v16_select(gate > v16_set(-87.0f), gate, v16_set(-87.0f));
    return gate / (1.0f + v16_exp(-clamped)) * up;
}

static void swiglu_row(float *out, const float *gate, const float *up, int width) {
    int i = 0;
    for (; i + 16 <= width; i += 16) {
        v16_store(out + i, swiglu_lanes(v16_load(gate + i), v16_load(up + i)));
    }
    if (i < width) {
        int n = width - i;
        v16_store_part(out + i, swiglu_lanes(v16_load_part(gate + i, n), v16_load_part(up + i, n)),
                       n);
    }
}

VINLINE v16 root_lanes(const float *roots, size_t root_stride, int n_roots, int at, int n) {
    v16 sums[BACKEND_MAX_LEAVES];
    for (int r = 0; r < n_roots; r++) {
        const float *root = roots + (size_t)r * root_stride + at;
        sums[r] = n == 16 ? v16_load(root) : v16_load_part(root, n);
    }
    for (int width = 1; width < n_roots; width *= 2) {
        for (int r = 0; r < n_roots; r += 2 * width) sums[r] += sums[r + width];
    }
    return sums[0];
}

static void tree_sum(float *residual, const float *roots, size_t root_stride, int n_roots,
                     const float *bias, int width) {
    for (int i = 0; i < width; i += 16) {
        int n = width - i < 16 ? width - i : 16;
        v16 sum = root_lanes(roots, root_stride, n_roots, i, n);
        if (bias != NULL) sum += n == 16 ? v16_load(bias + i) : v16_load_part(bias + i, n);
        v16 x = n == 16 ? v16_load(residual + i) : v16_load_part(residual + i, n);
        v16_store_part(residual + i, x + sum, n);
    }
}

static float row_max(const float *row, int width) {
    v16 lanes = v16_set(-__builtin_inff());
    int i = 0;
    for (; i + 16 <= width; i += 16) {
        v16 x = v16_load(row + i);
        lanes = v16_select(x > lanes, x, lanes);
    }
    float largest = v16_max(lanes);
    for (; i < width; i++) largest = row[i] > largest ? row[i] : largest;
    return largest;
}
