/* The pool of KV blocks against a model that is slow and plain: every block with its content
 * written out. KV memory itself is played too: each position holds a fingerprint of all tokens up
 * to it, so that a wrong match or a block given to two shows as a wrong fingerprint. */
#include "tests/unit/test.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "common/error.h"
#include "tests/reference/random.h"
#include "worker/kv_blocks.h"

enum { MAX_BLOCKS = 40, MAX_SEQUENCES = 6, MAX_TOKENS = 200, N_TEMPLATES = 3 };

struct model_block {
    int references;
    uint64_t serial; /* of its publication, 0: not published */
    uint64_t parent; /* serial of the predecessor, 0: first */
    int32_t tokens[KV_BLOCK];
    uint64_t last_use; /* grows; of blocks held by nobody */
    uint64_t memory[KV_BLOCK];
};

struct model_sequence {
    bool live;
    struct kv_sequence real;
    int32_t tokens[MAX_TOKENS];
    int n_tokens, n_computed, n_published;
    uint64_t last_serial; /* of its last published block */
};

struct world {
    struct test_random random;
    struct kv_blocks *pool;
    bool prefix_cache;
    int n_blocks;
    struct model_block blocks[MAX_BLOCKS];
    struct model_sequence sequences[MAX_SEQUENCES];
    int32_t templates[N_TEMPLATES][MAX_TOKENS];
    uint64_t n_serials, clock;
    uint64_t query_tokens, hit_tokens, n_evictions, n_duplicates;
    const char *wrong; /* the first thing found wrong */
};

static void expect(struct world *w, bool holds, const char *what) {
    if (!holds && w->wrong == NULL) w->wrong = what;
}

static uint64_t fingerprint(const int32_t *tokens, int n) {
    uint64_t hash = 1469598103934665603u;
    for (int i = 0; i < n; i++) hash = (hash ^ (uint64_t)(tokens[i] + 1)) * 1099511628211u;
    return hash;
}

/* --- the model ------------------------------------------------------------------------------- */

static int model_find(const struct world *w, uint64_t parent, const int32_t *tokens) {
    for (int i = 0; i < w->n_blocks && w->prefix_cache; i++) {
        const struct model_block *block = &w->blocks[i];
        if (block->serial != 0 && block->parent == parent &&
            memcmp(block->tokens, tokens, sizeof block->tokens) == 0) {
            return i;
        }
    }
    return -1;
}

static int model_count(const struct world *w, bool cached) {
    int n = 0;
    for (int i = 0; i < w->n_blocks; i++) {
        n += w->blocks[i].references == 0 && (w->blocks[i].serial != 0) == cached;
    }
    return n;
}

/* Free blocks go first, in any order; then the least recently used cached one. */
static void model_take(struct world *w, int32_t id) {
    struct model_block *block = &w->blocks[id];
    expect(w, block->references == 0, "a block in use was given away");
    if (model_count(w, false) > 0) {
        expect(w, block->serial == 0, "a cached block was evicted while others were free");
    } else {
        for (int i = 0; i < w->n_blocks; i++) {
            const struct model_block *other = &w->blocks[i];
            if (other->references > 0) continue;
            expect(w, other->last_use >= block->last_use, "not the least recently used block");
        }
        w->n_evictions++;
    }
    block->references = 1;
    block->serial = 0;
}

static void model_give_back(struct world *w, int32_t id) {
    if (--w->blocks[id].references == 0) w->blocks[id].last_use = ++w->clock;
}

/* --- operations ------------------------------------------------------------------------------ */

static void make_tokens(struct world *w, struct model_sequence *s, int from) {
    const int32_t *template = w->templates[random_below(&w->random, N_TEMPLATES)];
    int common = random_below(&w->random, 130);
    if (from == 0) s->n_tokens = 1 + random_below(&w->random, MAX_TOKENS);
    for (int i = from; i < s->n_tokens; i++) {
        s->tokens[i] = i < common ? template[i] : random_below(&w->random, 2);
    }
}

static void start(struct world *w, struct model_sequence *s) {
    memset(s, 0, sizeof *s);
    s->live = true;
    make_tokens(w, s, 0);
    int found = kv_blocks_match(w->pool, &s->real, s->tokens, s->n_tokens);
    int n = 0;
    while ((n + 1) * KV_BLOCK < s->n_tokens) {
        int id = model_find(w, s->last_serial, s->tokens + n * KV_BLOCK);
        if (id < 0) break;
        expect(w, n < s->real.n_blocks && s->real.blocks[n] == id, "another block was matched");
        w->blocks[id].references++;
        s->last_serial = w->blocks[id].serial;
        n++;
    }
    expect(w, found == n * KV_BLOCK && s->real.n_blocks == n, "not the longest prefix");
    s->n_computed = found;
    s->n_published = n;
    w->query_tokens += (uint64_t)s->n_tokens;
    w->hit_tokens += (uint64_t)found;
}

