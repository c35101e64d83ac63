/* KV memory as the CPU backend's files see it. Private to kernels/cpu/. */
#pragma once
#include "kernels/cpu/cpu.h"

struct kv_cache {
    struct backend_head head;
    int n_kv_heads, head_dim, padded;
    size_t head_stride;  /* elements: K (or V) of one head in one block */
    size_t block_stride; /* elements between blocks */
    size_t bytes;
    uint16_t *data;
};

/* K and V of one head: its part of block 0. */
static inline uint16_t *kv_cache_keys(const struct kv_cache *cache, int head) {
    return cache->data + (size_t)head * 2 * cache->head_stride;
}

static inline uint16_t *kv_cache_values(const struct kv_cache *cache, int head) {
    return kv_cache_keys(cache, head) + cache->head_stride;
}

/* Position `slot` (0..15) of a block. */
void kv_cache_write(struct kv_cache *cache, int head, int32_t block, int slot, const float *k,
                    const float *v);
