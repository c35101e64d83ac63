/* Products with AVX2: the lanes layout of cpu.h, eight output rows at a time.
 *
 * bf16: a pair of weights fills a 32-bit lane; its halves become floats by a shift and a mask, and are
 * multiplied with fused multiply-adds. int8: bytes are widened to 16 bits by shifts and multiplied in
 * pairs (vpmaddwd), which is exact. One output is one lane: its terms are added in the order of k. */
#include <immintrin.h>
#include <string.h>

#include "kernels/cpu/cpu.h"

enum { HALF = 8, PREFETCH_BYTES = 1024, MAX_SUMS = 8 };

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

/* Both halves of P panels x M rows: 2 P M sums that do not wait for one another. At one row the
 * latency of a single chain, not memory, would set the pace. acc: [2 P halves][M]. */
INLINE void leaf_bf16(__m256 *acc, const char *w, size_t panel_bytes, const char *x,
                      size_t row_bytes, int n_steps, const int P, const int M) {
    const __m256i high = _mm256_set1_epi32((int)0xffff0000u);
    __m256 sums[MAX_SUMS];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * P * M; i++) sums[i] = _mm256_setzero_ps();
    for (int step = 0; step < n_steps; step++) {
        __m256 x0[4], x1[4];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            int32_t bits;
            memcpy(&bits, x + (size_t)m * row_bytes + (size_t)step * 4, sizeof bits);
            __m256i pair = _mm256_set1_epi32(bits);
            x0[m] = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
            x1[m] = _mm256_castsi256_ps(_mm256_and_si256(pair, high));
        }
#pragma GCC unroll 4
        for (int h = 0; h < 2 * P; h++) {
            const char *at = w + (size_t)(h / 2) * panel_bytes + (size_t)step * 64 + h % 2 * 32;
            if (h % 2 == 0) _mm_prefetch(at + PREFETCH_BYTES, _MM_HINT_T0);
            __m256i pairs = _mm256_load_si256((const __m256i *)at);
            __m256 w0 = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
            __m256 w1 = _mm256_castsi256_ps(_mm256_and_si256(pairs, high));
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                sums[h * M + m] = _mm256_fmadd_ps(w0, x0[m], sums[h * M + m]);
                sums[h * M + m] = _mm256_fmadd_ps(w1, x1[m], sums[h * M + m]);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 2 * P * M; i++) acc[i] = sums[i];
}

INLINE void leaf_i8(__m256i *acc, const char *w, size_t panel_bytes, const char *x,
                    size_t row_bytes, int n_steps, const int P, const int M) {
    const __m256i offset = _mm256_set1_epi8((char)0x80);
    __m256i sums[MAX_SUMS];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * P * M; i++) sums[i] = _mm256_setzero_si256();
    for (int step = 0; step < n_steps; step++) {
        __m256i x_even[4], x_odd[4];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            int32_t bits;
            memcpy(&bits, x + (size_t)m * row_bytes + (size_t)step * 4, sizeof bits);
            __m256i quad = _mm256_xor_si256(_mm256_set1_epi32(bits), offset); /* signed again */
            x_even[m] = _mm256_srai_epi16(_mm256_slli_epi16(quad, 8), 8);
            x_odd[m] = _mm256_srai_epi16(quad, 8);
        }
#pragma GCC unroll 4
        for (int h = 0; h < 2 * P; h++) {
            const char *at = w + (size_t)(h / 2) * panel_bytes + (size_t)step * 64 + h % 2 * 32;
            if (h % 2 == 0) _mm_prefetch(at + PREFETCH_BYTES, _MM_HINT_T0);
            __m256i quads = _mm256_load_si256((const __m256i *)at);
            __m256i w_even = _mm256_srai_epi16(_mm256_slli_epi16(quads, 8), 8);
            __m256i w_odd = _mm256_srai_epi16(quads, 8);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) {
                __m256i *sum = &sums[h * M + m];
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(w_even, x_even[m]));
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(w_odd, x_odd[m]));
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 2 * P * M; i++) acc[i] = sums[i];
}

INLINE void store_block(float *out, size_t out_stride, const struct weight *w, const float *bias,
                        int panel_i, int row, __m256 (*leaves)[BACKEND_MAX_LEAVES], const int P,
                        const int M) {
    for (int h = 0; h < 2 * P; h++) {
        for (int m = 0; m < M; m++) {
            store(out, out_stride, w, bias, (2 * panel_i + h) * HALF, row + m,
                  tree(leaves[h * M + m], w->n_leaves));
        }
    }
}

