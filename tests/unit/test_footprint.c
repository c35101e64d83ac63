/* Footprints: hand-counted sums, and how they behave over degrees and formats. */
#include "model/footprint.h"
#include "tests/unit/test.h"

/* 216 M: 12 layers, 1024 wide, ffn 3072, 16/8 heads of 64, vocabulary 32000, untied. */
static struct model_config model_216m(void) {
    return (struct model_config){.hidden = 1024, .n_layers = 12, .n_heads = 16, .n_kv_heads = 8,
                                 .head_dim = 64, .intermediate = 3072, .vocab = 32000};
}

static struct footprint footprint(const struct model_config *config, int rank, int degree,
                                  enum dtype weights, int rows) {
    struct shard shard;
    struct error err;
    CHECK(shard_make(&shard, config, rank, degree, &err) == STATUS_OK);
    return footprint_of(config, &shard, weights, rows, rows);
}

enum { MATRIX_216M = 12 * (2048 * 1024 + 1024 * 1024 + 3 * 3072 * 1024) + 32000 * 1024 };

Test(footprint, aligned_shapes_have_no_padding) {
    struct model_config config = model_216m();
    struct footprint bf16 = footprint(&config, 0, 1, DTYPE_BF16, 8);
    size_t norms = (12 * 2 + 1) * 1024 * 4;
    cr_assert_eq(bf16.weights_bytes, 2 * (size_t)MATRIX_216M + norms);
    cr_assert_eq(bf16.kv_bytes_per_block, 2 * 16 * 8 * 64 * 2 * 12);
    size_t row = 2 * 1024 + 2048 + 1024 + 3 * 3072 + 1024 + 32000;
    cr_assert_eq(bf16.scratch_bytes, 8 * row * 4);
}

Test(footprint, int8_adds_a_scale_and_a_sum_per_row_and_leaf) {
    struct model_config config = model_216m();
    size_t norms = (12 * 2 + 1) * 1024 * 4;
    size_t column_rows = 12 * (2048 + 2 * 3072) + 32000, tree_rows = 12 * 2 * 1024;
    struct footprint whole = footprint(&config, 0, 1, DTYPE_I8, 8);
    cr_assert_eq(whole.weights_bytes,
                 (size_t)MATRIX_216M + norms + 8 * (column_rows + 8 * tree_rows));
}

Test(footprint, biases_and_head_norms_are_counted) {
    struct model_config config = model_216m();
    size_t plain = footprint(&config, 0, 1, DTYPE_BF16, 1).weights_bytes;
    config.qkv_bias = true;
    size_t biased = footprint(&config, 0, 1, DTYPE_BF16, 1).weights_bytes;
    cr_assert_eq(biased - plain, 12 * 2048 * 4);
    config.o_bias = true;
    cr_assert_eq(footprint(&config, 0, 1, DTYPE_BF16, 1).weights_bytes - biased, 12 * 1024 * 4);
    config = model_216m();
    config.qk_norm = true;
    cr_assert_eq(footprint(&config, 0, 1, DTYPE_BF16, 1).weights_bytes - plain, 12 * 2 * 64 * 4);
}

Test(footprint, odd_shapes_are_padded) {
    /* One layer, hidden 20, one head of 6, ffn 40, vocabulary 33: every edge is ragged. */
    struct model_config config = {.hidden = 20, .n_layers = 1, .n_heads = 1, .n_kv_heads = 1,
                                  .head_dim = 6, .intermediate = 40, .vocab = 33};
    size_t qkv = 32 * 64, o = 32 * 64, gate_up = 80 * 64, head = 48 * 64;
    size_t down = 32 * 128; /* 40 columns are two leaves, 32 and 8, padded to 64 each */
    size_t norms = 3 * 20 * 4;
    cr_assert_eq(footprint(&config, 0, 1, DTYPE_BF16, 1).weights_bytes,
                 2 * (qkv + o + gate_up + down + head) + norms);
}

Test(footprint, degrees_share_the_weights) {
    struct model_config config = model_216m();
    size_t whole = footprint(&config, 0, 1, DTYPE_BF16, 1).weights_bytes;
    size_t norms = (12 * 2 + 1) * 1024 * 4;
    for (int degree = 2; degree <= 8; degree *= 2) {
        size_t sum = 0, blocks = 0;
        for (int rank = 0; rank < degree; rank++) {
            struct footprint part = footprint(&config, rank, degree, DTYPE_BF16, 1);
            sum += part.weights_bytes - norms;
            blocks += part.kv_bytes_per_block;
        }
        cr_assert_eq(sum, whole - norms, "degree %d", degree);
        cr_assert_eq(blocks, 2 * 16 * 8 * 64 * 2 * 12, "degree %d", degree);
    }
}

