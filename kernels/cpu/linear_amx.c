/* Products with AMX tiles: weights in the tile's rows, tokens in its columns.
 *
 * A tile product takes its 16 cycles whatever the number of columns, so 1 to 16 rows of activations
 * cost the same and the stream of weights from memory is what counts. Four panels are walked at once:
 * four independent accumulators cover the latency of the product, four streams suit the prefetcher.
 * tiles 0-3: accumulators [16 outputs][columns]; 4: activations; 5-7: weights.
 *
 * An output's terms are added in the order of k in every shape of call: the accumulator of an output
 * belongs to its panel and column alone. */
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/tile.h"

enum { COLUMNS = TILE_COLUMNS, PANELS = 4 };

static void configure(int n_columns) {
    struct tile_config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int t = 0; t < 8; t++) {
        bool weights = t > PANELS;
        config.rows[t] = 16;
        config.row_bytes[t] = weights ? 64 : (uint16_t)(4 * n_columns);
    }
    tile_configure(&config);
}

#define PRODUCT(kind)                                                                              \
    static void product_##kind(char *sums, const char *panel, size_t panel_bytes, int n_panels,    \
                               const char *tokens, int begin, int end) {                           \
        tile_zero(0);                                                                              \
        tile_zero(1);                                                                              \
        tile_zero(2);                                                                              \
        tile_zero(3);                                                                              \
        for (int step = begin; step < end; step++) {                                               \
            const char *at = panel + (size_t)step * TILE_BYTES;                                    \
            tile_load(4, tokens + (size_t)step * TILE_BYTES, 64);                                  \
            tile_load(5, at, 64);                                                                  \
            tile_dot_##kind(0, 5, 4);                                                              \
            if (n_panels == PANELS) {                                                              \
                tile_load(6, at + panel_bytes, 64);                                                \
                tile_dot_##kind(1, 6, 4);                                                          \
                tile_load(7, at + 2 * panel_bytes, 64);                                            \
                tile_dot_##kind(2, 7, 4);                                                          \
                tile_load(5, at + 3 * panel_bytes, 64);                                            \
                tile_dot_##kind(3, 5, 4);                                                          \
            }                                                                                      \
        }                                                                                          \
        tile_store(0, sums, 64);                                                                   \
        if (n_panels == PANELS) {                                                                  \
            tile_store(1, sums + TILE_BYTES, 64);                                                  \
            tile_store(2, sums + 2 * TILE_BYTES, 64);                                              \
            tile_store(3, sums + 3 * TILE_BYTES, 64);                                              \
        }                                                                                          \
    }
PRODUCT(bf16)
PRODUCT(i8)

/* Leaf sums of one panel, [leaf][16 outputs][16 columns], to rows of the output. */
static void write_out(float *out, size_t out_stride, const struct weight *w, const float *bias,
                      int panel_i, int row, int n_columns, float (*leaves)[PANELS][16][COLUMNS],
                      int slot) {
    for (int lane = 0; lane < PANEL_ROWS; lane++) {
        int output = panel_i * PANEL_ROWS + lane;
        if (output >= w->n) return;
        for (int c = 0; c < n_columns; c++) {
            for (int width = 1; width < w->n_leaves; width *= 2) {
                for (int i = 0; i < w->n_leaves; i += 2 * width) {
                    leaves[i][slot][lane][c] += leaves[i + width][slot][lane][c];
                }
            }
            float sum = leaves[0][slot][lane][c];
            out[(size_t)(row + c) * out_stride + (size_t)output] = bias ? sum + bias[output] : sum;
        }
    }
}

static void scale_leaf(float (*leaf)[16][COLUMNS], const int32_t (*sums)[16][COLUMNS],
                       const struct weight *w, const struct packed_rows *rows, int panel_i,
                       int n_panels, int row, int n_columns, int leaf_i) {
    for (int p = 0; p < n_panels; p++) {
        size_t side = ((size_t)(panel_i + p) * (size_t)w->n_leaves + (size_t)leaf_i) * PANEL_ROWS;
        for (int lane = 0; lane < PANEL_ROWS; lane++) {
            for (int c = 0; c < n_columns; c++) {
                float scale = w->scales[side + (size_t)lane] *
                              rows->scales[(row + c) * w->n_leaves + leaf_i];
                leaf[p][lane][c] = (float)sums[p][lane][c] * scale;
            }
        }
    }
}

static void block(float *out, size_t out_stride, const struct weight *w,
                  const struct packed_rows *rows, const float *bias, const char *tokens,
                  int panel_i, int n_panels, int row, int n_columns) {
    _Alignas(64) float leaves[BACKEND_MAX_LEAVES][PANELS][16][COLUMNS];
    _Alignas(64) int32_t sums[PANELS][16][COLUMNS];
    const char *panel = w->data + (size_t)panel_i * w->panel_bytes;
    for (int leaf = 0; leaf < w->n_leaves; leaf++) {
        int begin = w->leaf_steps[leaf], end = w->leaf_steps[leaf + 1];
        if (w->format == DTYPE_BF16) {
            product_bf16((char *)leaves[leaf], panel, w->panel_bytes, n_panels, tokens, begin, end);
        } else {
            product_i8((char *)sums, panel, w->panel_bytes, n_panels, tokens, begin, end);
            scale_leaf(leaves[leaf], (const int32_t(*)[16][COLUMNS])sums, w, rows, panel_i,
                       n_panels, row, n_columns, leaf);
        }
    }
    for (int p = 0; p < n_panels; p++) {
        write_out(out, out_stride, w, bias, panel_i + p, row, n_columns, leaves, p);
    }
}

/* Panels stay in the second-level cache while all rows pass by them. */
static void run(float *out, size_t out_stride, const struct weight *w,
                const struct packed_rows *rows, const float *bias, int panel_begin,
                int panel_end) {
    size_t block_bytes = (size_t)w->leaf_steps[w->n_leaves] * TILE_BYTES;
    int configured = 0;
    for (int panel = panel_begin; panel < panel_end;) {
        int n_panels = panel_end - panel >= PANELS ? PANELS : 1;
        for (int row = 0; row < rows->n_rows; row += COLUMNS) {
            int n_columns = rows->n_rows - row < COLUMNS ? rows->n_rows - row : COLUMNS;
            if (n_columns != configured) configure(n_columns);
            configured = n_columns;
            const char *tokens = (const char *)rows->data + (size_t)(row / COLUMNS) * block_bytes;
            block(out, out_stride, w, rows, bias, tokens, panel, n_panels, row, n_columns);
        }
        panel += n_panels;
    }
    tile_release();
}

void linear_bf16_amx(float *out, size_t out_stride, const struct weight *w,
                     const struct packed_rows *rows, const float *bias, int panel_begin,
                     int panel_end) {
    run(out, out_stride, w, rows, bias, panel_begin, panel_end);
}

void linear_i8_amx(float *out, size_t out_stride, const struct weight *w,
                   const struct packed_rows *rows, const float *bias, int panel_begin,
                   int panel_end) {
    run(out, out_stride, w, rows, bias, panel_begin, panel_end);
}
