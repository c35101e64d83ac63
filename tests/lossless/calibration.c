/* `calibration`: after random histories of drafting (exact and layer-parallel), acceptance,
 * rejection and calibration in the slack, all KV that the drafter calls exact equals that of one
 * fresh exact pass, bit for bit. The drafter is the real one, over the real engine; only the
 * verdicts are made up. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/lossless/lot.h"
#include "tests/lossless/parts.h"
#include "tests/reference/random.h"
#include "worker/draft/history.h"
#include "worker/draft/model_drafter.h"

#define DRAFT TANDEM_SOURCE_DIR "/assets/models/llama-tale-draft"

enum { N_SEQUENCES = 4, MAX_TOKENS = 200, KV_WIDTH = 4 * 32, N_LAYERS = 8, CONTEXT = 256 };

/* What the target would know of a sequence. */
struct known {
    int32_t tokens[MAX_TOKENS + 64]; /* committed, then candidates */
    int n_committed, n_candidates;
    /* To be told. */
    int accepted, n_own;
    uint64_t hash;
};

struct trial {
    struct local_group *drafting, *fresh; /* the draft under test, and one that only passes exactly */
    struct drafter *drafter;
    struct known sequences[N_SEQUENCES];
    struct test_random random;
    int n_compared, n_fuzzy_rounds, n_slack, n_fallen, n_held;
    int failures;
};

static struct local_group *open_draft(int degree, struct error *err) {
    struct local_group_options options = {
        .model_dir = DRAFT, /* the target is not used */
        .degree = degree,
        .n_threads = 1,
        .weights = DTYPE_BF16,
        .n_blocks = 64,
        .max_rows = 256,
        .max_sequences = N_SEQUENCES,
        .max_context = CONTEXT,
        .draft_dir = DRAFT,
        .shared = true,
        .draft_degree = degree,
        .max_layer_width = 4,
        .prefix_cache = true,
    };
    struct local_group *group;
    return local_group_create(&group, &options, err) == STATUS_OK ? group : NULL;
}

/* --- comparing -------------------------------------------------------------------------------- */

static void fresh_pass(struct trial *t, const struct known *known, int n, int32_t *blocks) {
    for (int i = 0; i < CONTEXT / BACKEND_KV_BLOCK; i++) blocks[i] = i;
    struct backend_segment segment = {0, n, 0, blocks};
    int32_t last = n - 1;
    struct transformer_batch batch = {.tokens = known->tokens, .n_rows = n, .segments = &segment,
                                      .n_segments = 1, .logit_rows = &last, .n_logit_rows = 1};
    float *logits;
    struct error err;
    CHECK(engine_forward(local_group_engine(t->fresh), ENGINE_DRAFT, &batch, &logits, &err) ==
          STATUS_OK);
}

static void compare(struct trial *t, int slot) {
    const struct known *known = &t->sequences[slot];
    const int32_t *blocks;
    int32_t fresh_blocks[CONTEXT / BACKEND_KV_BLOCK];
    int n = model_drafter_exact(t->drafter, slot, &blocks);
    if (n == 0 || known->n_own > 0) return; /* it has not heard of the last verdict yet */
    fresh_pass(t, known, n, fresh_blocks);
    for (int layer = 0; layer < N_LAYERS; layer++) {
        for (int p = 0; p < n; p++) {
            float k[2][KV_WIDTH], v[2][KV_WIDTH];
            memset(k, 0, sizeof k);
            memset(v, 0, sizeof v);
            bool here = transformer_kv_read(local_group_draft(t->drafting), layer, blocks, p, k[0],
                                            v[0]);
            if (!here) break; /* of a layer that another rank owns */
            transformer_kv_read(local_group_draft(t->fresh), layer, fresh_blocks, p, k[1], v[1]);
            t->n_compared++;
            if (memcmp(k[0], k[1], sizeof k[0]) == 0 && memcmp(v[0], v[1], sizeof v[0]) == 0) {
                continue;
            }
            if (t->failures++ < 5) {
                printf("FAILED slot %d, layer %d, position %d of %d exact: other KV\n", slot, layer,
                       p, n);
            }
        }
    }
}

/* --- rounds ----------------------------------------------------------------------------------- */

static void begin_all(struct trial *t) {
    struct draft_begin begins[N_SEQUENCES];
    for (int slot = 0; slot < N_SEQUENCES; slot++) {
        struct known *known = &t->sequences[slot];
        known->n_committed = 5 + random_below(&t->random, 40);
        for (int i = 0; i < known->n_committed; i++) {
            known->tokens[i] = slot < 2 ? 100 + i : random_below(&t->random, 4000);
            known->hash = draft_history_hash(known->hash, known->tokens[i]);
        }
        begins[slot] = (struct draft_begin){
            .slot = slot,
            .tokens = known->tokens,
            .n_prompt = known->n_committed,
            .n_tokens = known->n_committed,
            .sampling = {.temperature = 0.8f, .top_p = 1, .repetition_penalty = 1,
                         .seed = random_u64(&t->random)},
        };
    }
    struct draft_order order = {.begins = begins, .n_begins = N_SEQUENCES, .layer_width = 1};
    struct error err;
    CHECK(drafter_start(t->drafter, &order, &err) == STATUS_OK);
    CHECK(drafter_collect(t->drafter, NULL, true, NULL, &err) == STATUS_OK);
}