Test(footprint, a_rank_without_heads_holds_no_cache) {
    struct model_config config = model_216m();
    config.n_heads = config.n_kv_heads = 2;
    config.intermediate = 64;
    struct footprint empty = footprint(&config, 0, 8, DTYPE_BF16, 1);
    cr_assert_eq(empty.kv_bytes_per_block, 0);
    size_t head = 4000 * 1024 * 2, norms = (12 * 2 + 1) * 1024 * 4;
    cr_assert_eq(empty.weights_bytes, head + norms);
}

/* --- drafts --------------------------------------------------------------------------------- */

static struct footprint draft(const struct model_config *config, int rank, int degree, int rows,
                              bool owner, int width) {
    struct shard shard;
    struct error err;
    CHECK(shard_make(&shard, config, rank, degree, &err) == STATUS_OK);
    return footprint_of_draft(config, &shard, DTYPE_BF16, rows, 1, owner, width);
}

Test(footprint, a_draft_of_exact_passes_is_as_any_model) {
    struct model_config config = model_216m();
    for (int degree = 1; degree <= 8; degree *= 2) {
        struct footprint a = footprint(&config, degree - 1, degree, DTYPE_BF16, 1);
        struct footprint b = draft(&config, degree - 1, degree, 1, false, 1);
        cr_assert_eq(a.weights_bytes, b.weights_bytes);
        cr_assert_eq(a.kv_bytes_per_block, b.kv_bytes_per_block);
        cr_assert_eq(a.scratch_bytes, b.scratch_bytes);
    }
}

/* 12 layers on 4 ranks: 0 to rank 0, 1..10 in turn (3, 3, 2, 2), 11 to rank 3. */
Test(footprint, owners_hold_whole_layers_of_attention) {
    static const int layers[] = {4, 3, 2, 3};
    struct model_config config = model_216m();
    size_t attention = (2048 * 1024 + 1024 * 1024) * 2, norms = (12 * 2 + 1) * 1024 * 4;
    size_t mlp = 12 * 3 * 3072 / 4 * 1024 * 2, head = 8000 * 1024 * 2;
    for (int rank = 0; rank < 4; rank++) {
        struct footprint part = draft(&config, rank, 4, 1, true, 4);
        size_t n_layers = (size_t)layers[rank];
        cr_assert_eq(part.weights_bytes, n_layers * attention + mlp + head + norms, "rank %d", rank);
        cr_assert_eq(part.kv_bytes_per_block, n_layers * 2 * 16 * 8 * 64 * 2, "rank %d", rank);
    }
}

Test(footprint, owners_hold_biases_and_head_norms_of_their_layers) {
    struct model_config config = model_216m();
    size_t plain = draft(&config, 2, 4, 1, true, 4).weights_bytes;
    config.qkv_bias = config.qk_norm = true; /* at two layers */
    size_t more = draft(&config, 2, 4, 1, true, 4).weights_bytes - plain;
    cr_assert_eq(more, 2 * (2048 + 2 * 64) * 4);
}

/* One row more of scratch. Owners have whole rows of qkv and heads; what is exchanged is a slot for
 * each layer in whole rounds of ranks, or a root for each layer and rank. */
Test(footprint, groups_of_layers_need_scratch) {
    struct model_config config = model_216m();
    size_t hidden = 1024, heads = 1024, qkv = 2048, inter = 3072;
    const struct {
        int degree, width;
        bool owner;
        size_t slots;
    } cases[] = {{1, 1, true, 0},  {1, 4, true, 4},  {2, 4, true, 4},  {4, 2, true, 4},
                 {4, 4, true, 4},  {8, 4, true, 8},  {1, 4, false, 4}, {2, 4, false, 8},
                 {4, 2, false, 8}, {2, 1, false, 0}, {2, 3, true, 4},  {2, 0, true, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int degree = cases[i].degree, width = cases[i].width;
        bool owner = cases[i].owner;
        size_t n = (size_t)degree, share = owner ? 1 : n;
        size_t row = draft(&config, 0, degree, 2, owner, width).scratch_bytes -
                     draft(&config, 0, degree, 1, owner, width).scratch_bytes;
        size_t roots = degree > 1 ? n * hidden : 0;
        size_t expected = 2 * hidden + (qkv + heads) / share + 3 * inter / n + hidden + roots +
                          cases[i].slots * hidden;
        cr_assert_eq(row, expected * 4, "%d ranks, width %d, owner %d: %zu, not %zu", degree, width,
                     owner, row, expected * 4);
    }
}
