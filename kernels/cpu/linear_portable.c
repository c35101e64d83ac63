/* Products in plain C: the fallback, and the text to compare the others with. One output's terms are
 * added in the order of k inside a leaf; leaves are added as a tree. */
#include "kernels/cpu/cpu.h"

static float tree(const float *leaves, int n) {
    if (n == 1) return leaves[0];
    return tree(leaves, n / 2) + tree(leaves + n / 2, n / 2);
}

static float leaf_bf16(const uint16_t *panel, const uint16_t *row, int begin, int end, int lane) {
    float sum = 0;
    for (int step = begin; step < end; step++) {
        const uint16_t *pair = panel + ((size_t)step * PANEL_ROWS + (size_t)lane) * 2;
        sum += bf16_to_f32(pair[0]) * bf16_to_f32(row[2 * step]);
        sum += bf16_to_f32(pair[1]) * bf16_to_f32(row[2 * step + 1]);
    }
    return sum;
}

static int32_t leaf_i8(const int8_t *panel, const uint8_t *row, int begin, int end, int lane) {
    int32_t sum = 0;
    for (int step = begin; step < end; step++) {
        const int8_t *quad = panel + ((size_t)step * PANEL_ROWS + (size_t)lane) * 4;
        for (int i = 0; i < 4; i++) sum += quad[i] * ((int)row[4 * step + i] - 128);
    }
    return sum;
}

void linear_bf16_portable(float *out, size_t out_stride, const struct weight *w,
                          const struct packed_rows *rows, const float *bias, int panel_begin,
                          int panel_end) {
    for (int output = panel_begin * PANEL_ROWS; output < panel_end * PANEL_ROWS; output++) {
        if (output >= w->n) return;
        const uint16_t *panel =
            (const uint16_t *)(w->data + (size_t)(output / PANEL_ROWS) * w->panel_bytes);
        for (int r = 0; r < rows->n_rows; r++) {
            const uint16_t *row =
                (const uint16_t *)((const char *)rows->data + (size_t)r * rows->row_bytes);
            float leaves[BACKEND_MAX_LEAVES];
            for (int leaf = 0; leaf < w->n_leaves; leaf++) {
                leaves[leaf] = leaf_bf16(panel, row, w->leaf_steps[leaf], w->leaf_steps[leaf + 1],
                                         output % PANEL_ROWS);
            }
            float sum = tree(leaves, w->n_leaves);
            out[(size_t)r * out_stride + (size_t)output] = bias ? sum + bias[output] : sum;
        }
    }
}

void linear_i8_portable(float *out, size_t out_stride, const struct weight *w,
                        const struct packed_rows *rows, const float *bias, int panel_begin,
                        int panel_end) {
    for (int output = panel_begin * PANEL_ROWS; output < panel_end * PANEL_ROWS; output++) {
        if (output >= w->n) return;
        int panel_i = output / PANEL_ROWS, lane = output % PANEL_ROWS;
        const int8_t *panel = (const int8_t *)(w->data + (size_t)panel_i * w->panel_bytes);
        for (int r = 0; r < rows->n_rows; r++) {
            const uint8_t *row = (const uint8_t *)rows->data + (size_t)r * rows->row_bytes;
            float leaves[BACKEND_MAX_LEAVES];
            for (int leaf = 0; leaf < w->n_leaves; leaf++) {
                int32_t sum =
                    leaf_i8(panel, row, w->leaf_steps[leaf], w->leaf_steps[leaf + 1], lane);
                float scale = w->scales[(panel_i * w->n_leaves + leaf) * PANEL_ROWS + lane] *
                              rows->scales[r * w->n_leaves + leaf];
                leaves[leaf] = (float)sum * scale;
            }
            float sum = tree(leaves, w->n_leaves);
            out[(size_t)r * out_stride + (size_t)output] = bias ? sum + bias[output] : sum;
        }
    }
}
