/* Products with AVX2: the lanes layout of cpu.h, eight output rows at a time.
 *
 * bf16: a pair of weights fills a 32-bit lane; its halves become floats by a shift and a mask, and are
 * multiplied with fused multiply-adds. int8: bytes are widened to 16 bits by shifts and multiplied in
 * pairs (vpmaddwd), which is exact. One output is one lane: its terms are added in the order of k. */
#include <immintrin.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

enum { HALF = 8, PREFETCH_BYTES = 1024 };

#define INLINE static inline __attribute__((always_inline))

INLINE __m256 tree(__m256 *leaves, int n) {
    for (int width = 1; width < n; width *= 2) {
        for (int i = 0; i < n; i += 2 * width) {
            leaves[i] = _mm256_add_ps(leaves[i], leaves[i + width]);
        }
    }
    return leaves[0];
}

/* first: output of lane 0. */
static void store(float *out, size_t out_stride, const struct weight *w, const float *bias,
                  int first, int row, __m256 sum) {
    float lanes[HALF];
    _mm256_storeu_ps(lanes, sum);
    int left = w->n - first;
    int n = left < HALF ? left : HALF;
    for (int i = 0; i < n; i++) {
        float value = bias ? lanes[i] + bias[first + i] : lanes[i];
        out[(size_t)row * out_stride + (size_t)(first + i)] = value;
    }
}

/* Half a panel (32 of the 64 bytes of each step) x M rows. */
INLINE void leaf_bf16(__m256 *acc, const char *w, const char *x, size_t row_bytes, int n_steps,
                      const int M) {
    const __m256i high = _mm256_set1_epi32((int)0xffff0000u);
    for (int m = 0; m < M; m++) acc[m] = _mm256_setzero_ps();
    for (int step = 0; step < n_steps; step++) {
        const char *at = w + (size_t)step * 64;
        _mm_prefetch(at + PREFETCH_BYTES, _MM_HINT_T0);
        __m256i pairs = _mm256_load_si256((const __m256i *)at);
        __m256 w0 = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        __m256 w1 = _mm256_castsi256_ps(_mm256_and_si256(pairs, high));
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            int32_t bits;
            memcpy(&bits, x + (size_t)m * row_bytes + (size_t)step * 4, sizeof bits);
            __m256i pair = _mm256_set1_epi32(bits);
            __m256 x0 = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
            __m256 x1 = _mm256_castsi256_ps(_mm256_and_si256(pair, high));
            acc[m] = _mm256_fmadd_ps(w0, x0, acc[m]);
            acc[m] = _mm256_fmadd_ps(w1, x1, acc[m]);
        }
    }
}

INLINE void leaf_i8(__m256i *acc, const char *w, const char *x, size_t row_bytes, int n_steps,
                    const int M) {
    const __m256i offset = _mm256_set1_epi8((char)0x80);
    for (int m = 0; m < M; m++) acc[m] = _mm256_setzero_si256();
    for (int step = 0; step < n_steps; step++) {
        const char *at = w + (size_t)step * 64;
        _mm_prefetch(at + PREFETCH_BYTES, _MM_HINT_T0);
        __m256i quads = _mm256_load_si256((const __m256i *)at);
        __m256i w_even = _mm256_srai_epi16(_mm256_slli_epi16(quads, 8), 8);
        __m256i w_odd = _mm256_srai_epi16(quads, 8);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            int32_t bits;
            memcpy(&bits, x + (size_t)m * row_bytes + (size_t)step * 4, sizeof bits);
            __m256i quad = _mm256_xor_si256(_mm256_set1_epi32(bits), offset); /* signed again */
            __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(quad, 8), 8);
            __m256i x_odd = _mm256_srai_epi16(quad, 8);
            acc[m] = _mm256_add_epi32(acc[m], _mm256_madd_epi16(w_even, x_even));
            acc[m] = _mm256_add_epi32(acc[m], _mm256_madd_epi16(w_odd, x_odd));
        }
    }
}

INLINE void block_bf16(float *out, size_t out_stride, const struct weight *w,
                       const struct packed_rows *rows, const float *bias, int half_i, int row,
                       const int M) {
    __m256 leaves[4][BACKEND_MAX_LEAVES];
    const char *panel = w->data + (size_t)(half_i / 2) * w->panel_bytes + (half_i % 2) * 32;
    const char *x = (const char *)rows->data + (size_t)row * rows->row_bytes;
    for (int leaf = 0; leaf < w->n_leaves; leaf++) {
        __m256 acc[4];
        size_t at = (size_t)w->leaf_steps[leaf];
        leaf_bf16(acc, panel + at * 64, x + at * 4, rows->row_bytes,
                  w->leaf_steps[leaf + 1] - w->leaf_steps[leaf], M);
        for (int m = 0; m < M; m++) leaves[m][leaf] = acc[m];
    }
    for (int m = 0; m < M; m++) {
        store(out, out_stride, w, bias, half_i * HALF, row + m, tree(leaves[m], w->n_leaves));
    }
}

INLINE void block_i8(float *out, size_t out_stride, const struct weight *w,
                     const struct packed_rows *rows, const float *bias, int half_i, int row,
                     const int M) {
    __m256 leaves[4][BACKEND_MAX_LEAVES];
    const char *panel = w->data + (size_t)(half_i / 2) * w->panel_bytes + (half_i % 2) * 32;
    const char *x = (const char *)rows->data + (size_t)row * rows->row_bytes;
    for (int leaf = 0; leaf < w->n_leaves; leaf++) {
        __m256i acc[4];
        size_t at = (size_t)w->leaf_steps[leaf];
        leaf_i8(acc, panel + at * 64, x + at * 4, rows->row_bytes,
                w->leaf_steps[leaf + 1] - w->leaf_steps[leaf], M);
        size_t side = ((size_t)(half_i / 2) * (size_t)w->n_leaves + (size_t)leaf) * PANEL_ROWS +
                      (size_t)(half_i % 2) * HALF;
        __m256 weight_scale = _mm256_loadu_ps(w->scales + side);
        for (int m = 0; m < M; m++) {
            __m256 scale = _mm256_mul_ps(
                weight_scale, _mm256_set1_ps(rows->scales[(row + m) * w->n_leaves + leaf]));
            leaves[m][leaf] = _mm256_mul_ps(_mm256_cvtepi32_ps(acc[m]), scale);
        }
    }
    for (int m = 0; m < M; m++) {
        store(out, out_stride, w, bias, half_i * HALF, row + m, tree(leaves[m], w->n_leaves));
    }
}

#define RUN(kind)                                                                                  \
    void linear_##kind##_avx2(float *out, size_t out_stride, const struct weight *w,               \
                              const struct packed_rows *rows, const float *bias,                   \
                              int panel_begin, int panel_end) {                                    \
        for (int half = 2 * panel_begin; half < 2 * panel_end; half++) {                           \
            if (half * HALF >= w->n) return;                                                       \
            int row = 0;                                                                           \
            for (; row + 4 <= rows->n_rows; row += 4) {                                            \
                block_##kind(out, out_stride, w, rows, bias, half, row, 4);                        \
            }                                                                                      \
            for (; row < rows->n_rows; row++) {                                                    \
                block_##kind(out, out_stride, w, rows, bias, half, row, 1);                        \
            }                                                                                      \
        }                                                                                          \
    }
RUN(bf16)
RUN(i8)
