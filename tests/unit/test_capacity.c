/* From memory to KV blocks: the arithmetic around each edge, with the figures of the footprint. */
#include "tests/unit/test.h"

#include <string.h>

#include "kernels/backend.h"
#include "worker/capacity.h"

enum { MIB = 1 << 20, SEQUENCES = 8, CONTEXT = 1000, CONTEXT_BLOCKS = 63 };

/* One rank of `degree`, with much memory; what a test wants otherwise it writes over. */
struct place {
    struct model_config config;
    struct shard shard;
    struct capacity_request request;
    struct capacity plenty; /* what comes of it */
};

static void place_init(struct place *place, int rank, int degree) {
    struct error err;
    memset(place, 0, sizeof *place);
    CHECK(model_config_load(&place->config, TANDEM_SOURCE_DIR "/assets/models/llama-tale-target",
                            &err) == STATUS_OK);
    CHECK(shard_make(&place->shard, &place->config, rank, degree, &err) == STATUS_OK);
    place->request = (struct capacity_request){
        .config = &place->config,
        .shard = &place->shard,
        .weights = DTYPE_BF16,
        .max_sequences = SEQUENCES,
        .max_step_tokens = 256,
        .max_context = CONTEXT,
        .memory_bytes = (int64_t)4096 * MIB,
    };
    CHECK(capacity_compute(&place->plenty, &place->request, &err) == STATUS_OK);
}

static int64_t block_bytes(const struct place *place) {
    return place->plenty.kv_bytes / place->plenty.n_blocks;
}

/* Memory that is enough for this many KV blocks and nothing more. */
static int64_t memory_for(const struct place *place, int n_blocks) {
    int64_t need = place->plenty.weights_bytes + place->plenty.scratch_bytes +
                   n_blocks * block_bytes(place);
    int64_t memory = need;
    while (memory - memory / 100 * 10 < need) memory++;
    return memory;
}

Test(capacity, rows_leave_room_for_prefill) {
    cr_assert_eq(capacity_rows(512, 64), 512);
    cr_assert_eq(capacity_rows(80, 64), 80);
    cr_assert_eq(capacity_rows(79, 64), 80);
    cr_assert_eq(capacity_rows(1, 64), 80);
}

Test(capacity, no_more_than_all_sequences_can_use) {
    struct place place;
    place_init(&place, 0, 1);
    cr_assert_eq(place.plenty.wanted_blocks, SEQUENCES * CONTEXT_BLOCKS);
    cr_assert_eq(place.plenty.n_blocks, place.plenty.wanted_blocks);
    /* 8 layers, K and V, 4 heads of 32, 16 positions, bf16 */
    cr_assert_eq(block_bytes(&place), (int64_t)8 * 2 * 4 * 32 * 16 * 2);
    cr_assert(place.plenty.weights_bytes > 14 * MIB && place.plenty.scratch_bytes > 0);
    cr_assert_eq(place.plenty.reserve_bytes, place.request.memory_bytes / 100 * 10);
}

Test(capacity, as_many_as_fit) {
    struct place place;
    struct capacity out;
    struct error err;
    place_init(&place, 0, 1);
    for (int n = CONTEXT_BLOCKS; n <= place.plenty.wanted_blocks; n += 37) {
        place.request.memory_bytes = memory_for(&place, n);
        cr_assert_eq(capacity_compute(&out, &place.request, &err), STATUS_OK, "%s", err.text);
        cr_assert_eq(out.n_blocks, n);
        cr_assert_eq(out.kv_bytes, n * block_bytes(&place));
        int64_t sum = out.weights_bytes + out.scratch_bytes + out.reserve_bytes + out.kv_bytes;
        cr_assert(sum <= out.memory_bytes);
    }
}

Test(capacity, one_sequence_at_full_context_at_least) {
    struct place place;
    struct capacity out;
    struct error err;
    place_init(&place, 0, 1);
    place.request.memory_bytes = memory_for(&place, CONTEXT_BLOCKS);
    cr_assert_eq(capacity_compute(&out, &place.request, &err), STATUS_OK, "%s", err.text);
    place.request.memory_bytes = memory_for(&place, CONTEXT_BLOCKS - 1);
    cr_assert_eq(capacity_compute(&out, &place.request, &err), STATUS_RESOURCE_EXHAUSTED);
    cr_assert_not_null(strstr(err.text, "--max-context"), "%s", err.text);
    place.request.memory_bytes = MIB; /* not even the weights */
    cr_assert_eq(capacity_compute(&out, &place.request, &err), STATUS_RESOURCE_EXHAUSTED);
    place.request.memory_bytes = 0;
    cr_assert_eq(capacity_compute(&out, &place.request, &err), STATUS_RESOURCE_EXHAUSTED);
}

