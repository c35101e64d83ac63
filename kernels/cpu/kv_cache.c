/* KV memory of one layer, and writing to it. A block holds, for each KV head in turn, K then V:
 *   K [padded / 2][16 positions][2]   one pair of dimensions of 16 positions: 64 bytes
 *   V [8 pairs of positions][padded][2]
 * in bf16, padded = head_dim rounded up to 16. Zeroed, so that what is masked is finite. */
#include "kernels/cpu/kv_cache.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static int padded_dim(int head_dim) {
    return (head_dim + 15) / 16 * 16;
}

enum status cpu_kv_create(struct kv_cache **out, struct backend *backend, int n_blocks,
                              int n_kv_heads, int head_dim, struct error *err) {
    struct kv_cache *cache = xcalloc(1, sizeof *cache);
    cache->head = backend->head;
    cache->n_kv_heads = n_kv_heads;
    cache->head_dim = head_dim;
    cache->padded = padded_dim(head_dim);
    cache->head_stride = (size_t)BACKEND_KV_BLOCK * (size_t)cache->padded;
    cache->block_stride = cache->head_stride * 2 * (size_t)n_kv_heads;
    cache->bytes = cache->block_stride * (size_t)n_blocks * sizeof(uint16_t);
    if (cache->bytes == 0) cache->bytes = 64;
    cache->data = mmap(NULL, cache->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                       0);
    if (cache->data == MAP_FAILED) {
        size_t bytes = cache->bytes;
        free(cache);
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "no memory for %zu bytes of KV", bytes);
    }
    *out = cache;
    return STATUS_OK;
}

void cpu_kv_free(struct kv_cache *cache) {
    if (cache == NULL) return;
    munmap(cache->data, cache->bytes);
    free(cache);
}

/* A weight of 0 hides a masked position only while 0 * value is 0: values are kept finite, so that a
 * block's next owner never sees what an earlier one broke. NaN becomes 0, infinity the largest. */
static uint16_t finite_bf16(float value) {
    const float largest = 3.38953139e38f; /* 0x7f7f */
    if (value != value) return 0;
    value = value > largest ? largest : value < -largest ? -largest : value;
    return bf16_from_f32(value);
}

void kv_cache_write(struct kv_cache *cache, int head, int32_t block, int slot, const float *k,
                    const float *v) {
    uint16_t *keys = kv_cache_keys(cache, head) + (size_t)block * cache->block_stride;
    uint16_t *values = kv_cache_values(cache, head) + (size_t)block * cache->block_stride;
    values += (size_t)(slot / 2) * (size_t)cache->padded * 2 + slot % 2;
    keys += slot * 2;
    for (int d = 0; d < cache->head_dim; d++) {
        keys[(size_t)(d / 2) * 32 + (size_t)(d % 2)] = bf16_from_f32(k[d]);
        values[(size_t)d * 2] = finite_bf16(v[d]);
    }
}

void cpu_kv_read(const struct kv_cache *cache, const int32_t *blocks, int position, float *k,
                     float *v) {
    size_t block = (size_t)blocks[position / BACKEND_KV_BLOCK] * cache->block_stride;
    int slot = position % BACKEND_KV_BLOCK;
    for (int head = 0; head < cache->n_kv_heads; head++) {
        const uint16_t *keys = kv_cache_keys(cache, head) + block + slot * 2;
        const uint16_t *values = kv_cache_values(cache, head) + block +
                                 (size_t)(slot / 2) * (size_t)cache->padded * 2 + slot % 2;
        for (int d = 0; d < cache->head_dim; d++) {
            *k++ = bf16_to_f32(keys[(size_t)(d / 2) * 32 + (size_t)(d % 2)]);
            *v++ = bf16_to_f32(values[(size_t)d * 2]);
        }
    }
}
