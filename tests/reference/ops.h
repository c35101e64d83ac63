/* The row-wise ops as plain loops in double. */
#pragma once
#include <math.h>

static inline void reference_rmsnorm(double *out, const float *in, const float *weight, float eps,
                                     int width) {
    double sum = 0;
    for (int i = 0; i < width; i++) sum += (double)in[i] * in[i];
    double scale = 1 / sqrt(sum / width + (double)eps);
    for (int i = 0; i < width; i++) out[i] = in[i] * scale * weight[i];
}

static inline double reference_swiglu(float gate, float up) {
    return gate / (1 + exp(-(double)gate)) * up;
}

/* The tree over n subtree roots `stride` apart, in f32: its order is the contract. */
static inline float reference_tree(const float *roots, int n, int stride) {
    if (n == 1) return roots[0];
    const float *right = roots + n / 2 * stride;
    return reference_tree(roots, n / 2, stride) + reference_tree(right, n / 2, stride);
}

/* One head at `position`: RMSNorm where norm is not NULL, then the half-split rotation. */
static inline void reference_rope(double *out, const float *head, const float *norm, float eps,
                                  const float *inv_freq, int head_dim, int position) {
    double in[256];
    int half = head_dim / 2;
    if (norm) reference_rmsnorm(in, head, norm, eps, head_dim);
    for (int i = 0; i < head_dim && !norm; i++) in[i] = head[i];
    for (int i = 0; i < half; i++) {
        double c = cos((double)position * inv_freq[i]), s = sin((double)position * inv_freq[i]);
        out[i] = in[i] * c - in[i + half] * s;
        out[i + half] = in[i + half] * c + in[i] * s;
    }
}