Test(capacity, a_budget_is_kept) {
    struct place place;
    struct capacity out;
    struct error err;
    place_init(&place, 0, 1);
    place.request.kv_budget_bytes = 100 * block_bytes(&place) + block_bytes(&place) - 1;
    cr_assert_eq(capacity_compute(&out, &place.request, &err), STATUS_OK, "%s", err.text);
    cr_assert_eq(out.n_blocks, 100);
    /* More than all sequences can use, since somebody said so: it holds prefixes. */
    int many = place.plenty.wanted_blocks + 100;
    place.request.kv_budget_bytes = many * block_bytes(&place);
    cr_assert_eq(capacity_compute(&out, &place.request, &err), STATUS_OK, "%s", err.text);
    cr_assert_eq(out.n_blocks, many);
    place.request.kv_budget_bytes = CONTEXT_BLOCKS * block_bytes(&place) - 1;
    cr_assert_eq(capacity_compute(&out, &place.request, &err), STATUS_RESOURCE_EXHAUSTED);
    cr_assert_not_null(strstr(err.text, "raise --kv-budget"), "%s", err.text);
}

/* Raising a budget that is more than there is would be the wrong advice. */
Test(capacity, a_budget_beyond_the_memory) {
    struct place place;
    struct capacity out;
    struct error err;
    place_init(&place, 0, 1);
    place.request.memory_bytes = memory_for(&place, 100);
    place.request.kv_budget_bytes = 100 * block_bytes(&place);
    cr_assert_eq(capacity_compute(&out, &place.request, &err), STATUS_OK, "%s", err.text);
    place.request.kv_budget_bytes = 101 * block_bytes(&place);
    cr_assert_eq(capacity_compute(&out, &place.request, &err), STATUS_RESOURCE_EXHAUSTED);
    cr_assert_null(strstr(err.text, "raise"), "%s", err.text);
    cr_assert_not_null(strstr(err.text, "lower --kv-budget"), "%s", err.text);
    cr_assert(out.n_blocks > 0);
}

Test(capacity, more_ranks_and_int8_leave_more) {
    struct place one, four;
    place_init(&one, 0, 1);
    place_init(&four, 3, 4);
    cr_assert(four.plenty.weights_bytes < one.plenty.weights_bytes);
    cr_assert(block_bytes(&four) < block_bytes(&one));
    struct capacity out;
    struct error err;
    one.request.weights = DTYPE_I8;
    cr_assert_eq(capacity_compute(&out, &one.request, &err), STATUS_OK, "%s", err.text);
    cr_assert(out.weights_bytes < one.plenty.weights_bytes);
}

/* 4 heads on 8 ranks: every other rank has none, holds no KV and sets no limit. */
Test(capacity, a_rank_without_heads) {
    struct place place;
    place_init(&place, 0, 1);
    struct error err;
    struct capacity out;
    place.config.n_heads = place.config.n_kv_heads = 4;
    CHECK(shard_make(&place.shard, &place.config, 0, 8, &err) == STATUS_OK);
    cr_assert_eq(place.shard.head_begin, place.shard.head_end);
    cr_assert_eq(capacity_compute(&out, &place.request, &err), STATUS_OK, "%s", err.text);
    cr_assert_eq(out.kv_bytes, 0);
    cr_assert_eq(out.n_blocks, out.wanted_blocks);
}

/* --- ranks that share memory -------------------------------------------------------------------- */

/* A target of 60 and a draft of 5 MiB, blocks of 2 and 1 MiB, on a device of 100 with 10 in reserve. */
Test(capacity, a_target_and_its_draft_on_one_device) {
    struct capacity both[2] = {
        {.memory_bytes = 100 * MIB, .weights_bytes = 55 * MIB, .scratch_bytes = 5 * MIB,
         .reserve_bytes = 10 * MIB, .kv_bytes = 14 * 2 * MIB, .n_blocks = 14},
        {.memory_bytes = 100 * MIB, .weights_bytes = 4 * MIB, .scratch_bytes = MIB,
         .reserve_bytes = 10 * MIB, .kv_bytes = 80 * MIB, .n_blocks = 80},
    };
    struct error err;
    int n_blocks, together[2] = {0, 0}, apart[2] = {0, 1};
    cr_assert_eq(capacity_share(&n_blocks, both, apart, 2, 64, &err), STATUS_OK);
    cr_assert_eq(n_blocks, 14);
    cr_assert_eq(capacity_share(&n_blocks, both, together, 2, 64, &err), STATUS_OK);
    cr_assert_eq(n_blocks, 8, "25 MiB are left for blocks of 3");
    cr_assert_eq(capacity_share(&n_blocks, both, together, 2, 8 * 16, &err), STATUS_OK);
    cr_assert_eq(capacity_share(&n_blocks, both, together, 2, 8 * 16 + 1, &err),
                 STATUS_RESOURCE_EXHAUSTED);
    cr_assert(strstr(err.text, "2 ranks share 100.0 MiB; their weights take 59.0") != NULL, "%s",
              err.text);
    both[1].weights_bytes = 40 * MIB;
    cr_assert_eq(capacity_share(&n_blocks, both, together, 2, 16, &err), STATUS_RESOURCE_EXHAUSTED);
}
