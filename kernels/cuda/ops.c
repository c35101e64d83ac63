/* The ops of backend.h on a CUDA device: scratch, shapes and launches; the kernels are in the .cu files. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda.h"
#include "kernels/cuda/sampler.h"

/* --- failures ------------------------------------------------------------------------------------ */

bool cuda_went_well(struct backend *backend, cudaError_t error, const char *what) {
    if (error == cudaSuccess) return true;
    if (backend->failure == cudaSuccess) {
        backend->failure = error;
        backend->failed_at = what;
    }
    return false;
}

enum status cuda_failure(const struct backend *backend, struct error *err) {
    if (backend->failure == cudaSuccess) return STATUS_OK;
    return error_set(err, STATUS_INTERNAL, "%s failed at %s: %s", backend->name, backend->failed_at,
                     cudaGetErrorString(backend->failure));
}

enum status cuda_take(void **out, size_t bytes, const char *what, struct error *err) {
    cudaError_t error = cudaMalloc(out, bytes ? bytes : 1);
    if (error == cudaSuccess) return STATUS_OK;
    *out = NULL;
    cudaGetLastError();
    return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no device memory for %zu bytes of %s: %s", bytes,
                     what, cudaGetErrorString(error));
}

void cuda_let_go(struct backend *backend) {
    cudaStreamSynchronize(backend->stream);
    cuda_drop_graphs(backend);
    backend->packed_of = NULL;
}

enum status cuda_grow(struct backend *backend, void **memory, size_t *bytes, size_t wanted,
                      const char *what, struct error *err) {
    if (wanted <= *bytes) return STATUS_OK;
    cuda_let_go(backend);
    cudaFree(*memory);
    *memory = NULL;
    *bytes = 0;
    TRY(cuda_take(memory, wanted, what, err));
    *bytes = wanted;
    return STATUS_OK;
}

/* --- memory -------------------------------------------------------------------------------------- */

static void *alloc_zeroed(struct backend *backend, size_t bytes) {
    void *memory;
    struct error err;
    if (cuda_take(&memory, bytes, "activations", &err) != STATUS_OK) return NULL;
    cuda_went_well(backend, cudaMemsetAsync(memory, 0, bytes, backend->stream), "clearing memory");
    return memory;
}

static void free_memory(struct backend *backend, void *memory) {
    if (memory == NULL) return;
    cuda_let_go(backend);
    cudaFree(memory);
}

static enum status wait_done(struct backend *backend, struct error *err) {
    cuda_went_well(backend, cudaStreamSynchronize(backend->stream), "waiting for the device");
    cuda_went_well(backend, cudaGetLastError(), "a launch");
    return cuda_failure(backend, err);
}

/* The host's memory may be reused at return, so this waits. */
static void copy_in(struct backend *backend, void *memory, const void *host, size_t bytes) {
    backend->packed_of = NULL;
    cuda_went_well(backend,
                   cudaMemcpyAsync(memory, host, bytes, cudaMemcpyHostToDevice, backend->stream),
                   "copying to the device");
    cuda_went_well(backend, cudaStreamSynchronize(backend->stream), "copying to the device");
}

static enum status copy_out(struct backend *backend, void *host, const void *memory, size_t bytes,
                            struct error *err) {
    cuda_went_well(backend,
                   cudaMemcpyAsync(host, memory, bytes, cudaMemcpyDeviceToHost, backend->stream),
                   "copying from the device");
    return wait_done(backend, err);
}

static void copy(struct backend *backend, void *memory, const void *from, size_t bytes) {
    backend->packed_of = NULL;
    cuda_went_well(backend,
                   cudaMemcpyAsync(memory, from, bytes, cudaMemcpyDeviceToDevice, backend->stream),
                   "copying");
}

static void copy_2d(struct backend *backend, void *memory, size_t pitch, const void *from,
                    size_t from_pitch, size_t width, size_t height) {
    backend->packed_of = NULL;
    cuda_went_well(backend,
                   cudaMemcpy2DAsync(memory, pitch, from, from_pitch, width, height,
                                     cudaMemcpyDeviceToDevice, backend->stream),
                   "copying");
}

static void zero(struct backend *backend, void *memory, size_t bytes) {
    backend->packed_of = NULL;
    cuda_went_well(backend, cudaMemsetAsync(memory, 0, bytes, backend->stream), "clearing memory");
}

static void *stream(struct backend *backend) {
    return backend->stream;
}

/* --- operands that the op before left packed ------------------------------------------------------- */

