#include "tests/lossless/lot.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/error.h"
#include "model/tokenizer.h"
#include "tests/reference/random.h"

/* Of the sources it was built from; where those are elsewhere, of the folder it is started in. */
static const char *model_dir(const char *built, const char *here) {
    return access(built, R_OK) == 0 ? built : here;
}
#define MODEL                                                                                       \
    model_dir(TANDEM_SOURCE_DIR "/assets/models/llama-tale-target", "assets/models/llama-tale-target")
#define DRAFT                                                                                       \
    model_dir(TANDEM_SOURCE_DIR "/assets/models/llama-tale-draft", "assets/models/llama-tale-draft")

enum { MAX_CONTEXT = LOT_CONTEXT, MAX_ROWS = 256, VOCAB = 4000, NOISE_PROMPT = 96 };

/* Beginnings that both models have something to say to: drafts then hold often, and fall often
 * enough. */
static const char *const beginnings[] = {
    "Once upon a time, there was a little girl named Lily. She loved",
    "Tom and his dog went to the park. The dog saw a big red ball and",
    "One day, a small bird could not fly. The bird was sad because",
    "The sun was hot. Ben wanted to drink some water, but",
    "Question: What is the capital of France? Answer:",
    "There was a king who had three sons. The youngest son said",
    "Mia found a key in the garden. She asked her mother",
    "The little boat was on the sea. The wind blew and",
};

static void set_prompt(struct lot *lot, int i, struct tokenizer *tokenizer,
                       struct test_random *random) {
    struct step_request *request = &lot->requests[i];
    request->prompt = lot->prompts[i];
    if (i % 4 == 3) { /* noise: nothing can be foreseen in it */
        request->n_prompt = 1 + random_below(random, NOISE_PROMPT);
        for (int p = 0; p < request->n_prompt; p++) {
            lot->prompts[i][p] = random_below(random, VOCAB);
        }
        return;
    }
    const char *text = beginnings[(i - i / 4) % 8];
    struct token_list list = {0};
    struct error err;
    CHECK(tokenizer_encode(tokenizer, &list, text, strlen(text), true, &err) == STATUS_OK);
    int n = list.n < LOT_MAX_PROMPT ? (int)list.n : LOT_MAX_PROMPT;
    memcpy(lot->prompts[i], list.ids, (size_t)n * sizeof *lot->prompts[i]);
    request->n_prompt = n;
    free(list.ids);
}

static void set_mixed(struct lot *lot, int i, struct test_random *random) {
    static const float temperatures[3] = {0, 0.7f, 1};
    struct step_request *request = &lot->requests[i];
    struct sample_params *sampling = &request->sampling;
    sampling->temperature = temperatures[i % 3];
    sampling->top_p = i % 4 == 1 ? 0.9f : 1;
    sampling->top_k = i % 5 == 3 ? 40 : 0;
    sampling->min_p = i % 7 == 4 ? 0.05f : 0;
    sampling->repetition_penalty = i % 6 == 2 ? 1.15f : 1;
    sampling->presence_penalty = i % 8 == 5 ? 0.5f : 0;
    sampling->frequency_penalty = i % 8 == 6 ? 0.2f : 0;
    request->max_tokens = 1 + random_below(random, LOT_MAX_OUTPUT);
    if (i % 3 == 0) request->max_tokens = LOT_MAX_OUTPUT;
    request->min_tokens = i % 5 == 2 ? 6 : 0;
    request->ignore_eos = i % 6 == 1;
    lot->stop_ids[i] = random_below(random, 300);
    request->stop_token_ids = &lot->stop_ids[i];
    request->n_stop_token_ids = i % 2;
}

struct lot *lot_create(uint64_t seed, float temperature) {
    struct lot *lot = xcalloc(1, sizeof *lot);
    struct test_random random = {seed};
    struct tokenizer *tokenizer;
    struct error err;
    if (tokenizer_load(&tokenizer, MODEL, &err) != STATUS_OK) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    for (int i = 0; i < LOT_REQUESTS; i++) {
        struct step_request *request = &lot->requests[i];
        request->key = (uint64_t)i + 1;
        request->sampling = (struct sample_params){.temperature = temperature,
                                                   .top_p = 1,
                                                   .repetition_penalty = 1,
                                                   .seed = random_u64(&random),
                                                   .n_logprobs = i % 3 == 0 ? -1 : i % 3};
        request->max_tokens = LOT_MAX_OUTPUT;
        request->wish = (struct spec_wish){-1, 0};
        set_prompt(lot, i, tokenizer, &random);
        if (temperature < 0) set_mixed(lot, i, &random);
    }
    tokenizer_free(tokenizer);
    return lot;
}

