/* Shards of every degree: the leaves of all ranks, put together, are the same 8 leaves, and cover
 * every head, column and row exactly once. Exhaustive over small shapes. */
#include "model/shard.h"
#include "tests/unit/test.h"

static struct model_config config_of(int heads, int kv_heads, int intermediate, int vocab) {
    return (struct model_config){.n_heads = heads, .n_kv_heads = kv_heads, .head_dim = 6,
                                 .intermediate = intermediate, .vocab = vocab};
}

static struct shard shard_of(const struct model_config *config, int rank, int degree) {
    struct shard shard = {.degree = -1};
    struct error err;
    if (shard_make(&shard, config, rank, degree, &err) != STATUS_OK) shard.degree = -1;
    return shard;
}

/* Leaf borders straight from the definition in shard.h. */
static int head_border(const struct model_config *config, int leaf) {
    return leaf * config->n_heads / 8;
}

static int inter_border(const struct model_config *config, int leaf) {
    int units = config->intermediate / 32 + (config->intermediate % 32 != 0);
    int border = leaf * units / 8 * 32;
    return border < config->intermediate ? border : config->intermediate;
}

static bool leaves_match(const struct model_config *config, const struct shard *shard) {
    int first = shard->rank * shard->n_leaves;
    for (int i = 0; i <= shard->n_leaves; i++) {
        int head = head_border(config, first + i), column = inter_border(config, first + i);
        if (shard->head_leaf[i] != (head - shard->head_begin) * config->head_dim) return false;
        if (shard->inter_leaf[i] != column - shard->inter_begin) return false;
    }
    return shard->head_begin == head_border(config, first) &&
           shard->head_end == head_border(config, first + shard->n_leaves) &&
           shard->inter_begin == inter_border(config, first) &&
           shard->inter_end == inter_border(config, first + shard->n_leaves);
}

/* The KV heads are exactly those that the query heads read. */
static bool kv_heads_match(const struct model_config *config, const struct shard *shard) {
    int group = config->n_heads / config->n_kv_heads;
    if (shard->head_begin == shard->head_end) return shard->kv_head_begin == shard->kv_head_end;
    return shard->kv_head_begin == shard->head_begin / group &&
           shard->kv_head_end == (shard->head_end - 1) / group + 1 &&
           shard->kv_head_end <= config->n_kv_heads;
}

static bool ranks_cover(const struct model_config *config, int degree) {
    int heads = 0, columns = 0, rows = 0;
    for (int rank = 0; rank < degree; rank++) {
        struct shard s = shard_of(config, rank, degree);
        if (s.degree != degree || s.rank != rank || s.n_leaves * degree != 8) return false;
        if (s.head_begin != heads || s.inter_begin != columns) return false;
        if (s.vocab_begin != rows) return false;
        if (s.vocab_begin % 32 != 0 && s.vocab_begin != config->vocab) return false;
        if (s.vocab_end < s.vocab_begin) return false;
        if (!leaves_match(config, &s) || !kv_heads_match(config, &s)) return false;
        heads = s.head_end;
        columns = s.inter_end;
        rows = s.vocab_end;
    }
    return heads == config->n_heads && columns == config->intermediate && rows == config->vocab;
}

Test(shard, every_head_count) {
    for (int heads = 1; heads <= 64; heads++) {
        for (int kv_heads = 1; kv_heads <= heads; kv_heads++) {
            if (heads % kv_heads != 0) continue;
            struct model_config config = config_of(heads, kv_heads, 96, 320);
            for (int degree = 1; degree <= 8; degree *= 2) {
                cr_assert(ranks_cover(&config, degree), "%d heads, %d KV heads, degree %d", heads,
                          kv_heads, degree);
            }
        }
    }
}

Test(shard, every_width_and_vocabulary) {
    for (int size = 1; size <= 1200; size++) {
        struct model_config config = config_of(14, 2, size, size);
        for (int degree = 1; degree <= 8; degree *= 2) {
            cr_assert(ranks_cover(&config, degree), "width and vocabulary %d, degree %d", size,
                      degree);
        }
    }
}

Test(shard, large_sizes_do_not_overflow) {
    struct model_config config = config_of(4096, 4096, 1 << 20, 1 << 24);
    config.head_dim = 1024;
    for (int degree = 1; degree <= 8; degree *= 2) cr_assert(ranks_cover(&config, degree));
}

Test(shard, fourteen_heads_over_two_kv_heads) {
    struct model_config config = config_of(14, 2, 4864, 151936);
    static const int expected[9] = {0, 1, 3, 5, 7, 8, 10, 12, 14};
    for (int rank = 0; rank < 8; rank++) {
        struct shard s = shard_of(&config, rank, 8);
        cr_assert_eq(s.head_begin, expected[rank]);
        cr_assert_eq(s.head_end, expected[rank + 1]);
        cr_assert_eq(s.kv_head_begin, rank < 4 ? 0 : 1);
        cr_assert_eq(s.kv_head_end, rank < 4 ? 1 : 2);
    }
}

Test(shard, refuses_other_degrees_and_ranks) {
    struct model_config config = config_of(8, 8, 64, 64);
    struct shard shard;
    struct error err;
    static const int degrees[] = {-1, 0, 3, 5, 6, 7, 9, 16};
    for (size_t i = 0; i < sizeof degrees / sizeof *degrees; i++) {
        cr_assert_eq(shard_make(&shard, &config, 0, degrees[i], &err), STATUS_INVALID_ARGUMENT);
    }
    cr_assert_eq(shard_make(&shard, &config, -1, 2, &err), STATUS_INVALID_ARGUMENT);
    cr_assert_eq(shard_make(&shard, &config, 2, 2, &err), STATUS_INVALID_ARGUMENT);
    cr_assert_str_eq(err.text, "tensor-parallel rank is 2; expected 0 to 1");
}
