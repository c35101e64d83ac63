/* Products with AVX-512: BF16 dot products (vdpbf16ps) and VNNI bytes (vpdpbusd).
 *
 * Sixteen output rows stand in the lanes; a group of activations (2 bf16 or 4 bytes) is broadcast
 * and multiplies 64 bytes of weights at once. A block of P panels x M rows keeps P * M
 * accumulators in registers and reads every weight once. One output is one lane of one accumulator
 * per leaf: its terms are added in the order of k whatever P and M are. */
#include <immintrin.h>

#include "kernels/cpu/cpu.h"

/* How far ahead weights are fetched: one or two rows wait for memory and the processor's own
 * prefetcher helps; with more rows a step takes longer than the distance it looks ahead (measured
 * on Zen 4). */
enum { FETCH_FEW = 1024, FETCH_MANY = 4096, MAX_SUMS = 26, PAIR_STEP = 2 * PANEL_STEP };

#define INLINE static inline __attribute__((always_inline))

/* ((l0+l1)+(l2+l3))+((l4+l5)+(l6+l7)), in place. */
INLINE __m512 tree(__m512 *leaves, int n) {
    for (int width = 1; width < n; width *= 2) {
        for (int i = 0; i < n; i += 2 * width) {
            leaves[i] = _mm512_add_ps(leaves[i], leaves[i + width]);
        }
    }
    return leaves[0];
}

INLINE void store(float *out, size_t out_stride, const struct weight *w, const float *bias,
                  int panel_i, int row, __m512 sum) {
    int output = panel_i * PANEL_ROWS;
    int left = w->n - output;
    __mmask16 mask = left >= PANEL_ROWS ? 0xffff : (__mmask16)((1u << left) - 1);
    if (bias != NULL) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, bias + output));
    _mm512_mask_storeu_ps(out + (size_t)row * out_stride + output, mask, sum);
}

/* One leaf of P panels x M rows. w: the leaf's first step in panel 0 (an even one where P > 1); x:
 * in row 0. */
INLINE void leaf_bf16(__m512 *acc, const char *w, size_t pair_bytes, const char *x,
                      size_t row_bytes, int n_steps, const int P, const int M) {
    __m512 sums[MAX_SUMS]; /* their own array, every loop over it unrolled: they stay in registers */
#pragma GCC unroll 32
    for (int i = 0; i < P * M; i++) sums[i] = _mm512_setzero_ps();
    for (int step = 0; step < n_steps; step++) {
        __m512bh weights[4];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            const char *at = w + (size_t)(p / 2) * pair_bytes + (size_t)step * PAIR_STEP +
                             p % 2 * PANEL_STEP;
            _mm_prefetch(at + (M <= 2 ? FETCH_FEW : FETCH_MANY), _MM_HINT_T0);
            weights[p] = (__m512bh)_mm512_load_si512(at);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            int32_t pair = *(const int32_t *)(x + (size_t)m * row_bytes + (size_t)step * 4);
            __m512bh xs = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                sums[p * M + m] = _mm512_dpbf16_ps(sums[p * M + m], weights[p], xs);
            }
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < P * M; i++) acc[i] = sums[i];
}

INLINE void leaf_i8(__m512i *acc, const char *w, size_t pair_bytes, const char *x,
                    size_t row_bytes, int n_steps, const int P, const int M) {
    __m512i sums[MAX_SUMS];
#pragma GCC unroll 32
    for (int i = 0; i < P * M; i++) sums[i] = _mm512_setzero_si512();
    for (int step = 0; step < n_steps; step++) {
        __m512i weights[4];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            const char *at = w + (size_t)(p / 2) * pair_bytes + (size_t)step * PAIR_STEP +
                             p % 2 * PANEL_STEP;
            _mm_prefetch(at + (M <= 2 ? FETCH_FEW : FETCH_MANY), _MM_HINT_T0);
            weights[p] = _mm512_load_si512(at);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            int32_t quad = *(const int32_t *)(x + (size_t)m * row_bytes + (size_t)step * 4);
            __m512i xs = _mm512_set1_epi32(quad);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                sums[p * M + m] = _mm512_dpbusd_epi32(sums[p * M + m], xs, weights[p]);
            }
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < P * M; i++) acc[i] = sums[i];
}

/* The accumulators of P panels x M rows, all leaves, to the output. */
INLINE void block_bf16(float *out, size_t out_stride, const struct weight *w,
                       const struct packed_rows *rows, const float *bias, int panel_i, int row,
                       const int P, const int M) {
    __m512 leaves[MAX_SUMS][BACKEND_MAX_LEAVES]; /* [P * M][leaf] */
    const char *x = (const char *)rows->data + (size_t)row * rows->row_bytes;
    for (int leaf = 0; leaf < w->n_leaves; leaf++) {
        __m512 acc[MAX_SUMS];
        size_t at = (size_t)w->leaf_steps[leaf];
        leaf_bf16(acc, weight_step(w, panel_i, w->leaf_steps[leaf]), 2 * w->panel_bytes,
                  x + at * 4, rows->row_bytes,
                  w->leaf_steps[leaf + 1] - w->leaf_steps[leaf], P, M);
        for (int i = 0; i < P * M; i++) leaves[i][leaf] = acc[i];
    }
    for (int p = 0; p < P; p++) {
        for (int m = 0; m < M; m++) {
            store(out, out_stride, w, bias, panel_i + p, row + m,
                  tree(leaves[p * M + m], w->n_leaves));
        }
    }
}

