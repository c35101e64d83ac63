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

/* Puts one row of a leaf, as stored elements, into its lane (or tile row): a group of columns at a
 * time, PANEL_ROWS groups apart. What lies past n_bytes in the last group stays zero. */
static void scatter(const struct weight *w, int panel_i, int row, int leaf, const char *values,
                    size_t n_bytes) {
    size_t group_bytes = w->tiles ? 64 : 4;
    size_t stride = PANEL_ROWS * group_bytes * (size_t)w->interleave;
    char *step = w->tiles ? w->data + (size_t)panel_i * w->panel_bytes +
                                (size_t)w->leaf_steps[leaf] * stride
                          : weight_step(w, panel_i, w->leaf_steps[leaf]);
    char *out = step + (size_t)row * group_bytes;
    size_t at = 0;
    for (; at + group_bytes <= n_bytes; at += group_bytes, out += stride) {
        if (group_bytes == 4) memcpy(out, values + at, 4);
        else memcpy(out, values + at, 64);
    }
    if (at < n_bytes) memcpy(out, values + at, n_bytes - at);
}

/* Symmetric, one scale for the row's leaf. */
static void quantise(struct weight *w, int8_t *out, const float *values, int n, int panel_i, int row,
                     int leaf) {
    float largest = 0;
    for (int c = 0; c < n; c++) largest = fmaxf(largest, fabsf(values[c]));
    float scale = largest / 127.0f;
    float inverse = scale > 0 ? 1.0f / scale : 0;
    int32_t sum = 0;
    for (int c = 0; c < n; c++) {
        int q = (int)lrintf(values[c] * inverse);
        q = q > 127 ? 127 : q < -127 ? -127 : q;
        out[c] = (int8_t)q;
        sum += q;
    }
    size_t at = ((size_t)panel_i * (size_t)w->n_leaves + (size_t)leaf) * PANEL_ROWS + (size_t)row;
    w->scales[at] = scale;
    w->sums[at] = 128 * sum;
}

/* One row of a source while it is packed. */
struct row_buffers {
    float *values;    /* [k], int8 only */
    uint16_t *bf16;   /* [k] */
    int8_t *bytes;    /* [k] */
};

static void load_row(struct row_buffers *buffers, const struct weight *w,
                     const struct weight_source *source, int row) {
    size_t first = (size_t)row * (size_t)source->row_stride;
    const char *data = source->data;
    if (w->format == DTYPE_BF16 && source->dtype == DTYPE_BF16) {
        memcpy(buffers->bf16, data + first * sizeof(uint16_t), (size_t)w->k * sizeof(uint16_t));
        return;
    }
    for (int c = 0; c < w->k; c++) {
        float value = dtype_load_f32(data, source->dtype, first + (size_t)c);
        if (w->format == DTYPE_BF16) buffers->bf16[c] = bf16_from_f32(value);
        else buffers->values[c] = value;
    }
}

static void pack_row(struct weight *w, int output, const struct weight_source *source, int row,
                     struct row_buffers *buffers) {
    load_row(buffers, w, source, row);
    int panel_i = output / PANEL_ROWS, panel_row = output % PANEL_ROWS;
    for (int leaf = 0; leaf < w->n_leaves; leaf++) {
        int begin = w->leaf_begin[leaf], n = w->leaf_begin[leaf + 1] - begin;
        if (w->format == DTYPE_I8) {
            quantise(w, buffers->bytes, buffers->values + begin, n, panel_i, panel_row, leaf);
            scatter(w, panel_i, panel_row, leaf, (const char *)buffers->bytes, (size_t)n);
        } else {
            scatter(w, panel_i, panel_row, leaf, (const char *)(buffers->bf16 + begin),
                    (size_t)n * sizeof *buffers->bf16);
        }
    }
}

enum status cpu_weight_create(struct weight **out, struct backend *backend,
                                  const struct weight_source *sources, int n_sources, int k,
                                  const int *leaf_begin, int n_leaves, enum dtype format,
                                  struct error *err) {
    if (format != DTYPE_BF16 && format != DTYPE_I8) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "weights of format %s are for GPUs; the CPU has bf16 and int8",
                         dtype_name(format));
    }
    CHECK(n_leaves >= 1 && n_leaves <= BACKEND_MAX_LEAVES && k >= 0);
    struct weight *w = xcalloc(1, sizeof *w);
    w->head = backend->head;
    w->format = format;
    w->tiles = backend->isa == BACKEND_AMX;
    w->interleave = backend->isa == BACKEND_AVX512 ? 2 : 1;
    w->k = k;
    for (int i = 0; i < n_sources; i++) w->n += sources[i].n_rows;
    lay_out(w, leaf_begin, leaf_begin ? n_leaves : 1);

    size_t n_scales = (size_t)w->n_panels * (size_t)w->n_leaves * PANEL_ROWS;
    w->bytes = (size_t)w->n_panels * w->panel_bytes;
    size_t spare = w->n_panels % w->interleave != 0 ? w->panel_bytes : 0;
    size_t needed = w->bytes + spare;
    enum status status = map_bytes((void **)&w->data, &w->mapped, needed ? needed : 64, err);
    if (status != STATUS_OK) {
        free(w);
        return status;
    }
    if (format == DTYPE_I8) {
        w->scales = xcalloc(n_scales, sizeof *w->scales);
        w->sums = xcalloc(n_scales, sizeof *w->sums);
        w->bytes += n_scales * (sizeof *w->scales + sizeof *w->sums);
    }
    struct row_buffers buffers = {
        .values = xcalloc((size_t)k, sizeof *buffers.values),
        .bf16 = xcalloc((size_t)k, sizeof *buffers.bf16),
        .bytes = xcalloc((size_t)k, sizeof *buffers.bytes),
    };
    int output = 0;
    for (int i = 0; i < n_sources; i++) {
        for (int row = 0; row < sources[i].n_rows; row++) {
            pack_row(w, output++, &sources[i], row, &buffers);
        }
    }
    free(buffers.values);
    free(buffers.bf16);
    free(buffers.bytes);
    *out = w;
    return STATUS_OK;
}

void cpu_weight_free(struct weight *weight) {
    if (weight == NULL) return;
    munmap(weight->data, weight->mapped);
    free(weight->scales);
    free(weight->sums);
    free(weight);
}

size_t cpu_weight_bytes(const struct weight *weight) {
    return weight->bytes;
}
