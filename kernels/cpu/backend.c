/* A backend of one rank: its instruction set, threads and scratch. */
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/ops.h"

static void destroy(struct backend *backend) {
    pool_destroy(backend->pool);
    free(backend->packed);
    free(backend->sample_scratch);
    free(backend->sample_order);
    free(backend->drawn);
    free(backend);
}

static const char *isa_name(const struct backend *backend) {
    return backend_isa_to_name(backend->isa);
}

static enum backend_isa isa_of(const struct backend *backend) {
    return backend->isa;
}

static void *alloc_zeroed(struct backend *backend, size_t bytes) {
    (void)backend;
    size_t rounded = (bytes + 63) / 64 * 64;
    void *memory = aligned_alloc(64, rounded ? rounded : 64);
    if (memory != NULL) memset(memory, 0, rounded);
    return memory;
}

static void free_memory(struct backend *backend, void *memory) {
    (void)backend;
    free(memory);
}

void *backend_packed(struct backend *backend, size_t bytes) {
    if (bytes > backend->packed_bytes) {
        free(backend->packed);
        backend->packed_bytes = (bytes + 4095) / 4096 * 4096;
        backend->packed = aligned_alloc(64, backend->packed_bytes);
        CHECK(backend->packed != NULL);
    }
    return backend->packed;
}

/* --- memory is the host's, and everything computes at once -------------------------------------- */

static void copy(struct backend *backend, void *memory, const void *from, size_t bytes) {
    (void)backend;
    if (bytes > 0) memmove(memory, from, bytes);
}

static enum status copy_out(struct backend *backend, void *host, const void *memory, size_t bytes,
                            struct error *err) {
    (void)err;
    copy(backend, host, memory, bytes);
    return STATUS_OK;
}

static void zero(struct backend *backend, void *memory, size_t bytes) {
    (void)backend;
    memset(memory, 0, bytes);
}

static void copy_2d(struct backend *backend, void *memory, size_t pitch, const void *from,
                    size_t from_pitch, size_t width, size_t height) {
    for (size_t i = 0; i < height; i++) {
        copy(backend, (char *)memory + i * pitch, (const char *)from + i * from_pitch, width);
    }
}

static enum status wait_done(struct backend *backend, struct error *err) {
    (void)backend;
    (void)err;
    return STATUS_OK;
}

static void *stream(struct backend *backend) {
    (void)backend;
    return NULL;
}

static void pass_begin(struct backend *backend, const struct backend_pass *pass) {
    backend->pass = pass;
}

static int padded_rows(const struct backend *backend, int n_rows) {
    (void)backend;
    return n_rows;
}

static bool replay(struct backend *backend, uint64_t key) {
    (void)backend;
    (void)key;
    return false;
}

static void record_begin(struct backend *backend, uint64_t key) {
    (void)backend;
    (void)key;
}

static void record_end(struct backend *backend) {
    (void)backend;
}

static enum status sample_reserve(struct backend *backend, int n_rows, int vocab, struct error *err) {
    (void)backend;
    (void)n_rows;
    (void)vocab;
    (void)err;
    return STATUS_OK;
}

static bool reaches_nothing(struct backend *backend, int device) {
    (void)backend;
    (void)device;
    return false;
}

static enum status no_inbox(struct inbox **out, struct backend *backend, int rank, int size,
                            size_t max_bytes, struct error *err) {
    (void)backend;
    (void)rank;
    (void)size;
    (void)max_bytes;
    *out = NULL;
    return error_set(err, STATUS_FAILED_PRECONDITION, "ranks of the CPU need no inbox");
}

static const struct backend_ops table_of_ops = {
    .destroy = destroy,
    .isa_name = isa_name,
    .isa = isa_of,
    .alloc = alloc_zeroed,
    .free = free_memory,
    .copy_in = copy,
    .copy_out = copy_out,
    .copy = copy,
    .zero = zero,
    .copy_2d = copy_2d,
    .wait = wait_done,
    .stream = stream,
    .weight_create = cpu_weight_create,
    .weight_free = cpu_weight_free,
    .weight_bytes = cpu_weight_bytes,
    .table_create = cpu_table_create,
    .table_free = cpu_table_free,
    .table_bytes = cpu_table_bytes,
    .kv_create = cpu_kv_create,
    .kv_free = cpu_kv_free,
    .kv_read = cpu_kv_read,
    .rope_create = cpu_rope_create,
    .rope_free = cpu_rope_free,
    .pass_begin = pass_begin,
    .padded_rows = padded_rows,
    .replay = replay,
    .record_begin = record_begin,
    .record_end = record_end,
    .embed = cpu_embed,
    .take_rows = cpu_take_rows,
    .rmsnorm = cpu_rmsnorm,
    .linear = cpu_linear,
    .linear_tree = cpu_linear_tree,
    .tree_sum = cpu_tree_sum,
    .tree_sum_norm = cpu_tree_sum_norm,
    .swiglu = cpu_swiglu,
    .rope_kv_write = cpu_rope_kv_write,
    .attention = cpu_attention,
    .reaches = reaches_nothing,
    .inbox_create = no_inbox,
    .sample_reserve = sample_reserve,
    .sample_begin = cpu_sample_begin,
    .sample_end = cpu_sample_end,
    .fed_tokens = cpu_fed_tokens,
    .logprobs = cpu_logprobs,
    .distribution = cpu_distribution,
};

/* --- making it -------------------------------------------------------------------------------------- */

enum status cpu_backend_create(struct backend **out, const struct backend_options *options,
                               struct error *err) {
    CHECK(options->n_threads >= 1);
    enum backend_isa isa = options->isa == BACKEND_AUTO ? backend_isa_best() : options->isa;
    if (!cpu_isa_available(isa)) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "instruction set %s is not available on this processor; the best here is %s",
                         backend_isa_to_name(isa), backend_isa_to_name(backend_isa_best()));
    }
    struct backend *backend = xcalloc(1, sizeof *backend);
    backend->head.ops = &table_of_ops;
    backend->options = *options;
    backend->isa = isa;
    backend->ops = isa == BACKEND_PORTABLE ? &cpu_ops_portable
                   : isa == BACKEND_AVX2   ? &cpu_ops_avx2
                                           : &cpu_ops_avx512;
    if (options->n_threads > 1) {
        enum status status = pool_create(&backend->pool, options->n_threads, err);
        if (status != STATUS_OK) {
            free(backend);
            return status;
        }
    }
    *out = backend;
    return STATUS_OK;
}