struct lot *lot_near_limit(uint64_t seed) {
    struct lot *lot = lot_create(seed, 0.7f);
    struct test_random random = {seed};
    for (int i = 0; i < LOT_REQUESTS; i++) {
        struct step_request *request = &lot->requests[i];
        request->n_prompt = LOT_CONTEXT - 1 - i;
        request->ignore_eos = true;
        for (int p = 0; p < request->n_prompt; p++) {
            lot->prompts[i][p] = random_below(&random, VOCAB);
        }
    }
    return lot;
}

/* --- ways ------------------------------------------------------------------------------------- */

static int or_one(int n) {
    return n > 0 ? n : 1;
}

const char *way_name(char *out, size_t size, const struct way *way) {
    snprintf(out, size, "%s%s g=%d N=%d k=%d T=%d D=%d%s batch=%d rows=%d blocks=%d%s%s%s",
             way->ngram ? "ngram " : way->drafter != NULL ? "oracle " : "",
             spec_mode_name(way->mode), way->window, or_one(way->layer_width), way->delay,
             or_one(way->target_degree), or_one(way->draft_degree),
             way->shared ? " shared" : "", or_one(way->batch),
             way->max_step_tokens > 0 ? way->max_step_tokens : MAX_ROWS, way->n_blocks,
             way->prefix_cache ? " cache" : "", way->mixed_wishes ? " wishes" : "",
             way->rule == SAMPLING_REJECTION ? " rejection" : "");
    return out;
}

static int rows_of(const struct way *way) {
    return way->max_step_tokens > 0 ? way->max_step_tokens : MAX_ROWS;
}

static int blocks_of(const struct way *way) {
    return way->n_blocks > 0 ? way->n_blocks : 300;
}

enum status way_open(struct local_group **out, const struct way *way, struct error *err) {
    bool model = way->mode != SPEC_PLAIN && !way->ngram && way->drafter == NULL;
    struct local_group_options options = {
        .model_dir = MODEL,
        .degree = or_one(way->target_degree),
        .isa = way->isa,
        .n_threads = 1,
        .weights = DTYPE_BF16,
        .n_blocks = blocks_of(way),
        .max_rows = rows_of(way),
        .max_logit_rows = rows_of(way),
        .max_sequences = LOT_REQUESTS,
        .max_context = MAX_CONTEXT,
        .draft_dir = model ? DRAFT : NULL,
        .ngram = way->ngram,
        .shared = way->shared,
        .draft_degree = or_one(way->draft_degree),
        .max_layer_width = SPEC_MAX_LAYER_WIDTH,
        .prefix_cache = way->prefix_cache,
        .rule = way->rule,
    };
    return local_group_create(out, &options, err);
}

static struct step_loop *open_loop(struct local_group *group, const struct way *way) {
    const struct rank_leadership *leadership = local_group_leadership(group);
    bool oracle = way->drafter != NULL;
    struct step_loop_options options = {
        .engine = leadership->engine,
        .backend = leadership->backend,
        .config = local_group_config(group),
        .n_blocks = blocks_of(way),
        .max_sequences = way->max_sequences > 0 ? way->max_sequences : LOT_REQUESTS,
        .max_step_tokens = rows_of(way),
        .max_context = MAX_CONTEXT,
        .prefix_cache = way->prefix_cache,
        .max_logit_rows = rows_of(way),
        .drafter = oracle ? way->drafter : leadership->drafter,
        .drafter_remote = oracle || leadership->drafter_remote,
        .max_window = SPEC_MAX_WINDOW,
        .rule = way->rule,
    };
    return step_loop_create(&options);
}

static struct spec_policy policy_of(const struct way *way) {
    return (struct spec_policy){way->mode, way->window, or_one(way->layer_width), way->delay};
}

static void take_step(struct lot_outcomes *out, const Tandem__V1__Step *step, const struct lot *lot) {
    size_t token = 0, entry = 0;
    for (size_t i = 0; i < step->n_keys; i++) {
        struct lot_outcome *outcome = &out->of[step->keys[i] - 1];
        bool asked = lot->requests[step->keys[i] - 1].sampling.n_logprobs >= 0;
        for (uint32_t k = 0; k < step->token_counts[i]; k++) {
            CHECK(outcome->n_tokens < LOT_MAX_OUTPUT);
            outcome->tokens[outcome->n_tokens++] = step->tokens[token++];
            if (asked) outcome->logprobs[outcome->n_logprobs++] = step->logprobs[entry++];
        }
    }
    for (size_t i = 0; i < step->n_finished_keys; i++) {
        struct lot_outcome *outcome = &out->of[step->finished_keys[i] - 1];
        outcome->reason = step->finish_reasons[i];
        outcome->n_ends++;
        if (step->n_spec_reports == 0) continue;
        outcome->drafts = step->spec_reports[i]->drafts;
        outcome->drafted = step->spec_reports[i]->drafted_tokens;
        outcome->accepted = step->spec_reports[i]->accepted_tokens;
    }
}

