#include "worker/kv_blocks.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "common/error.h"

enum { NONE = -1 };

struct block {
    int32_t references;
    uint32_t generation;   /* counts publications: a link to an older one no longer matches */
    bool published;
    uint64_t hash;         /* of tokens and parent; only finds candidates */
    struct kv_link parent; /* block NONE: the first of a sequence */
    int32_t tokens[KV_BLOCK];
    int32_t newer, older;  /* neighbours in the list of cached blocks */
    int32_t chain;         /* next in the same bucket */
};

struct kv_blocks {
    bool prefix_cache;
    int n_blocks;
    struct block *blocks;
    int32_t *free; /* a stack */
    int n_free;
    int32_t newest, oldest; /* cached blocks by last use */
    int n_cached;
    int32_t *buckets;
    uint32_t bucket_mask;
    uint64_t query_tokens, hit_tokens;
};

struct kv_blocks *kv_blocks_create(int n_blocks, bool prefix_cache) {
    CHECK(n_blocks > 0);
    struct kv_blocks *pool = xcalloc(1, sizeof *pool);
    pool->prefix_cache = prefix_cache;
    pool->n_blocks = n_blocks;
    pool->blocks = xcalloc((size_t)n_blocks, sizeof *pool->blocks);
    pool->free = xcalloc((size_t)n_blocks, sizeof *pool->free);
    pool->n_free = n_blocks;
    for (int i = 0; i < n_blocks; i++) pool->free[i] = n_blocks - 1 - i; /* block 0 goes first */
    pool->newest = pool->oldest = NONE;
    uint32_t n_buckets = 64;
    while (n_buckets < (uint32_t)n_blocks) n_buckets *= 2;
    pool->bucket_mask = n_buckets - 1;
    pool->buckets = xmalloc(n_buckets * sizeof *pool->buckets);
    memset(pool->buckets, 0xff, n_buckets * sizeof *pool->buckets);
    return pool;
}

void kv_blocks_destroy(struct kv_blocks *pool) {
    if (pool == NULL) return;
    free(pool->blocks);
    free(pool->free);
    free(pool->buckets);
    free(pool);
}

/* --- the list of cached blocks --------------------------------------------------------------- */

static void cached_push(struct kv_blocks *pool, int32_t id) {
    struct block *block = &pool->blocks[id];
    block->newer = NONE;
    block->older = pool->newest;
    if (pool->newest != NONE) pool->blocks[pool->newest].newer = id;
    pool->newest = id;
    if (pool->oldest == NONE) pool->oldest = id;
    pool->n_cached++;
}

static void cached_remove(struct kv_blocks *pool, int32_t id) {
    struct block *block = &pool->blocks[id];
    if (block->newer != NONE) pool->blocks[block->newer].older = block->older;
    else pool->newest = block->older;
    if (block->older != NONE) pool->blocks[block->older].newer = block->newer;
    else pool->oldest = block->newer;
    pool->n_cached--;
}

/* --- the table of published blocks ----------------------------------------------------------- */

static uint64_t hash_of(struct kv_link parent, const int32_t *tokens) {
    uint64_t seed = (uint64_t)(uint32_t)parent.block << 32 | parent.generation;
    return XXH3_64bits_withSeed(tokens, KV_BLOCK * sizeof *tokens, seed);
}

static int32_t *bucket_of(struct kv_blocks *pool, uint64_t hash) {
    return &pool->buckets[hash & pool->bucket_mask];
}

/* Exact: the tokens and the link to the predecessor are compared, so a collision is only a miss. */
static int32_t find_published(struct kv_blocks *pool, struct kv_link parent, const int32_t *tokens) {
    uint64_t hash = hash_of(parent, tokens);
    for (int32_t id = *bucket_of(pool, hash); id != NONE; id = pool->blocks[id].chain) {
        const struct block *block = &pool->blocks[id];
        if (block->hash == hash && block->parent.block == parent.block &&
            block->parent.generation == parent.generation &&
            memcmp(block->tokens, tokens, sizeof block->tokens) == 0) {
            return id;
        }
    }
    return NONE;
}