INLINE void block_i8(float *out, size_t out_stride, const struct weight *w,
                     const struct packed_rows *rows, const float *bias, int panel_i, int row,
                     const int P, const int M) {
    __m512 leaves[MAX_SUMS][BACKEND_MAX_LEAVES];
    const char *x = (const char *)rows->data + (size_t)row * rows->row_bytes;
    for (int leaf = 0; leaf < w->n_leaves; leaf++) {
        __m512i acc[MAX_SUMS];
        size_t at = (size_t)w->leaf_steps[leaf];
        leaf_i8(acc, weight_step(w, panel_i, w->leaf_steps[leaf]), 2 * w->panel_bytes,
                x + at * 4, rows->row_bytes,
                w->leaf_steps[leaf + 1] - w->leaf_steps[leaf], P, M);
        for (int p = 0; p < P; p++) {
            size_t side = ((size_t)(panel_i + p) * (size_t)w->n_leaves + (size_t)leaf) * PANEL_ROWS;
            __m512i offset = _mm512_loadu_si512(w->sums + side);
            __m512 weight_scale = _mm512_loadu_ps(w->scales + side);
            for (int m = 0; m < M; m++) {
                __m512 scale = _mm512_mul_ps(
                    weight_scale, _mm512_set1_ps(rows->scales[(row + m) * w->n_leaves + leaf]));
                __m512i exact = _mm512_sub_epi32(acc[p * M + m], offset);
                leaves[p * M + m][leaf] = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale);
            }
        }
    }
    for (int p = 0; p < P; p++) {
        for (int m = 0; m < M; m++) {
            store(out, out_stride, w, bias, panel_i + p, row + m,
                  tree(leaves[p * M + m], w->n_leaves));
        }
    }
}

/* Blocks of every height, each at the widest that the 32 registers hold. */
#define BLOCK(kind, P, M)                                                                          \
    static void kind##_##P##_##M(float *out, size_t out_stride, const struct weight *w,            \
                                 const struct packed_rows *rows, const float *bias, int panel_i,   \
                                 int row) {                                                        \
        block_##kind(out, out_stride, w, rows, bias, panel_i, row, P, M);                          \
    }
#define HEIGHTS(X, kind)                                                                           \
    X(kind, 2, 1) X(kind, 2, 2) X(kind, 2, 3) X(kind, 2, 4) X(kind, 2, 5) X(kind, 4, 6)            \
    X(kind, 2, 7) X(kind, 2, 8) X(kind, 2, 9) X(kind, 2, 10) X(kind, 2, 11) X(kind, 2, 12)         \
    X(kind, 2, 13)
#define NARROW(X, kind)                                                                            \
    X(kind, 1, 1) X(kind, 1, 2) X(kind, 1, 3) X(kind, 1, 4) X(kind, 1, 5) X(kind, 1, 6)            \
    X(kind, 1, 7) X(kind, 1, 8) X(kind, 1, 9) X(kind, 1, 10) X(kind, 1, 11) X(kind, 1, 12)         \
    X(kind, 1, 13)
HEIGHTS(BLOCK, bf16)
NARROW(BLOCK, bf16)
HEIGHTS(BLOCK, i8)
NARROW(BLOCK, i8)

typedef void (*block_fn)(float *, size_t, const struct weight *, const struct packed_rows *,
                         const float *, int, int);
struct height {
    int n_panels;
    block_fn wide, narrow;
};
#define WIDE_ROW(kind, P, M) [M] = {P, kind##_##P##_##M, kind##_1_##M},
static const struct height heights_bf16[14] = {HEIGHTS(WIDE_ROW, bf16)};
static const struct height heights_i8[14] = {HEIGHTS(WIDE_ROW, i8)};

/* Up to 13 rows are one block: the weights stream by once, as one stream of pairs of panels. With
 * more, the panels of all blocks but the first come from the second-level cache. */
static void run(const struct height *heights, float *out, size_t out_stride,
                const struct weight *w, const struct packed_rows *rows, const float *bias,
                int panel_begin, int panel_end) {
    int n_rows = rows->n_rows;
    int tall = n_rows <= 13 ? n_rows : n_rows <= 16 ? 8 : 6;
    int width = heights[tall].n_panels;
    for (int panel = panel_begin; panel < panel_end;) {
        bool whole = panel % 2 == 0 && panel_end - panel >= width;
        int n_panels = whole ? width : 1;
        for (int row = 0; row < n_rows;) {
            int height = n_rows - row < tall ? n_rows - row : tall;
            const struct height *h = &heights[height];
            if (n_panels == h->n_panels) {
                h->wide(out, out_stride, w, rows, bias, panel, row);
            } else {
                for (int p = 0; p < n_panels; p++) {
                    h->narrow(out, out_stride, w, rows, bias, panel + p, row);
                }
            }
            row += height;
        }
        panel += n_panels;
    }
}

void linear_bf16_avx512(float *out, size_t out_stride, const struct weight *w,
                        const struct packed_rows *rows, const float *bias, int panel_begin,
                        int panel_end) {
    run(heights_bf16, out, out_stride, w, rows, bias, panel_begin, panel_end);
}

void linear_i8_avx512(float *out, size_t out_stride, const struct weight *w,
                      const struct packed_rows *rows, const float *bias, int panel_begin,
                      int panel_end) {
    run(heights_i8, out, out_stride, w, rows, bias, panel_begin, panel_end);
}