static void compute(struct world *w, struct model_sequence *s) {
    int target = s->n_computed + random_below(&w->random, 40);
    if (target > s->n_tokens) target = s->n_tokens;
    int had = s->real.n_blocks, needed = (target + KV_BLOCK - 1) / KV_BLOCK;
    bool fits = needed - had <= model_count(w, true) + model_count(w, false);
    bool extended = kv_blocks_extend(w->pool, &s->real, target);
    expect(w, extended == fits, "extend misjudges the room");
    if (!extended) {
        expect(w, s->real.n_blocks == had, "a failed extend has changed the table");
        return;
    }
    for (int i = had; i < s->real.n_blocks; i++) model_take(w, s->real.blocks[i]);
    for (int p = s->n_computed; p < target; p++) {
        w->blocks[s->real.blocks[p / KV_BLOCK]].memory[p % KV_BLOCK] =
            fingerprint(s->tokens, p + 1);
    }
    if (target > s->n_computed) s->n_computed = target;
}

static void publish(struct world *w, struct model_sequence *s) {
    int n = s->n_computed == 0 ? 0 : random_below(&w->random, s->n_computed + 1);
    kv_blocks_publish(w->pool, &s->real, s->tokens, n);
    while (w->prefix_cache && (s->n_published + 1) * KV_BLOCK <= n) {
        const int32_t *part = s->tokens + s->n_published * KV_BLOCK;
        int id = model_find(w, s->last_serial, part);
        if (id < 0) {
            id = s->real.blocks[s->n_published];
            w->blocks[id].serial = ++w->n_serials;
            w->blocks[id].parent = s->last_serial;
            memcpy(w->blocks[id].tokens, part, sizeof w->blocks[id].tokens);
        } else {
            w->n_duplicates++;
        }
        s->last_serial = w->blocks[id].serial;
        s->n_published++;
    }
}

/* Cuts what is not committed and goes on with other tokens, as after a rejected draft. */
static void cut(struct world *w, struct model_sequence *s) {
    int least = s->n_published * KV_BLOCK;
    int n = least + random_below(&w->random, s->n_tokens - least + 1);
    int had = s->real.n_blocks, keep = (n + KV_BLOCK - 1) / KV_BLOCK;
    for (int i = had - 1; i >= keep; i--) model_give_back(w, s->real.blocks[i]);
    kv_blocks_truncate(w->pool, &s->real, n);
    expect(w, s->real.n_blocks == (had < keep ? had : keep), "truncate keeps a wrong number");
    if (s->n_computed > n) s->n_computed = n;
    if (n > 0) make_tokens(w, s, s->n_computed > 0 ? s->n_computed : n);
}

static void release(struct world *w, struct model_sequence *s) {
    for (int i = s->real.n_blocks - 1; i >= 0; i--) model_give_back(w, s->real.blocks[i]);
    kv_blocks_release(w->pool, &s->real);
    expect(w, s->real.n_blocks == 0, "a released sequence holds blocks");
    kv_sequence_free(&s->real);
    s->live = false;
}

/* --- what must hold -------------------------------------------------------------------------- */

static void check_memory(struct world *w) {
    for (int i = 0; i < MAX_SEQUENCES; i++) {
        struct model_sequence *s = &w->sequences[i];
        for (int p = 0; s->live && p < s->n_computed; p++) {
            uint64_t value = w->blocks[s->real.blocks[p / KV_BLOCK]].memory[p % KV_BLOCK];
            expect(w, value == fingerprint(s->tokens, p + 1), "KV of other tokens");
        }
    }
}

static void check_stats(struct world *w) {
    struct kv_blocks_stats stats = kv_blocks_stats(w->pool);
    int n_cached = model_count(w, true), n_free = model_count(w, false);
    expect(w, stats.n_blocks == w->n_blocks, "n_blocks");
    expect(w, stats.n_cached == n_cached && stats.n_free == n_free, "cached or free blocks");
    expect(w, stats.n_held == w->n_blocks - n_cached - n_free, "held blocks");
    expect(w, kv_blocks_available(w->pool) == n_cached + n_free, "available blocks");
    expect(w, stats.query_tokens == w->query_tokens, "query_tokens");
    expect(w, stats.hit_tokens == w->hit_tokens, "hit_tokens");
}

static void step(struct world *w) {
    struct model_sequence *s = &w->sequences[random_below(&w->random, MAX_SEQUENCES)];
    int dice = random_below(&w->random, 100);
    if (!s->live) start(w, s);
    else if (dice < 50) compute(w, s);
    else if (dice < 80) publish(w, s);
    else if (dice < 90) cut(w, s);
    else release(w, s);
    kv_blocks_check(w->pool);
    check_stats(w);
}

