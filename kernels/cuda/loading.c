/* Weights on their way from a checkpoint to the device: slices of rows are copied (which reads them from
 * disk) into one of two pinned buffers, sent, and packed there by a kernel, while the other buffer is
 * being filled. Only what this rank's shard needs is touched. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda.h"

static enum source_type source_type_of(enum dtype dtype) {
    return dtype == DTYPE_F32 ? SOURCE_F32 : dtype == DTYPE_F16 ? SOURCE_F16 : SOURCE_BF16;
}

/* --- the two buffers --------------------------------------------------------------------------- */

static enum status take_slots(struct backend *backend, struct error *err) {
    if (backend->load_host[0] != NULL) return STATUS_OK;
    for (int i = 0; i < CUDA_LOAD_SLOTS; i++) {
        if (cudaHostAlloc((void **)&backend->load_host[i], CUDA_LOAD_BYTES, cudaHostAllocDefault) !=
            cudaSuccess) {
            return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                             "no pinned memory for %d bytes of loading", CUDA_LOAD_BYTES);
        }
        TRY(cuda_take((void **)&backend->load_device[i], CUDA_LOAD_BYTES, "loading", err));
        cudaEventCreateWithFlags(&backend->load_done[i], cudaEventDisableTiming);
    }
    return STATUS_OK;
}

void cuda_loading_end(struct backend *backend) {
    for (int i = 0; i < CUDA_LOAD_SLOTS; i++) {
        cudaFreeHost(backend->load_host[i]);
        cudaFree(backend->load_device[i]);
        if (backend->load_done[i] != NULL) cudaEventDestroy(backend->load_done[i]);
        backend->load_host[i] = backend->load_device[i] = NULL;
        backend->load_done[i] = NULL;
    }
}

/* n_rows rows of row_bytes each, stride apart, to the device; returns where. */
static const char *send_rows(struct backend *backend, const char *from, size_t stride,
                             size_t row_bytes, int n_rows) {
    unsigned slot = backend->n_loads++ % CUDA_LOAD_SLOTS;
    if (backend->n_loads > CUDA_LOAD_SLOTS) cudaEventSynchronize(backend->load_done[slot]);
    for (int row = 0; row < n_rows; row++) {
        memcpy(backend->load_host[slot] + (size_t)row * row_bytes, from + (size_t)row * stride,
               row_bytes);
    }
    cuda_went_well(backend,
                   cudaMemcpyAsync(backend->load_device[slot], backend->load_host[slot],
                                   (size_t)n_rows * row_bytes, cudaMemcpyHostToDevice,
                                   backend->stream),
                   "sending weights");
    return backend->load_device[slot];
}

/* What was sent last has been used by everything enqueued so far. */
static void sent_is_used(struct backend *backend) {
    cudaEventRecord(backend->load_done[(backend->n_loads - 1) % CUDA_LOAD_SLOTS], backend->stream);
}

/* --- weights ------------------------------------------------------------------------------------ */

static int unit_columns(enum product_format format) {
    return format == PRODUCT_I8 ? 64 : 32;
}

static void lay_out(struct weight *w, const int *leaf_begin, int n_leaves) {
    int unit = unit_columns(w->format);
    w->leaves.n_leaves = n_leaves;
    for (int leaf = 0; leaf < n_leaves; leaf++) {
        int begin = leaf_begin ? leaf_begin[leaf] : 0, end = leaf_begin ? leaf_begin[leaf + 1] : w->k;
        CHECK(begin <= end && end <= w->k);
        w->leaves.column[leaf] = begin;
        w->leaves.column[leaf + 1] = end;
        w->leaves.unit[leaf + 1] = w->leaves.unit[leaf] + (end - begin + unit - 1) / unit;
    }
}

/* Scratch of products that this weight needs more of than those before. */
static enum status make_room(const struct weight *w, struct error *err) {
    struct backend *backend = w->backend;
    size_t rows = ((size_t)backend->options.max_rows + ROW_TILE - 1) / ROW_TILE * ROW_TILE;
    size_t units = (size_t)w->leaves.unit[w->leaves.n_leaves];
    TRY(cuda_grow(backend, &backend->packed, &backend->packed_bytes,
                  rows / ROW_TILE * units * LANES * 16, "activations", err));
    TRY(cuda_grow(backend, (void **)&backend->x_scales, &backend->x_scales_bytes,
                  rows * MAX_LEAVES * sizeof(float), "scales", err));
    if (w->leaves.n_leaves == 1) return STATUS_OK;
    size_t chunk = rows < PRODUCT_MAX_ROWS ? rows : PRODUCT_MAX_ROWS;
    TRY(cuda_grow(backend, (void **)&backend->partial, &backend->partial_bytes,
                  (size_t)w->leaves.n_leaves * chunk * (size_t)w->n * sizeof(float), "leaf sums", err));
    size_t before = backend->counters_bytes;
    TRY(cuda_grow(backend, (void **)&backend->counters, &backend->counters_bytes,
                  (size_t)(w->n_padded / PANEL) * (chunk / ROW_TILE) * sizeof(unsigned),
                  "leaf counters", err));
    if (backend->counters_bytes != before) {
        cudaMemsetAsync(backend->counters, 0, backend->counters_bytes, backend->stream);
    }
    return STATUS_OK;
}