/* Where an op writes its result as packed rows besides; valid until any other op runs. */
static void *packed_beside(struct backend *backend, const float *out, int n_rows, int width) {
    size_t bytes = (size_t)((n_rows + ROW_TILE - 1) / ROW_TILE) * (size_t)((width + 31) / 32) * LANES * 16;
    backend->packed_of = NULL;
    if (bytes > backend->packed_bytes) return NULL;
    backend->packed_of = out;
    backend->packed_rows = n_rows;
    backend->packed_width = width;
    return backend->packed;
}

static bool is_packed(const struct backend *backend, const float *in, int in_stride, int n_rows,
                      const struct weight *w) {
    if (backend->packed_of != in || backend->packed_rows < n_rows || w->format == PRODUCT_I8) {
        return false;
    }
    if (backend->packed_width != w->k || in_stride != w->k) return false;
    for (int leaf = 1; leaf < w->leaves.n_leaves; leaf++) {
        if (w->leaves.column[leaf] % 32 != 0) return false; /* leaves are padded, plain rows are not */
    }
    return true;
}

/* --- products --------------------------------------------------------------------------------------- */

static void pack_rows(struct backend *backend, const float *in, int in_stride, int n_rows,
                      const struct weight *w) {
    if (is_packed(backend, in, in_stride, n_rows, w)) return;
    backend->packed_of = NULL;
    if (w->format == PRODUCT_I8) {
        launch_pack_i8(backend->queue, backend->packed, backend->x_scales, in, in_stride, n_rows,
                       w->leaves);
    } else {
        launch_pack_bf16(backend->queue, backend->packed, in, in_stride, n_rows, w->leaves);
    }
}

static void multiply(struct backend *backend, float *out, const float *in, int in_stride,
                     const struct weight *w, const float *bias, int n_rows) {
    if (n_rows == 0 || w->n == 0) return;
    CHECK(n_rows <= backend->options.max_rows + ROW_TILE - 1);
    pack_rows(backend, in, in_stride, n_rows, w);
    int n_leaves = w->leaves.n_leaves, most = n_leaves > 1 ? PRODUCT_MAX_ROWS : n_rows;
    size_t tile_bytes = (size_t)w->leaves.unit[n_leaves] * LANES * 16;
    for (int row = 0; row < n_rows; row += most) {
        struct product product = {
            .format = w->format,
            .weights = w->data,
            .w_scales = w->scales,
            .rows = (const char *)backend->packed + (size_t)(row / ROW_TILE) * tile_bytes,
            .x_scales = backend->x_scales + (size_t)row * (size_t)n_leaves,
            .bias = bias,
            .out = out + (size_t)row * (size_t)w->n,
            .partial = backend->partial,
            .counters = backend->counters,
            .n = w->n,
            .n_padded = w->n_padded,
            .n_rows = n_rows - row < most ? n_rows - row : most,
            .leaves = w->leaves,
        };
        launch_product(backend->queue, &product, backend->n_processors);
    }
    backend->packed_of = NULL;
}

static void linear(struct backend *backend, float *out, const float *in, int in_stride,
                   const struct weight *w, const float *bias, int n_rows) {
    CHECK(w->leaves.n_leaves == 1);
    multiply(backend, out, in, in_stride, w, bias, n_rows);
}

static void linear_tree(struct backend *backend, float *out, const float *in,
                        const struct weight *w, int n_rows) {
    multiply(backend, out, in, w->k, w, NULL, n_rows);
}

/* --- row by row ------------------------------------------------------------------------------------- */

static void embed(struct backend *backend, float *out, const struct table *table, int n_rows,
                  int width) {
    backend->packed_of = NULL;
    launch_embed(backend->queue, out, table->data, table->type, backend->pass.tokens, backend->fed,
                 n_rows, width);
}

static void take_rows(struct backend *backend, float *out, const float *in, int n_rows, int width) {
    backend->packed_of = NULL;
    launch_take_rows(backend->queue, out, in, backend->pass.logit_rows, n_rows, width);
}

static void rmsnorm(struct backend *backend, float *out, const float *in, const float *weight,
                    float eps, int n_rows, int width) {
    void *packed = packed_beside(backend, out, n_rows, width);
    launch_rmsnorm(backend->queue, out, packed, in, weight, eps, n_rows, width);
}

static void tree_sum(struct backend *backend, float *residual, const float *roots, int n_roots,
                     const float *bias, int n_rows, int width) {
    backend->packed_of = NULL;
    launch_tree_sum(backend->queue, residual, NULL, NULL, roots, n_roots,
                    (size_t)n_rows * (size_t)width, bias, NULL, 0, n_rows, width);
}