static void unpublish(struct kv_blocks *pool, int32_t id) {
    struct block *block = &pool->blocks[id];
    int32_t *at = bucket_of(pool, block->hash);
    while (*at != id) at = &pool->blocks[*at].chain;
    *at = block->chain;
    block->published = false;
}

static void publish(struct kv_blocks *pool, int32_t id, struct kv_link parent,
                    const int32_t *tokens) {
    struct block *block = &pool->blocks[id];
    block->published = true;
    block->generation++;
    block->parent = parent;
    block->hash = hash_of(parent, tokens);
    memcpy(block->tokens, tokens, sizeof block->tokens);
    int32_t *bucket = bucket_of(pool, block->hash);
    block->chain = *bucket;
    *bucket = id;
}

/* --- taking and giving back ------------------------------------------------------------------ */

static int32_t take(struct kv_blocks *pool) {
    int32_t id;
    if (pool->n_free > 0) {
        id = pool->free[--pool->n_free];
    } else {
        id = pool->oldest;
        CHECK(id != NONE);
        cached_remove(pool, id);
        unpublish(pool, id);
    }
    pool->blocks[id].references = 1;
    return id;
}

static void hold(struct kv_blocks *pool, int32_t id) {
    if (pool->blocks[id].references++ == 0) cached_remove(pool, id);
}

static void give_back(struct kv_blocks *pool, int32_t id) {
    struct block *block = &pool->blocks[id];
    CHECK(block->references > 0);
    if (--block->references > 0) return;
    if (block->published) cached_push(pool, id);
    else pool->free[pool->n_free++] = id;
}

static void reserve(struct kv_sequence *sequence, int n_blocks) {
    if (n_blocks <= sequence->capacity) return;
    int capacity = sequence->capacity < 8 ? 8 : sequence->capacity;
    while (capacity < n_blocks) capacity *= 2;
    sequence->blocks = xrealloc(sequence->blocks, (size_t)capacity * sizeof *sequence->blocks);
    sequence->links = xrealloc(sequence->links, (size_t)capacity * sizeof *sequence->links);
    sequence->capacity = capacity;
}

static struct kv_link last_link(const struct kv_sequence *sequence) {
    if (sequence->n_published == 0) return (struct kv_link){NONE, 0};
    return sequence->links[sequence->n_published - 1];
}

int kv_blocks_match(struct kv_blocks *pool, struct kv_sequence *sequence, const int32_t *tokens,
                    int n_tokens) {
    CHECK(sequence->n_blocks == 0 && n_tokens > 0);
    pool->query_tokens += (uint64_t)n_tokens;
    int n_full = (n_tokens - 1) / KV_BLOCK;
    reserve(sequence, n_full);
    while (pool->prefix_cache && sequence->n_blocks < n_full) {
        const int32_t *part = tokens + sequence->n_blocks * KV_BLOCK;
        int32_t id = find_published(pool, last_link(sequence), part);
        if (id == NONE) break;
        hold(pool, id);
        sequence->blocks[sequence->n_blocks++] = id;
        sequence->links[sequence->n_published++] =
            (struct kv_link){id, pool->blocks[id].generation};
    }
    int found = sequence->n_blocks * KV_BLOCK;
    pool->hit_tokens += (uint64_t)found;
    return found;
}

void kv_blocks_unmatch(struct kv_blocks *pool, struct kv_sequence *sequence, int n_tokens) {
    pool->query_tokens -= (uint64_t)n_tokens;
    pool->hit_tokens -= (uint64_t)sequence->n_blocks * KV_BLOCK;
    kv_blocks_release(pool, sequence);
}

