/* Book-keeping of paged KV memory: which block of 16 positions belongs to whom, and which finished
 * blocks may serve as a prefix of another sequence. Knows block numbers only, never their contents;
 * the leader decides alone, so there is one pool for the whole group. Pure.
 *
 * A block is in one of three places: held by one or more sequences; cached (held by nobody, but its
 * contents are known and may be matched until it is taken, least recently used first); or free. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

enum { KV_BLOCK = 16 };

struct kv_blocks;

/* A published block as its successor knows it. */
struct kv_link {
    int32_t block;       /* the block that stands in the table of cached prefixes */
    uint32_t generation; /* of that block when it was linked */
};

/* One sequence's block table. Zero-initialised; owned by the caller, freed by kv_sequence_free. */
struct kv_sequence {
    int32_t *blocks; /* blocks[p / 16] holds position p */
    int n_blocks;
    int capacity;
    struct kv_link *links; /* of the first n_published blocks */
    int n_published;
};

struct kv_blocks_stats {
    int n_blocks;
    int n_held, n_cached, n_free; /* their sum is n_blocks */
    uint64_t query_tokens;        /* asked of kv_blocks_match since creation */
    uint64_t hit_tokens;          /* found */
};

/* prefix_cache false: nothing is ever published or matched. */
struct kv_blocks *kv_blocks_create(int n_blocks, bool prefix_cache);
void kv_blocks_destroy(struct kv_blocks *pool);

/* Gives an empty sequence the longest chain of cached blocks that tokens[0..n_tokens) begins with,
 * leaving at least one token to compute. Returns the positions found, a multiple of 16. */
int kv_blocks_match(struct kv_blocks *pool, struct kv_sequence *sequence, const int32_t *tokens,
                    int n_tokens);

/* Undoes a match of n_tokens that led to nothing: gives the blocks back, and it does not count. */
void kv_blocks_unmatch(struct kv_blocks *pool, struct kv_sequence *sequence, int n_tokens);

/* Makes the table cover n_positions; false, and no change, when there are not enough blocks. */
bool kv_blocks_extend(struct kv_blocks *pool, struct kv_sequence *sequence, int n_positions);

/* Gives back the blocks past n_positions. Published positions are committed and are never cut. */
void kv_blocks_truncate(struct kv_blocks *pool, struct kv_sequence *sequence, int n_positions);

/* Offers the full blocks among positions 0..n_computed-1, whose KV is exact and whose tokens are
 * committed, as prefixes for others. tokens: the sequence's, from position 0. */
void kv_blocks_publish(struct kv_blocks *pool, struct kv_sequence *sequence, const int32_t *tokens,
                       int n_computed);

/* Gives back everything; the sequence is empty again. */
void kv_blocks_release(struct kv_blocks *pool, struct kv_sequence *sequence);
void kv_sequence_free(struct kv_sequence *sequence); /* after release */

/* Blocks that could be taken now. */
int kv_blocks_available(const struct kv_blocks *pool);
struct kv_blocks_stats kv_blocks_stats(const struct kv_blocks *pool);

/* CHECKs every invariant of the pool; for tests. */
void kv_blocks_check(const struct kv_blocks *pool);