/* Rows of one source as far as they fill whole panels of the weight; `output`: where the first goes. */
static void pack_source(struct weight *w, int output, const struct weight_source *source) {
    struct backend *backend = w->backend;
    size_t element = dtype_bytes(source->dtype), row_bytes = (size_t)w->k * element;
    size_t quads = w->format == PRODUCT_F8 ? LANES : 2 * LANES;
    size_t panel_bytes = (size_t)w->leaves.unit[w->leaves.n_leaves] * quads * 16;
    int most = (int)(CUDA_LOAD_BYTES / row_bytes);
    CHECK(most > 0);
    for (int row = 0; row < source->n_rows;) {
        /* A piece begins at any output but ends at a panel's border, or with the source. */
        int at = output + row, left = source->n_rows - row, n = left < most ? left : most;
        int to_panel = PANEL - at % PANEL;
        if (at % PANEL != 0 && n > to_panel) n = to_panel;
        const char *from = (const char *)source->data + (size_t)row * (size_t)source->row_stride * element;
        const char *raw = send_rows(backend, from, (size_t)source->row_stride * element, row_bytes, n);
        launch_pack_weight(backend->queue, w->format, w->data + (size_t)(at / PANEL) * panel_bytes,
                           w->scales ? w->scales + at / PANEL * PANEL : NULL, w->n_padded, raw,
                           source_type_of(source->dtype), at % PANEL, n, w->k, w->leaves);
        sent_is_used(backend);
        row += n;
    }
}

static enum product_format format_of(enum dtype format) {
    return format == DTYPE_I8 ? PRODUCT_I8 : format == DTYPE_F8 ? PRODUCT_F8 : PRODUCT_BF16;
}

enum status cuda_weight_create(struct weight **out, struct backend *backend,
                               const struct weight_source *sources, int n_sources, int k,
                               const int *leaf_begin, int n_leaves, enum dtype format,
                               struct error *err) {
    enum status status;
    CHECK(n_leaves >= 1 && n_leaves <= BACKEND_MAX_LEAVES && k >= 0);
    struct weight *w = xcalloc(1, sizeof *w);
    w->head = backend->head;
    w->backend = backend;
    w->format = format_of(format);
    w->k = k;
    for (int i = 0; i < n_sources; i++) w->n += sources[i].n_rows;
    w->n_padded = (w->n + PANEL - 1) / PANEL * PANEL;
    lay_out(w, leaf_begin, leaf_begin ? n_leaves : 1);
    size_t unit_bytes = (size_t)PANEL * 32 * (w->format == PRODUCT_F8 ? 1 : 2);
    size_t bytes = (size_t)(w->n_padded / PANEL) * (size_t)w->leaves.unit[w->leaves.n_leaves] * unit_bytes;
    size_t scale_bytes = (size_t)w->n_padded * (size_t)w->leaves.n_leaves * sizeof(float);
    w->bytes = bytes + (w->format == PRODUCT_BF16 ? 0 : scale_bytes);
    TRY_OR_FAIL(make_room(w, err));
    TRY_OR_FAIL(take_slots(backend, err));
    TRY_OR_FAIL(cuda_take((void **)&w->data, bytes, "weights", err));
    cudaMemsetAsync(w->data, 0, bytes, backend->stream);
    if (w->format != PRODUCT_BF16) {
        TRY_OR_FAIL(cuda_take((void **)&w->scales, scale_bytes, "scales of weights", err));
        cudaMemsetAsync(w->scales, 0, scale_bytes, backend->stream);
    }
    int output = 0;
    for (int i = 0; i < n_sources && k > 0; i++) {
        pack_source(w, output, &sources[i]);
        output += sources[i].n_rows;
    }
    TRY_OR_FAIL(cuda_failure(backend, err));
    *out = w;
    return STATUS_OK;

fail:
    cuda_weight_free(w);
    return status;
}

void cuda_weight_free(struct weight *weight) {
    cuda_let_go(weight->backend);
    cudaFree(weight->data);
    cudaFree(weight->scales);
    free(weight);
}

size_t cuda_weight_bytes(const struct weight *weight) {
    return weight->bytes;
}

/* --- embedding tables ------------------------------------------------------------------------------ */

enum status cuda_table_create(struct table **out, struct backend *backend,
                              const struct weight_source *source, int width, struct error *err) {
    enum status status;
    struct table *table = xcalloc(1, sizeof *table);
    size_t element = dtype_bytes(source->dtype), row_bytes = (size_t)width * element;
    table->head = backend->head;
    table->backend = backend;
    table->type = source_type_of(source->dtype);
    table->bytes = row_bytes * (size_t)source->n_rows;
    TRY_OR_FAIL(take_slots(backend, err));
    TRY_OR_FAIL(cuda_take(&table->data, table->bytes, "the embedding", err));
    int most = (int)(CUDA_LOAD_BYTES / row_bytes);
    for (int row = 0; row < source->n_rows; row += most) {
        int left = source->n_rows - row, n = left < most ? left : most;
        size_t stride = (size_t)source->row_stride * element;
        const char *raw = send_rows(backend, (const char *)source->data + (size_t)row * stride, stride,
                                    row_bytes, n);
        cudaMemcpyAsync((char *)table->data + (size_t)row * row_bytes, raw, (size_t)n * row_bytes,
                        cudaMemcpyDeviceToDevice, backend->stream);
        sent_is_used(backend);
    }
    TRY_OR_FAIL(cuda_failure(backend, err));
    *out = table;
    return STATUS_OK;

fail:
    cuda_table_free(table);
    return status;
}

void cuda_table_free(struct table *table) {
    cuda_let_go(table->backend);
    cudaFree(table->data);
    free(table);
}

size_t cuda_table_bytes(const struct table *table) {
    return table->bytes;
}