static void tree_sum_norm(struct backend *backend, float *residual, float *normed,
                          const float *roots, int n_roots, const float *bias, const float *weight,
                          float eps, int n_rows, int width) {
    void *packed = packed_beside(backend, normed, n_rows, width);
    launch_tree_sum(backend->queue, residual, normed, packed, roots, n_roots,
                    (size_t)n_rows * (size_t)width, bias, weight, eps, n_rows, width);
}

static void swiglu(struct backend *backend, float *out, const float *gate_up, int n_rows,
                   int width) {
    void *packed = packed_beside(backend, out, n_rows, width);
    launch_swiglu(backend->queue, out, packed, gate_up, n_rows, width);
}

/* --- attention ---------------------------------------------------------------------------------------- */

static void rope_kv_write(struct backend *backend, float *qkv, struct kv_cache *cache,
                          const struct rope_table *rope, const float *q_norm, const float *k_norm,
                          float eps, int n_heads) {
    backend->packed_of = NULL;
    struct rope_launch launch = {
        .qkv = qkv,
        .kv = cache->layout,
        .cosines = rope->cosines,
        .sines = rope->sines,
        .q_norm = q_norm,
        .k_norm = k_norm,
        .eps = eps,
        .places = backend->pass.places,
        .tables = backend->pass.tables,
        .n_rows = cuda_pass_rows(backend),
        .n_heads = n_heads,
    };
    launch_rope_kv_write(backend->queue, &launch);
}

static void attention(struct backend *backend, float *out, const float *q, int q_stride,
                      const struct kv_cache *cache, const int *kv_of_head, int n_heads, int window) {
    int n_rows = cuda_pass_rows(backend), n_kv = cache->layout.n_kv_heads;
    struct attention_launch launch = {
        .out = out,
        .packed = packed_beside(backend, out, n_rows, n_heads * cache->layout.head_dim),
        .q = q,
        .q_stride = q_stride,
        .kv = cache->layout,
        .places = backend->pass.places,
        .tables = backend->pass.tables,
        .partial = backend->attention_partial,
        .n_slots = cuda_pass_slots(backend, n_heads, cache->layout.padded),
        .n_rows = n_rows,
        .n_heads = n_heads,
        .window = window,
    };
    /* Columns past the last head in the last unit would have to be zero. */
    if (n_heads * cache->layout.head_dim % 32 != 0) {
        launch.packed = NULL;
        backend->packed_of = NULL;
    }
    for (int kv = 0, head = 0; kv < n_kv; kv++) {
        while (head < n_heads && kv_of_head[head] == kv) head++;
        launch.first_head[kv + 1] = (uint16_t)head;
    }
    launch_attention(backend->queue, &launch);
}

/* --- sampling ----------------------------------------------------------------------------------------- */

static enum status sample_reserve(struct backend *backend, int n_rows, int vocab, struct error *err) {
    return cuda_sampler_reserve(backend->sampler, n_rows, vocab, err);
}

/* The newest batch stands in `fed`, where BACKEND_FED finds it whatever graph embeds it. */
static void sample_begin(struct backend *backend, float *logits, int stride, int vocab,
                         const struct sample_draw *draws, int n) {
    size_t bytes = BACKEND_MAX_FED * sizeof(int32_t);
    size_t batch = (size_t)(backend->n_batches++ % BACKEND_FED_BATCHES);
    backend->n_drawn = n;
    struct error err;
    enum status status = cuda_sampler_enqueue(backend->sampler, logits, (size_t)stride, vocab, draws, n,
                                              backend->fed, &err);
    if (status != STATUS_OK && backend->draw_status == STATUS_OK) {
        backend->draw_status = status;
        backend->draw_error = err;
    }
    cuda_went_well(backend,
                   cudaMemcpyAsync(backend->fed_ring + batch * BACKEND_MAX_FED, backend->fed, bytes,
                                   cudaMemcpyDeviceToDevice, backend->stream),
                   "keeping drawn tokens");
}

static enum status drawn_well(struct backend *backend, struct error *err) {
    enum status status = backend->draw_status;
    backend->draw_status = STATUS_OK;
    if (status != STATUS_OK) *err = backend->draw_error;
    return status;
}

static enum status sample_end(struct backend *backend, struct sample_result *results,
                              struct error *err) {
    TRY(drawn_well(backend, err));
    TRY(cuda_sampler_collect(backend->sampler, results, err));
    cuda_went_well(backend, cudaGetLastError(), "a launch");
    return cuda_failure(backend, err);
}