static void world_init(struct world *w, uint64_t seed, bool prefix_cache) {
    memset(w, 0, sizeof *w);
    w->random.state = seed;
    w->n_blocks = 1 + random_below(&w->random, MAX_BLOCKS);
    w->prefix_cache = prefix_cache;
    w->pool = kv_blocks_create(w->n_blocks, prefix_cache);
    for (int t = 0; t < N_TEMPLATES; t++) {
        for (int i = 0; i < MAX_TOKENS; i++) w->templates[t][i] = random_below(&w->random, 2);
    }
}

static void world_end(struct world *w) {
    for (int i = 0; i < MAX_SEQUENCES; i++) {
        if (w->sequences[i].live) release(w, &w->sequences[i]);
    }
    expect(w, kv_blocks_available(w->pool) == w->n_blocks, "blocks were lost");
    kv_blocks_check(w->pool);
    kv_blocks_destroy(w->pool);
}

static struct world world; /* too large for a stack */

Test(kv_blocks, agrees_with_the_model) {
    uint64_t evictions = 0, duplicates = 0, hits = 0;
    for (uint64_t seed = 1; seed <= 400; seed++) {
        world_init(&world, seed, true);
        for (int i = 0; i < 1500 && world.wrong == NULL; i++) {
            step(&world);
            if (i % 16 == 0) check_memory(&world);
        }
        check_memory(&world);
        world_end(&world);
        if (world.wrong != NULL) printf("seed %llu: %s\n", (unsigned long long)seed, world.wrong);
        cr_assert_null(world.wrong, "seed %llu: %s", (unsigned long long)seed, world.wrong);
        evictions += world.n_evictions;
        duplicates += world.n_duplicates;
        hits += world.hit_tokens;
    }
    /* The random operations reach what they are meant to reach. */
    cr_assert(evictions > 10000 && duplicates > 1000 && hits > 100000, "%llu %llu %llu",
              (unsigned long long)evictions, (unsigned long long)duplicates,
              (unsigned long long)hits);
}

Test(kv_blocks, without_prefix_cache_nothing_is_found) {
    for (uint64_t seed = 1; seed <= 10; seed++) {
        world_init(&world, seed, false);
        for (int i = 0; i < 1000 && world.wrong == NULL; i++) step(&world);
        check_memory(&world);
        cr_assert(kv_blocks_stats(world.pool).n_cached == 0);
        world_end(&world);
        cr_assert_null(world.wrong, "seed %llu: %s", (unsigned long long)seed, world.wrong);
        cr_assert(world.hit_tokens == 0);
    }
}

/* --- the cases by hand ----------------------------------------------------------------------- */

/* A finished sequence of n tokens: matched, computed, published, released. */
static int visit(struct kv_blocks *pool, const int32_t *tokens, int n) {
    struct kv_sequence sequence = {0};
    int found = kv_blocks_match(pool, &sequence, tokens, n);
    CHECK(kv_blocks_extend(pool, &sequence, n));
    kv_blocks_publish(pool, &sequence, tokens, n);
    kv_blocks_release(pool, &sequence);
    kv_sequence_free(&sequence);
    kv_blocks_check(pool);
    return found;
}

static int look(struct kv_blocks *pool, const int32_t *tokens, int n) {
    struct kv_sequence sequence = {0};
    int found = kv_blocks_match(pool, &sequence, tokens, n);
    kv_blocks_release(pool, &sequence);
    kv_sequence_free(&sequence);
    return found;
}

Test(kv_blocks, one_token_is_always_left_to_compute) {
    struct kv_blocks *pool = kv_blocks_create(8, true);
    int32_t tokens[3 * KV_BLOCK + 1] = {0};
    cr_assert_eq(visit(pool, tokens, 3 * KV_BLOCK), 0);
    cr_assert_eq(look(pool, tokens, 1), 0);
    cr_assert_eq(look(pool, tokens, KV_BLOCK), 0);
    cr_assert_eq(look(pool, tokens, KV_BLOCK + 1), KV_BLOCK);
    cr_assert_eq(look(pool, tokens, 3 * KV_BLOCK), 2 * KV_BLOCK);
    cr_assert_eq(look(pool, tokens, 3 * KV_BLOCK + 1), 3 * KV_BLOCK);
    kv_blocks_destroy(pool);
}

