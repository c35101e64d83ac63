/* Weights: from rows of a checkpoint to panels (cpu.h says how they lie). */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "kernels/cpu/cpu.h"

enum { HUGE_PAGE = 2 * 1024 * 1024 };

static enum status map_bytes(void **out, size_t *mapped, size_t bytes, struct error *err) {
    *mapped = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    /* Small weights are not worth a huge page each. */
    if (bytes < HUGE_PAGE) *mapped = (bytes + 4095) / 4096 * 4096;
    *out = mmap(NULL, *mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*out == MAP_FAILED) {
        *out = NULL;
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for %zu bytes of weights", bytes);
    }
    if (bytes >= HUGE_PAGE) madvise(*out, *mapped, MADV_HUGEPAGE); /* only faster with it */
    return STATUS_OK;
}

static void lay_out(struct weight *w, const int *leaf_begin, int n_leaves) {
    int group = weight_group(w->format, w->tiles);
    w->n_leaves = n_leaves;
    for (int leaf = 0; leaf < n_leaves; leaf++) {
        int begin = leaf_begin ? leaf_begin[leaf] : 0;
        int end = leaf_begin ? leaf_begin[leaf + 1] : w->k;
        CHECK(begin <= end && end <= w->k);
        w->leaf_begin[leaf] = begin;
        w->leaf_begin[leaf + 1] = end;
        w->leaf_steps[leaf + 1] = w->leaf_steps[leaf] + (end - begin + group - 1) / group;
    }
    w->n_panels = (w->n + PANEL_ROWS - 1) / PANEL_ROWS;
    size_t element = w->format == DTYPE_I8 ? 1 : 2;
    w->panel_bytes = (size_t)w->leaf_steps[n_leaves] * (size_t)group * PANEL_ROWS * element;
}

/* Where element (row r of the panel, column c of leaf l) lies in its panel, in elements. */
static size_t element_of(const struct weight *w, int leaf, int row, int column) {
    int group = weight_group(w->format, w->tiles);
    size_t step = (size_t)(w->leaf_steps[leaf] + column / group);
    return (step * PANEL_ROWS + (size_t)row) * (size_t)group + (size_t)(column % group);
}

static void pack_leaf_bf16(struct weight *w, uint16_t *panel, int row, int leaf,
                           const float *values) {
    int n = w->leaf_begin[leaf + 1] - w->leaf_begin[leaf];
    for (int c = 0; c < n; c++) panel[element_of(w, leaf, row, c)] = bf16_from_f32(values[c]);
}

static void pack_leaf_i8(struct weight *w, int8_t *panel, int panel_i, int row, int leaf,
                         const float *values) {
    int n = w->leaf_begin[leaf + 1] - w->leaf_begin[leaf];
    float largest = 0;
    for (int c = 0; c < n; c++) largest = fmaxf(largest, fabsf(values[c]));
    float scale = largest / 127.0f;
    float inverse = scale > 0 ? 1.0f / scale : 0;
    int32_t sum = 0;
    for (int c = 0; c < n; c++) {
        int q = (int)lrintf(values[c] * inverse);
        q = q > 127 ? 127 : q < -127 ? -127 : q;
        panel[element_of(w, leaf, row, c)] = (int8_t)q;
        sum += q;
    }
    size_t at = ((size_t)panel_i * (size_t)w->n_leaves + (size_t)leaf) * PANEL_ROWS + (size_t)row;
    w->scales[at] = scale;
    w->sums[at] = 128 * sum;
}

static void pack_row(struct weight *w, int output, const struct weight_source *source, int row,
                     float *values) {
    for (int c = 0; c < w->k; c++) {
        values[c] = dtype_load_f32(source->data, source->dtype,
                                   (size_t)row * (size_t)source->row_stride + (size_t)c);
    }
    int panel_i = output / PANEL_ROWS, panel_row = output % PANEL_ROWS;
    char *panel = w->data + (size_t)panel_i * w->panel_bytes;
    for (int leaf = 0; leaf < w->n_leaves; leaf++) {
        const float *leaf_values = values + w->leaf_begin[leaf];
        if (w->format == DTYPE_I8) {
            pack_leaf_i8(w, (int8_t *)panel, panel_i, panel_row, leaf, leaf_values);
        } else {
            pack_leaf_bf16(w, (uint16_t *)panel, panel_row, leaf, leaf_values);
        }
    }
}

enum status backend_weight_create(struct weight **out, struct backend *backend,
                                  const struct weight_source *sources, int n_sources, int k,
                                  const int *leaf_begin, int n_leaves, enum dtype format,
                                  struct error *err) {
    CHECK(format == DTYPE_BF16 || format == DTYPE_I8);
    CHECK(n_leaves >= 1 && n_leaves <= BACKEND_MAX_LEAVES && k >= 0);
    struct weight *w = xcalloc(1, sizeof *w);
    w->format = format;
    w->tiles = backend->isa == BACKEND_AMX;
    w->k = k;
    for (int i = 0; i < n_sources; i++) w->n += sources[i].n_rows;
    lay_out(w, leaf_begin, leaf_begin ? n_leaves : 1);

    size_t n_scales = (size_t)w->n_panels * (size_t)w->n_leaves * PANEL_ROWS;
    w->bytes = (size_t)w->n_panels * w->panel_bytes;
    enum status status = map_bytes((void **)&w->data, &w->mapped, w->bytes ? w->bytes : 64, err);
    if (status != STATUS_OK) {
        free(w);
        return status;
    }
    if (format == DTYPE_I8) {
        w->scales = xcalloc(n_scales, sizeof *w->scales);
        w->sums = xcalloc(n_scales, sizeof *w->sums);
        w->bytes += n_scales * (sizeof *w->scales + sizeof *w->sums);
    }
    float *values = xcalloc((size_t)k, sizeof *values);
    int output = 0;
    for (int i = 0; i < n_sources; i++) {
        for (int row = 0; row < sources[i].n_rows; row++) {
            pack_row(w, output++, &sources[i], row, values);
        }
    }
    free(values);
    *out = w;
    return STATUS_OK;
}

void backend_weight_free(struct weight *weight) {
    if (weight == NULL) return;
    munmap(weight->data, weight->mapped);
    free(weight->scales);
    free(weight->sums);
    free(weight);
}

size_t backend_weight_bytes(const struct weight *weight) {
    return weight->bytes;
}