static enum status run_step(struct step_loop *loop, const struct way *way, const struct lot *lot,
                            struct lot_outcomes *out, const struct lot_cancel *cancel,
                            struct error *err) {
    if (way->policy_at != NULL) {
        struct spec_policy policy = way->policy_at(out->n_steps, way);
        step_loop_set_policy(loop, &policy);
    }
    if (cancel != NULL && out->n_steps == cancel->after_steps) step_loop_cancel(loop, cancel->key);
    TRY(step_loop_step(loop, 0, err));
    Tandem__V1__Step step;
    Tandem__V1__StepStats stats;
    step_loop_describe(loop, &step, &stats);
    take_step(out, &step, lot);
    out->preemptions = stats.preemptions;
    out->hit_tokens = stats.prefix_hit_tokens;
    if (stats.spec != NULL) {
        out->drafts = stats.spec->drafts;
        out->draft_tokens = stats.spec->draft_tokens;
        out->accepted = stats.spec->accepted_tokens;
        out->rollbacks = stats.spec->rollbacks;
        out->discarded = stats.spec->discarded_tokens;
        out->pre_verify_hits = stats.spec->pre_verify_hits;
        out->continuations = stats.spec->post_verify_continuations;
    }
    if (++out->n_steps > 20000) return error_set(err, STATUS_INTERNAL, "it never ends");
    return STATUS_OK;
}

static int n_ended(const struct lot_outcomes *out) {
    int n = 0;
    for (int i = 0; i < LOT_REQUESTS; i++) n += out->of[i].n_ends;
    return n;
}

static struct spec_wish wish_at(int i) {
    static const struct spec_wish wishes[] = {{-1, 0}, {SPEC_PLAIN, 0}, {SPEC_SD, 3},
                                              {SPEC_PEARL, 0}, {SPEC_EASYSPEC, 2},
                                              {-1, 1}, {SPEC_PEARL_LP, 5}};
    return wishes[i % 7];
}

enum status way_run(struct local_group *group, const struct way *way, const struct lot *lot,
                    struct lot_outcomes *out, struct error *err) {
    return way_run_cancelling(group, way, lot, out, NULL, err);
}

enum status way_run_cancelling(struct local_group *group, const struct way *way,
                               const struct lot *lot, struct lot_outcomes *out,
                               const struct lot_cancel *cancel, struct error *err) {
    memset(out, 0, sizeof *out);
    struct step_loop *loop = open_loop(group, way);
    struct spec_policy policy = policy_of(way);
    step_loop_set_policy(loop, &policy);
    enum status status = STATUS_OK;
    for (int i = 0; i < LOT_REQUESTS && status == STATUS_OK; i++) {
        struct step_request request = lot->requests[i];
        if (way->mixed_wishes) request.wish = wish_at(i);
        step_loop_submit(loop, &request);
        /* The next one comes when there is room, and they do not come all at once. */
        int most = or_one(way->batch);
        while (status == STATUS_OK && i + 1 - n_ended(out) >= most) {
            status = run_step(loop, way, lot, out, cancel, err);
        }
        if (most > 1 && i % 3 == 2 && status == STATUS_OK) {
            status = run_step(loop, way, lot, out, cancel, err);
        }
    }
    while (status == STATUS_OK && !step_loop_idle(loop)) {
        status = run_step(loop, way, lot, out, cancel, err);
    }
    step_loop_destroy(loop);
    return status;
}

/* --- comparing -------------------------------------------------------------------------------- */

static const char *compare_one(const struct lot_outcome *a, const struct lot_outcome *b) {
    if (b->n_ends != 1) return "it did not end exactly once";
    int n = a->n_tokens < b->n_tokens ? a->n_tokens : b->n_tokens;
    if (memcmp(a->tokens, b->tokens, (size_t)n * sizeof *a->tokens) != 0) return "other tokens";
    if (a->n_tokens != b->n_tokens) return "another number of tokens";
    if (a->reason != b->reason) return "another reason";
    if (a->n_logprobs != b->n_logprobs) return "another number of log-probabilities";
    if (memcmp(a->logprobs, b->logprobs, (size_t)a->n_logprobs * sizeof *a->logprobs) != 0) {
        return "other log-probabilities";
    }
    return NULL;
}

const char *lot_compare(const struct lot_outcomes *a, const struct lot_outcomes *b,
                        int *request) {
    for (*request = 0; *request < LOT_REQUESTS; ++*request) {
        const char *difference = compare_one(&a->of[*request], &b->of[*request]);
        if (difference != NULL) return difference;
    }
    return NULL;
}