Test(kv_blocks, only_the_same_place_after_the_same_tokens_matches) {
    struct kv_blocks *pool = kv_blocks_create(8, true);
    int32_t a[3 * KV_BLOCK] = {0}, b[3 * KV_BLOCK] = {0};
    b[0] = 1; /* the second block is the same text after another beginning */
    visit(pool, a, 3 * KV_BLOCK);
    cr_assert_eq(look(pool, b, 3 * KV_BLOCK), 0);
    for (int i = 0; i < 2 * KV_BLOCK; i++) {
        int32_t c[3 * KV_BLOCK] = {0};
        c[i] = 7;
        cr_assert_eq(look(pool, c, 3 * KV_BLOCK), i / KV_BLOCK * KV_BLOCK, "token %d differs", i);
    }
    kv_blocks_destroy(pool);
}

/* The beginning of a prefix outlives its end, and what was used later outlives what was not. */
Test(kv_blocks, the_least_recently_used_goes_first) {
    struct kv_blocks *pool = kv_blocks_create(6, true);
    int32_t a[3 * KV_BLOCK + 1] = {0}, b[3 * KV_BLOCK + 1] = {1}, c[2 * KV_BLOCK] = {2};
    visit(pool, a, 3 * KV_BLOCK);
    visit(pool, b, 3 * KV_BLOCK);
    cr_assert_eq(kv_blocks_stats(pool).n_free, 0);
    cr_assert_eq(look(pool, a, 3 * KV_BLOCK + 1), 3 * KV_BLOCK); /* now b is the older one */
    visit(pool, c, 2 * KV_BLOCK);
    cr_assert_eq(look(pool, b, 3 * KV_BLOCK + 1), KV_BLOCK);
    cr_assert_eq(look(pool, a, 3 * KV_BLOCK + 1), 3 * KV_BLOCK);
    kv_blocks_destroy(pool);
}

/* Two compute the same prompt at once; the second goes on from the first one's published block.
 * When that is evicted and its number is published again with other content, the second's later
 * blocks must not be found behind the newcomer. */
Test(kv_blocks, a_stale_link_never_matches) {
    struct kv_blocks *pool = kv_blocks_create(4, true);
    int32_t a[2 * KV_BLOCK + 1] = {0};
    struct kv_sequence first = {0}, second = {0}, third = {0};
    kv_blocks_match(pool, &first, a, KV_BLOCK);
    kv_blocks_match(pool, &second, a, 2 * KV_BLOCK);
    cr_assert(kv_blocks_extend(pool, &first, KV_BLOCK));
    cr_assert(kv_blocks_extend(pool, &second, 2 * KV_BLOCK));
    kv_blocks_publish(pool, &first, a, KV_BLOCK);
    kv_blocks_publish(pool, &second, a, KV_BLOCK); /* a duplicate: linked to the first one's */
    int32_t shared = first.blocks[0];
    cr_assert_neq(second.blocks[0], shared);
    kv_blocks_release(pool, &first);
    cr_assert(kv_blocks_extend(pool, &third, 2 * KV_BLOCK)); /* evicts it */
    int32_t other[2 * KV_BLOCK];
    for (int i = 0; i < 2 * KV_BLOCK; i++) other[i] = 5;
    int at = third.blocks[0] == shared ? 0 : 1;
    cr_assert_eq(third.blocks[at], shared);
    kv_blocks_publish(pool, &third, other, 2 * KV_BLOCK);
    kv_blocks_publish(pool, &second, a, 2 * KV_BLOCK); /* behind a block that is gone */
    kv_blocks_check(pool);
    cr_assert_eq(look(pool, a, 2 * KV_BLOCK + 1), 0);
    int32_t mixed[2 * KV_BLOCK + 1] = {0};
    memcpy(mixed, other, KV_BLOCK * sizeof *mixed);
    cr_assert_eq(look(pool, mixed, 2 * KV_BLOCK + 1), KV_BLOCK);
    kv_blocks_release(pool, &second);
    kv_blocks_release(pool, &third);
    kv_sequence_free(&first);
    kv_sequence_free(&second);
    kv_sequence_free(&third);
    cr_assert_eq(kv_blocks_available(pool), 4);
    kv_blocks_destroy(pool);
}

Test(kv_blocks, extend_takes_all_or_nothing) {
    struct kv_blocks *pool = kv_blocks_create(3, true);
    struct kv_sequence a = {0}, b = {0};
    cr_assert(kv_blocks_extend(pool, &a, KV_BLOCK + 1));
    cr_assert_eq(a.n_blocks, 2);
    cr_assert_not(kv_blocks_extend(pool, &b, KV_BLOCK + 1));
    cr_assert_eq(b.n_blocks, 0);
    cr_assert_eq(kv_blocks_available(pool), 1);
    cr_assert(kv_blocks_extend(pool, &a, 1), "what is covered already stays");
    cr_assert_eq(a.n_blocks, 2);
    kv_blocks_truncate(pool, &a, 0);
    cr_assert_eq(kv_blocks_available(pool), 3);
    kv_sequence_free(&a);
    kv_sequence_free(&b);
    kv_blocks_destroy(pool);
}