bool kv_blocks_extend(struct kv_blocks *pool, struct kv_sequence *sequence, int n_positions) {
    int n_blocks = (n_positions + KV_BLOCK - 1) / KV_BLOCK;
    if (n_blocks - sequence->n_blocks > kv_blocks_available(pool)) return false;
    reserve(sequence, n_blocks);
    while (sequence->n_blocks < n_blocks) sequence->blocks[sequence->n_blocks++] = take(pool);
    return true;
}

void kv_blocks_truncate(struct kv_blocks *pool, struct kv_sequence *sequence, int n_positions) {
    CHECK(n_positions >= sequence->n_published * KV_BLOCK);
    int n_blocks = (n_positions + KV_BLOCK - 1) / KV_BLOCK;
    while (sequence->n_blocks > n_blocks) give_back(pool, sequence->blocks[--sequence->n_blocks]);
}

void kv_blocks_publish(struct kv_blocks *pool, struct kv_sequence *sequence, const int32_t *tokens,
                       int n_computed) {
    if (!pool->prefix_cache) return;
    CHECK(n_computed <= sequence->n_blocks * KV_BLOCK);
    while ((sequence->n_published + 1) * KV_BLOCK <= n_computed) {
        const int32_t *part = tokens + sequence->n_published * KV_BLOCK;
        struct kv_link parent = last_link(sequence);
        int32_t id = find_published(pool, parent, part);
        if (id == NONE) { /* otherwise another sequence was first; ours stays private */
            id = sequence->blocks[sequence->n_published];
            publish(pool, id, parent, part);
        }
        sequence->links[sequence->n_published++] =
            (struct kv_link){id, pool->blocks[id].generation};
    }
}

void kv_blocks_release(struct kv_blocks *pool, struct kv_sequence *sequence) {
    /* The last block first: the beginning of a prefix is the last to be evicted. */
    while (sequence->n_blocks > 0) give_back(pool, sequence->blocks[--sequence->n_blocks]);
    sequence->n_published = 0;
}

void kv_sequence_free(struct kv_sequence *sequence) {
    CHECK(sequence->n_blocks == 0);
    free(sequence->blocks);
    free(sequence->links);
    *sequence = (struct kv_sequence){0};
}

int kv_blocks_available(const struct kv_blocks *pool) {
    return pool->n_free + pool->n_cached;
}

struct kv_blocks_stats kv_blocks_stats(const struct kv_blocks *pool) {
    return (struct kv_blocks_stats){
        .n_blocks = pool->n_blocks,
        .n_held = pool->n_blocks - pool->n_free - pool->n_cached,
        .n_cached = pool->n_cached,
        .n_free = pool->n_free,
        .query_tokens = pool->query_tokens,
        .hit_tokens = pool->hit_tokens,
    };
}

void kv_blocks_check(const struct kv_blocks *pool) {
    int n_cached = 0, n_unheld = 0, n_published = 0, n_in_table = 0;
    for (int32_t id = pool->newest; id != NONE; id = pool->blocks[id].older) {
        CHECK(pool->blocks[id].references == 0 && pool->blocks[id].published);
        n_cached++;
    }
    CHECK(n_cached == pool->n_cached);
    for (int i = 0; i < pool->n_blocks; i++) {
        CHECK(pool->blocks[i].references >= 0);
        n_unheld += pool->blocks[i].references == 0;
        n_published += pool->blocks[i].published;
    }
    CHECK(n_unheld == pool->n_free + pool->n_cached);
    for (int i = 0; i < pool->n_free; i++) {
        const struct block *block = &pool->blocks[pool->free[i]];
        CHECK(block->references == 0 && !block->published);
    }
    for (uint32_t b = 0; b <= pool->bucket_mask; b++) {
        for (int32_t id = pool->buckets[b]; id != NONE; id = pool->blocks[id].chain) {
            CHECK(pool->blocks[id].published);
            n_in_table++;
        }
    }
    CHECK(n_in_table == n_published);
}
