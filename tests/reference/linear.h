/* Products as plain loops in double, with the bounds within which a kernel must agree. */
#pragma once
#include <math.h>

#include "common/dtype.h"

/* One output: sum of x[c] w[c] and of its magnitudes, inputs rounded to bf16 where `rounded`. */
struct reference_product {
    double sum, magnitude;
};

static inline struct reference_product reference_dot(const float *x, const float *w, int k,
                                                     int rounded) {
    struct reference_product product = {0, 0};
    for (int c = 0; c < k; c++) {
        double a = rounded ? bf16_to_f32(bf16_from_f32(x[c])) : x[c];
        double b = rounded ? bf16_to_f32(bf16_from_f32(w[c])) : w[c];
        product.sum += a * b;
        product.magnitude += fabs(a * b);
    }
    return product;
}

/* k terms and the tree added in f32: each addition errs by at most 2^-24 of a partial sum, which
 * the sum of magnitudes bounds. Twice that, for products that are rounded before they are added. */
static inline double reference_f32_bound(int k, double magnitude) {
    return (k + 8) * 0x1p-23 * magnitude + 1e-30;
}

/* bf16 has 8 bits: each input is off by at most 2^-8 of itself, two inputs by 2^-7 and a little. */
static inline double reference_bf16_drift(double magnitude) {
    return 1.01 * 0x1p-7 * magnitude;
}

static inline float reference_largest(const float *values, int n) {
    float largest = 0;
    for (int c = 0; c < n; c++) largest = fmaxf(largest, fabsf(values[c]));
    return largest;
}

/* One leaf in int8: an input is off by half a step of its scale, largest / 127. */
static inline double reference_i8_drift(const float *x, const float *w, int k) {
    double x_half = reference_largest(x, k) / 254.0, w_half = reference_largest(w, k) / 254.0;
    double bound = 0;
    for (int c = 0; c < k; c++) {
        bound += x_half * fabsf(w[c]) + w_half * fabsf(x[c]) + x_half * w_half;
    }
    return 1.0001 * bound + 1e-30;
}