static enum status fed_tokens(struct backend *backend, int32_t *tokens, int n_batches,
                              struct error *err) {
    CHECK(n_batches <= BACKEND_FED_BATCHES && n_batches <= backend->n_batches);
    TRY(drawn_well(backend, err));
    size_t row = BACKEND_MAX_FED * sizeof(int32_t);
    TRY(copy_out(backend, backend->fed_host, backend->fed_ring, BACKEND_FED_BATCHES * row, err));
    for (int i = 0; i < n_batches; i++) {
        int64_t batch = (backend->n_batches - n_batches + i) % BACKEND_FED_BATCHES;
        memcpy(tokens + (size_t)i * BACKEND_MAX_FED, backend->fed_host + batch * BACKEND_MAX_FED, row);
    }
    return STATUS_OK;
}

static enum status logprobs(struct backend *backend, struct sample_result *out, const float *logits,
                            int vocab, int n_top, int32_t token, struct error *err) {
    return cuda_sampler_logprobs(backend->sampler, out, logits, vocab, n_top, token, err);
}

static enum status distribution(struct backend *backend, float *out, const float *logits, int vocab,
                                const struct sample_draw *draw, struct error *err) {
    return cuda_sampler_distribution(backend->sampler, out, logits, vocab, draw, err);
}

/* --- the backend ---------------------------------------------------------------------------------------- */

static const char *isa_name(const struct backend *backend) {
    return backend->name;
}

static enum backend_isa isa_of(const struct backend *backend) {
    return backend->options.isa;
}

static void destroy(struct backend *backend) {
    if (backend->stream != NULL) cudaStreamSynchronize(backend->stream);
    cuda_sampler_destroy(backend->sampler);
    cuda_pass_destroy(backend);
    cuda_loading_end(backend);
    void *memory[] = {backend->packed, backend->x_scales, backend->partial, backend->counters,
                      backend->fed,    backend->fed_ring, backend->attention_partial};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) cudaFree(memory[i]);
    cudaFreeHost(backend->fed_host);
    if (backend->stream != NULL) cudaStreamDestroy(backend->stream);
    free(backend);
}

static enum status probe(struct backend_device *out, int device, struct error *err) {
    int n = 0;
    /* All kernels are loaded at start: loading one later may wait for the whole device, which never
     * comes while ranks' kernels wait for each other there. Who sets it otherwise is obeyed. */
    setenv("CUDA_MODULE_LOADING", "EAGER", 0);
    /* A queue of the device for each rank's stream. Of two streams in one queue, what waits in the first
     * holds up the kernel in the second that it waits for; 8 queues are the default, 32 the most. */
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
    cudaError_t error = cudaGetDeviceCount(&n);
    if (error != cudaSuccess || n == 0) {
        cudaGetLastError();
        return error_set(err, STATUS_UNAVAILABLE, "no CUDA device here: %s",
                         error != cudaSuccess ? cudaGetErrorString(error) : "none is visible");
    }
    if (device == -1) {
        *out = (struct backend_device){.n_devices = n};
        return STATUS_OK;
    }
    if (device < 0 || device >= n) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "CUDA device %d, expected 0..%d", device, n - 1);
    }
    *out = (struct backend_device){.name = "CUDA device", .n_devices = n};
    size_t free_bytes = 0, total = 0;
    cudaDeviceGetAttribute(&out->major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&out->minor, cudaDevAttrComputeCapabilityMinor, device);
    if (cudaSetDevice(device) != cudaSuccess || cudaMemGetInfo(&free_bytes, &total) != cudaSuccess) {
        return error_set(err, STATUS_UNAVAILABLE, "CUDA device %d cannot be used: %s", device,
                         cudaGetErrorString(cudaGetLastError()));
    }
    out->memory_bytes = (int64_t)total;
    out->free_bytes = (int64_t)free_bytes;
    if (out->major < 8) {
        return error_set(err, STATUS_UNAVAILABLE,
                         "CUDA device %d has compute capability %d.%d, 8.0 or newer is needed", device,
                         out->major, out->minor);
    }
    return STATUS_OK;
}

/* Pieces of attention side by side: 8 rows of 32 heads of 128 at a context of 128k. */
enum { ATTENTION_FLOATS = 20 << 20, EMULATED_ATTENTION_FLOATS = 4 << 20 };