static void draft_round(struct trial *t) {
    struct draft_job jobs[N_SEQUENCES];
    struct draft_chain chains[N_SEQUENCES];
    struct error err = {.text = ""};
    int width = 1 << random_below(&t->random, 3), n = 0;
    for (int slot = 0; slot < N_SEQUENCES; slot++) {
        struct known *known = &t->sequences[slot];
        if (random_below(&t->random, 5) == 0) continue; /* not in this round */
        jobs[n++] = (struct draft_job){
            .slot = slot,
            .accepted = known->accepted,
            .n_own = known->n_own,
            .own = known->tokens + known->n_committed - known->n_own,
            .plan = {known->n_candidates, 1 + random_below(&t->random, 5), 0},
            .n_committed = known->n_committed,
            .hash = known->hash,
        };
        known->accepted = known->n_own = 0;
    }
    struct draft_order order = {.jobs = jobs, .n_jobs = n, .layer_width = width};
    CHECK(drafter_start(t->drafter, &order, &err) == STATUS_OK);
    CHECK(drafter_collect(t->drafter, chains, true, NULL, &err) == STATUS_OK);
    for (int i = 0; i < n; i++) {
        struct known *known = &t->sequences[jobs[i].slot];
        CHECK(chains[i].n == jobs[i].plan.make);
        memcpy(known->tokens + known->n_committed + known->n_candidates, chains[i].tokens,
               (size_t)chains[i].n * sizeof(int32_t));
        known->n_candidates += chains[i].n;
    }
    t->n_fuzzy_rounds += width > 1;
    for (int slot = 0; slot < N_SEQUENCES; slot++) compare(t, slot);
    int64_t took_ns;
    if (random_below(&t->random, 2) == 0) return;
    CHECK(model_drafter_calibrate(t->drafter, &took_ns, &err) == STATUS_OK);
    t->n_slack++;
    for (int slot = 0; slot < N_SEQUENCES; slot++) compare(t, slot);
}

static void commit(struct known *known, int32_t token) {
    known->tokens[known->n_committed++] = token;
    known->hash = draft_history_hash(known->hash, token);
}

/* A verdict for some sequences: some candidates hold, then one may fall. */
static void judge(struct trial *t) {
    for (int slot = 0; slot < N_SEQUENCES; slot++) {
        struct known *known = &t->sequences[slot];
        if (known->n_candidates == 0 || known->n_own > 0) continue;
        int held = random_below(&t->random, known->n_candidates + 1);
        for (int i = 0; i < held; i++) commit(known, known->tokens[known->n_committed]);
        known->accepted += held;
        known->n_candidates -= held;
        t->n_held += held;
        if (random_below(&t->random, 2) == 0) continue;
        t->n_fallen += known->n_candidates > 0;
        known->n_candidates = 0;
        known->n_own = 1;
        commit(known, random_below(&t->random, 4000));
    }
}

static bool has_room(const struct trial *t) {
    for (int slot = 0; slot < N_SEQUENCES; slot++) {
        const struct known *known = &t->sequences[slot];
        if (known->n_committed + known->n_candidates > MAX_TOKENS - 8) return false;
    }
    return true;
}

static int try_degree(const struct part_options *options, int degree, int n_trials) {
    static struct trial t;
    int failures = 0;
    for (int trial = 0; trial < n_trials; trial++) {
        struct error err;
        memset(&t, 0, sizeof t);
        t.random.state = options->seed + (uint64_t)(100 * degree + trial);
        t.drafting = open_draft(degree, &err);
        t.fresh = open_draft(degree, &err);
        CHECK(t.drafting != NULL && t.fresh != NULL);
        t.drafter = local_group_leadership(t.drafting)->drafter;
        begin_all(&t);
        for (int round = 0; round < 60 && has_room(&t); round++) {
            draft_round(&t);
            judge(&t);
        }
        bool tested = t.n_fuzzy_rounds > 5 && t.n_slack > 5 && t.n_fallen > 5 && t.n_held > 5;
        printf("draft on %d ranks: %d positions compared, %d layer-parallel rounds, %d calibrations in "
               "the slack, %d rounds fell, %d tokens held: %d differ%s\n", degree, t.n_compared,
               t.n_fuzzy_rounds, t.n_slack, t.n_fallen, t.n_held, t.failures,
               tested ? "" : "; FAILED: too little happened");
        failures += t.failures + !tested;
        local_group_destroy(t.drafting);
        local_group_destroy(t.fresh);
    }
    return failures;
}

int part_calibration(const struct part_options *options) {
    int failures = 0;
    for (int degree = 1; degree <= 4; degree *= 2) {
        failures += try_degree(options, degree, options->full ? 10 : 1);
    }
    return failures;
}
