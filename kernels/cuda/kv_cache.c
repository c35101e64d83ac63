/* KV memory of a layer, and the rotation table. Layout: layout.h. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cuda.h"

enum status cuda_kv_create(struct kv_cache **out, struct backend *backend, int n_blocks,
                           int n_kv_heads, int head_dim, struct error *err) {
    enum status status;
    CHECK(head_dim <= 256 && n_kv_heads <= ATTENTION_MAX_KV_HEADS);
    struct kv_cache *cache = xcalloc(1, sizeof *cache);
    int padded = (head_dim + 31) / 32 * 32;
    cache->head = backend->head;
    cache->backend = backend;
    cache->layout = (struct kv_layout){NULL, NULL, n_kv_heads, head_dim, padded};
    cache->bytes = (size_t)n_blocks * (size_t)n_kv_heads * BACKEND_KV_BLOCK * (size_t)padded * 2;
    TRY_OR_FAIL(cuda_take((void **)&cache->layout.keys, cache->bytes, "keys", err));
    TRY_OR_FAIL(cuda_take((void **)&cache->layout.values, cache->bytes, "values", err));
    /* What is masked is finite, and padding is zero. */
    cudaMemsetAsync(cache->layout.keys, 0, cache->bytes, backend->stream);
    cudaMemsetAsync(cache->layout.values, 0, cache->bytes, backend->stream);
    *out = cache;
    return STATUS_OK;

fail:
    cuda_kv_free(cache);
    return status;
}

void cuda_kv_free(struct kv_cache *cache) {
    cuda_let_go(cache->backend);
    cudaFree(cache->layout.keys);
    cudaFree(cache->layout.values);
    free(cache);
}

void cuda_kv_read(const struct kv_cache *cache, const int32_t *blocks, int position, float *k,
                  float *v) {
    const struct kv_layout *layout = &cache->layout;
    int padded = layout->padded, slot = position % BACKEND_KV_BLOCK;
    size_t n = (size_t)layout->n_kv_heads * BACKEND_KV_BLOCK * (size_t)padded;
    size_t base = (size_t)blocks[position / BACKEND_KV_BLOCK] * n;
    uint16_t *keys = xcalloc(2 * n, sizeof *keys), *values = keys + n;
    cudaStream_t stream = cache->backend->stream;
    cudaMemcpyAsync(keys, layout->keys + base, n * 2, cudaMemcpyDeviceToHost, stream);
    cudaMemcpyAsync(values, layout->values + base, n * 2, cudaMemcpyDeviceToHost, stream);
    cuda_went_well(cache->backend, cudaStreamSynchronize(stream), "reading KV");
    for (int head = 0; head < layout->n_kv_heads; head++) {
        size_t at = (size_t)head * BACKEND_KV_BLOCK * (size_t)padded;
        for (int d = 0; d < layout->head_dim; d++) {
            *k++ = bf16_to_f32(keys[at + key_at(slot, d, padded)]);
            *v++ = bf16_to_f32(values[at + value_at(slot, d)]);
        }
    }
    free(keys);
}

enum status cuda_rope_create(struct rope_table **out, struct backend *backend, const float *inv_freq,
                             int head_dim, int n_positions, struct error *err) {
    enum status status;
    struct rope_table *table = xcalloc(1, sizeof *table);
    size_t half = (size_t)head_dim / 2, n = half * (size_t)n_positions;
    table->head = backend->head;
    table->backend = backend;
    table->n_positions = n_positions;
    float *values = xcalloc(2 * n, sizeof *values);
    for (size_t i = 0; i < n; i++) {
        float angle = (float)(i / half) * inv_freq[i % half];
        values[i] = (float)cos((double)angle);
        values[n + i] = (float)sin((double)angle);
    }
    TRY_OR_FAIL(cuda_take((void **)&table->cosines, 2 * n * sizeof(float), "a rope table", err));
    table->sines = table->cosines + n;
    cudaMemcpyAsync(table->cosines, values, 2 * n * sizeof(float), cudaMemcpyHostToDevice,
                    backend->stream);
    cuda_went_well(backend, cudaStreamSynchronize(backend->stream), "sending a rope table");
    free(values);
    *out = table;
    return STATUS_OK;

fail:
    free(values);
    cuda_rope_free(table);
    return status;
}

void cuda_rope_free(struct rope_table *table) {
    cuda_let_go(table->backend);
    cudaFree(table->cosines);
    free(table);
}