static enum status create(struct backend **out, const struct backend_options *options,
                          struct error *err) {
    enum status status;
    struct backend_device device;
    TRY(probe(&device, options->device, err));
    struct backend *backend = xcalloc(1, sizeof *backend);
    backend->head.ops = &cuda_ops;
    backend->options = *options;
    if (options->isa == BACKEND_EMULATED) snprintf(backend->name, sizeof backend->name, "emulated");
    else snprintf(backend->name, sizeof backend->name, "cuda-%d.%d", device.major, device.minor);
    cudaDeviceGetAttribute(&backend->n_processors, cudaDevAttrMultiProcessorCount, options->device);
    cudaError_t error = cudaStreamCreateWithFlags(&backend->stream, cudaStreamNonBlocking);
    if (error != cudaSuccess) {
        status = error_set(err, STATUS_UNAVAILABLE, "no CUDA stream: %s", cudaGetErrorString(error));
        goto fail;
    }
    backend->queue = (struct cuda_queue){backend->stream, device.major >= 9};
    size_t ring = BACKEND_FED_BATCHES * BACKEND_MAX_FED * sizeof(int32_t);
    size_t fed = ((size_t)options->max_rows + BACKEND_MAX_FED) * sizeof(int32_t);
    TRY_OR_FAIL(cuda_take((void **)&backend->fed, fed, "drawn tokens", err));
    TRY_OR_FAIL(cuda_take((void **)&backend->fed_ring, ring, "drawn tokens", err));
    cudaMemsetAsync(backend->fed, 0, fed, backend->stream);
    if (cudaHostAlloc((void **)&backend->fed_host, ring, cudaHostAllocDefault) != cudaSuccess) {
        status = error_set(err, STATUS_RESOURCE_EXHAUSTED, "no pinned memory for drawn tokens");
        goto fail;
    }
    TRY_OR_FAIL(cuda_pass_create(backend, err));
    backend->attention_floats =
        options->isa == BACKEND_EMULATED ? EMULATED_ATTENTION_FLOATS : ATTENTION_FLOATS;
    TRY_OR_FAIL(cuda_take((void **)&backend->attention_partial,
                          backend->attention_floats * sizeof(float), "pieces of attention", err));
    TRY_OR_FAIL(cuda_sampler_create(&backend->sampler, backend->stream, options->max_rows, err));
    *out = backend;
    return STATUS_OK;

fail:
    destroy(backend);
    return status;
}

const struct backend_ops cuda_ops = {
    .destroy = destroy,
    .isa_name = isa_name,
    .isa = isa_of,
    .alloc = alloc_zeroed,
    .free = free_memory,
    .copy_in = copy_in,
    .copy_out = copy_out,
    .copy = copy,
    .zero = zero,
    .copy_2d = copy_2d,
    .wait = wait_done,
    .stream = stream,
    .weight_create = cuda_weight_create,
    .weight_free = cuda_weight_free,
    .weight_bytes = cuda_weight_bytes,
    .table_create = cuda_table_create,
    .table_free = cuda_table_free,
    .table_bytes = cuda_table_bytes,
    .kv_create = cuda_kv_create,
    .kv_free = cuda_kv_free,
    .kv_read = cuda_kv_read,
    .rope_create = cuda_rope_create,
    .rope_free = cuda_rope_free,
    .pass_begin = cuda_pass_begin,
    .padded_rows = cuda_padded_rows,
    .replay = cuda_replay,
    .record_begin = cuda_record_begin,
    .record_end = cuda_record_end,
    .embed = embed,
    .take_rows = take_rows,
    .rmsnorm = rmsnorm,
    .linear = linear,
    .linear_tree = linear_tree,
    .tree_sum = tree_sum,
    .tree_sum_norm = tree_sum_norm,
    .swiglu = swiglu,
    .rope_kv_write = rope_kv_write,
    .attention = attention,
    .reaches = cuda_reaches,
    .inbox_create = cuda_inbox_create,
    .inbox_free = cuda_inbox_free,
    .inbox_memory = cuda_inbox_memory,
    .inbox_connect = cuda_inbox_connect,
    .inbox_gather = cuda_inbox_gather,
    .inbox_check = cuda_inbox_check,
    .sample_reserve = sample_reserve,
    .sample_begin = sample_begin,
    .sample_end = sample_end,
    .fed_tokens = fed_tokens,
    .logprobs = logprobs,
    .distribution = distribution,
};

extern const struct backend_module tandem_backend_module;
const struct backend_module tandem_backend_module = {
    .version = BACKEND_MODULE_VERSION,
    .ops_bytes = sizeof(struct backend_ops),
    .probe = probe,
    .create = create,
};