INLINE void block_bf16(float *out, size_t out_stride, const struct weight *w,
                       const struct packed_rows *rows, const float *bias, int panel_i, int row,
                       const int P, const int M) {
    __m256 leaves[MAX_SUMS][BACKEND_MAX_LEAVES];
    const char *panel = w->data + (size_t)panel_i * w->panel_bytes;
    const char *x = (const char *)rows->data + (size_t)row * rows->row_bytes;
    for (int leaf = 0; leaf < w->n_leaves; leaf++) {
        __m256 acc[MAX_SUMS];
        size_t at = (size_t)w->leaf_steps[leaf];
        leaf_bf16(acc, panel + at * 64, w->panel_bytes, x + at * 4, rows->row_bytes,
                  w->leaf_steps[leaf + 1] - w->leaf_steps[leaf], P, M);
        for (int i = 0; i < 2 * P * M; i++) leaves[i][leaf] = acc[i];
    }
    store_block(out, out_stride, w, bias, panel_i, row, leaves, P, M);
}

INLINE void block_i8(float *out, size_t out_stride, const struct weight *w,
                     const struct packed_rows *rows, const float *bias, int panel_i, int row,
                     const int P, const int M) {
    __m256 leaves[MAX_SUMS][BACKEND_MAX_LEAVES];
    const char *panel = w->data + (size_t)panel_i * w->panel_bytes;
    const char *x = (const char *)rows->data + (size_t)row * rows->row_bytes;
    for (int leaf = 0; leaf < w->n_leaves; leaf++) {
        __m256i acc[MAX_SUMS];
        size_t at = (size_t)w->leaf_steps[leaf];
        leaf_i8(acc, panel + at * 64, w->panel_bytes, x + at * 4, rows->row_bytes,
                w->leaf_steps[leaf + 1] - w->leaf_steps[leaf], P, M);
        for (int h = 0; h < 2 * P; h++) {
            size_t side = ((size_t)(panel_i + h / 2) * (size_t)w->n_leaves + (size_t)leaf) *
                              PANEL_ROWS + (size_t)(h % 2) * HALF;
            __m256 weight_scale = _mm256_loadu_ps(w->scales + side);
            for (int m = 0; m < M; m++) {
                __m256 scale = _mm256_mul_ps(
                    weight_scale, _mm256_set1_ps(rows->scales[(row + m) * w->n_leaves + leaf]));
                leaves[h * M + m][leaf] =
                    _mm256_mul_ps(_mm256_cvtepi32_ps(acc[h * M + m]), scale);
            }
        }
    }
    store_block(out, out_stride, w, bias, panel_i, row, leaves, P, M);
}

/* All rows past P panels. */
#define ROWS(kind, P)                                                                              \
    static void rows_##kind##_##P(float *out, size_t out_stride, const struct weight *w,           \
                                  const struct packed_rows *rows, const float *bias,               \
                                  int panel) {                                                     \
        int row = 0;                                                                               \
        for (; rows->n_rows - row >= 4 / P; row += 4 / P) {                                        \
            block_##kind(out, out_stride, w, rows, bias, panel, row, P, 4 / P);                    \
        }                                                                                          \
        if (P == 1 && rows->n_rows - row >= 2) {                                                   \
            block_##kind(out, out_stride, w, rows, bias, panel, row, P, 2);                        \
            row += 2;                                                                              \
        }                                                                                          \
        if (row < rows->n_rows) {                                                                  \
            block_##kind(out, out_stride, w, rows, bias, panel, row, P, 1);                        \
        }                                                                                          \
    }
ROWS(bf16, 1)
ROWS(bf16, 2)
ROWS(i8, 1)
ROWS(i8, 2)

/* One or two rows wait for memory or latency: two panels at once. More wait for the arithmetic:
 * four rows share each conversion of a panel's weights. */
#define RUN(kind)                                                                                  \
    void linear_##kind##_avx2(float *out, size_t out_stride, const struct weight *w,               \
                              const struct packed_rows *rows, const float *bias,                   \
                              int panel_begin, int panel_end) {                                    \
        int panel = panel_begin;                                                                   \
        for (; rows->n_rows <= 2 && panel + 2 <= panel_end; panel += 2) {                          \
            rows_##kind##_2(out, out_stride, w, rows, bias, panel);                                \
        }                                                                                          \
        for (; panel < panel_end; panel++) {                                                       \
            rows_##kind##_1(out, out_stride, w, rows, bias, panel);                                \
        }                                                                                          \
    }
RUN(bf16)
RUN(i8)
