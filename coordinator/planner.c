#include "coordinator/planner.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/footprint.h"
#include "model/shard.h"

enum { KV_BLOCK = 16, RESERVE_PERCENT = 10, MORE_LOGIT_ROWS = 256 };

static const double MIB = 1048576.0;

struct planner_machine planner_machine_default(void) {
    return (struct planner_machine){
        .bandwidth_gbs = 25,
        .compute_gflops = 200,
        .collective_us = 5,
        .handoff_us = 10,
        .layer_us = 10,
        .acceptance = -1,
    };
}

void planner_use_links(struct planner_machine *machine, const struct planner_links *links,
                       int width) {
    if (links->gigabytes_per_second > 0) {
        double bytes = width * (double)sizeof(float);
        machine->collective_us = links->latency_us + bytes / (links->gigabytes_per_second * 1e3);
    }
    if (links->handoff_us > 0) machine->handoff_us = links->handoff_us;
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* As worker/capacity.c and worker/rank.c add it up on processors. What a device needs besides (embeddings,
 * draws, inboxes) the worker counts alone: a plan that leaves no room for it is refused there. */
static int step_rows(const struct planner_limits *limits) {
    int least = (int)limits->max_sequences + KV_BLOCK, wanted = (int)limits->max_step_tokens;
    return wanted > least ? wanted : least;
}

static int target_logit_rows(const struct planner_input *input) {
    const struct planner_limits *limits = &input->limits;
    if (input->drafter == PLACEMENT_NO_DRAFTER) return (int)limits->max_sequences;
    int rows = (int)(limits->max_sequences * (limits->max_window + 1));
    int most = (int)limits->max_sequences + MORE_LOGIT_ROWS;
    if (rows > most) rows = most;
    return rows < step_rows(limits) ? rows : step_rows(limits);
}

static struct footprint shard_footprint(const struct planner_input *input,
                                        const struct model_config *config, uint32_t shard_i,
                                        uint32_t degree) {
    struct shard shard;
    CHECK(shard_make(&shard, config, (int)shard_i, (int)degree, NULL) == STATUS_OK);
    int logit_rows = config == input->target ? target_logit_rows(input)
                                             : (int)input->limits.max_sequences;
    return footprint_of(config, &shard, input->weights, step_rows(&input->limits), logit_rows);
}

static uint64_t kv_bytes(const struct planner_input *input, const struct footprint *footprint) {
    uint64_t blocks = (input->limits.max_context + KV_BLOCK - 1) / KV_BLOCK;
    return blocks * footprint->kv_bytes_per_block;
}

/* What one rank holds: shards of one model or of both. */
struct holding {
    uint32_t rank;
    uint64_t weights, scratch, kv;
};

static uint64_t holding_sum(const struct holding *h) {
    return h->weights + h->scratch + h->kv;
}

static void hold(struct holding *h, const struct planner_input *input,
                 const struct model_config *config, uint32_t shard_i, uint32_t degree) {
    struct footprint footprint = shard_footprint(input, config, shard_i, degree);
    h->weights += footprint.weights_bytes;
    h->scratch += footprint.scratch_bytes;
    h->kv += kv_bytes(input, &footprint);
}

static uint32_t ranks_of(const struct planner_candidate *c) {
    return c->target_ranks + (c->split == PLACEMENT_DISJOINT ? c->draft_ranks : 0);
}

static void check_memory(struct planner_candidate *c, const struct planner_input *input) {
    struct holding fullest = {0};
    uint32_t draft_first = c->split == PLACEMENT_DISJOINT ? c->target_ranks : 0;
    for (uint32_t rank = 0; rank < ranks_of(c); rank++) {
        struct holding h = {.rank = rank};
        if (rank < c->target_ranks) hold(&h, input, input->target, rank, c->target_ranks);
        if (rank >= draft_first && rank < draft_first + c->draft_ranks) {
            hold(&h, input, input->draft, rank - draft_first, c->draft_ranks);
        }
        if (holding_sum(&h) > holding_sum(&fullest)) fullest = h;
    }
    uint64_t memory = input->machine.memory_bytes, reserve = memory / 100 * RESERVE_PERCENT;
    c->memory_bytes = holding_sum(&fullest);
    c->fits = memory == 0 || c->memory_bytes + reserve <= memory;
    if (c->fits) return;
    snprintf(c->reason, sizeof c->reason,
             "rank %" PRIu32 " has %.1f MiB, of which %.1f stay free, and needs %.1f: weights %.1f, "
             "scratch %.1f, KV of one sequence of %" PRIu32 " tokens %.1f",
             fullest.rank, (double)memory / MIB, (double)reserve / MIB,
             (double)c->memory_bytes / MIB, (double)fullest.weights / MIB,
             (double)fullest.scratch / MIB, input->limits.max_context, (double)fullest.kv / MIB);
}

/* ---- times ----------------------------------------------------------------------------------- */

/* A model's weights by where a layer-parallel draft keeps them. Elements. */
struct elements {
    double attention, mlp, head;   /* attention and mlp of one layer */
};

static struct elements elements_of(const struct model_config *config) {
    double hidden = config->hidden;
    double q = (double)config->n_heads * config->head_dim;
    double kv = 2.0 * config->n_kv_heads * config->head_dim;
    return (struct elements){hidden * (q + kv) + q * hidden, 3 * hidden * config->intermediate,
                             hidden * config->vocab};
}

/* Reading the weights and computing with them overlap, imperfectly: measured products of 1 to 16 rows
 * follow the hypotenuse of both times within a few percent. */
static double product_us(const struct planner_input *input, double elements, double rows) {
    const struct planner_machine *machine = &input->machine;
    double read = elements * (double)dtype_bytes(input->weights) / (machine->bandwidth_gbs * 1e3);
    double compute = 2 * elements * rows / (machine->compute_gflops * 1e3);
    return hypot(read, compute);
}

/* The largest share of a model that a rank of the group has, as a fraction. */
static double largest_share(const struct planner_input *input, const struct model_config *config,
                            uint32_t degree) {
    size_t whole = shard_footprint(input, config, 0, 1).weights_bytes, largest = 0;
    for (uint32_t i = 0; i < degree; i++) {
        size_t bytes = shard_footprint(input, config, i, degree).weights_bytes;
        if (bytes > largest) largest = bytes;
    }
    return (double)largest / (double)whole;
}

/* A forward pass of a tensor-parallel group: two all-reduces a layer and one gather of logits. */
static double pass_us(const struct planner_input *input, const struct model_config *config,
                      uint32_t degree, int rows) {
    struct elements e = elements_of(config);
    double all = config->n_layers * (e.attention + e.mlp) + e.head;
    double us = product_us(input, all * largest_share(input, config, degree), rows);
    us += config->n_layers * input->machine.layer_us;
    if (degree > 1) us += (2 * config->n_layers + 1) * input->machine.collective_us;
    return us;
}

/* Attention's part of the fixed time of a layer: more and smaller kernels than the MLP's. */
static const double ATTENTION_SHARE = 0.6;

/* A pass of the draft laid out for layer parallelism (speculation.md 3): a layer's attention on its
 * owner, MLPs tensor-parallel. width layers' attention at once between the first and last layer; one
 * gather for each group, one all-reduce for each MLP, one gather of logits. */
static double layered_us(const struct planner_input *input, const struct planner_candidate *c,
                         uint32_t width, int rows) {
    const struct model_config *config = input->draft;
    const struct planner_machine *machine = &input->machine;
    struct elements e = elements_of(config);
    uint32_t at_once = width < c->draft_ranks ? width : c->draft_ranks;
    int layers = config->n_layers, between = layers > 2 ? layers - 2 : 0;
    int groups = layers - between + (between + (int)at_once - 1) / (int)at_once;
    double share = 1.0 / c->draft_ranks;
    double us = groups * (product_us(input, e.attention, rows) +
                          ATTENTION_SHARE * machine->layer_us + machine->collective_us);
    us += layers * (product_us(input, e.mlp * share, rows) +
                    (1 - ATTENTION_SHARE) * machine->layer_us + machine->collective_us);
    return us + product_us(input, e.head * share, rows) + machine->collective_us;
}

/* Of the exact acceptance, what layer-parallel steps keep: measured on the bundled pair, tokens per
 * round with calibration (speculation.md 3). */
static double fuzzy_share(uint32_t width) {
    return width <= 1 ? 1 : width == 2 ? 0.98 : 0.96;
}

double planner_acceptance(const struct planner_input *input) {
    if (input->machine.acceptance >= 0) return input->machine.acceptance;
    return input->drafter == PLACEMENT_NGRAM ? 0.4 : 0.75;
}

struct speed_model planner_speed_model(const struct planner_input *input,
                                       const struct planner_candidate *c) {
    const struct planner_machine *machine = &input->machine;
    struct speed_model model = {
        .accept_exact = planner_acceptance(input),
        .accept_fuzzy = planner_acceptance(input) * fuzzy_share(c->layer_width),
    };
    for (int rows = 1; rows < SPEC_MAX_WINDOW + 2; rows++) {
        model.target_us[rows] = pass_us(input, input->target, c->target_ranks, rows);
    }
    if (c->draft_ranks == 0) return model;   /* looking up costs nothing to speak of */
    bool owners = c->layer_width > 1 && c->draft_ranks > 1;
    model.draft_us = owners ? layered_us(input, c, 1, 1)
                            : pass_us(input, input->draft, c->draft_ranks, 1);
    model.fuzzy_us = owners ? layered_us(input, c, c->layer_width, 1) : model.draft_us;
    /* The rows of half a window: what a round leaves inexact. */
    int rows = (int)input->limits.max_window / 2 + 1;
    model.calibrate_us = owners ? layered_us(input, c, 1, rows)
                                : pass_us(input, input->draft, c->draft_ranks, rows);
    if (c->split == PLACEMENT_DISJOINT) model.handoff_us = machine->handoff_us;
    return model;
}

/* ---- enumeration ----------------------------------------------------------------------------- */

static bool allowed(const struct planner_wish *wish, const struct planner_candidate *c) {
    if (ranks_of(c) > wish->n_ranks) return false;
    bool all = c->target_ranks * 2 > wish->n_ranks || c->target_ranks == PLACEMENT_MAX_DEGREE;
    if (c->mode == SPEC_PLAIN && all) return true;
    if (wish->target_ranks != 0 && c->target_ranks != wish->target_ranks) return false;
    if (c->mode == SPEC_PLAIN) return true;
    if (wish->split >= 0 && c->split != (enum placement_split)wish->split) return false;
    if (wish->mode >= 0 && c->mode != (enum spec_mode)wish->mode) return false;
    if (wish->draft_ranks != 0 && c->draft_ranks != 0 && c->draft_ranks != wish->draft_ranks) {
        return false;
    }
    if (!spec_mode_layer_parallel(c->mode)) return true;
    if (wish->layer_width != 0) return c->layer_width == wish->layer_width;
    /* Free, only widths that the draft's ranks can share out; one rank gains nothing and is considered
     * where the mode is wished by name. */
    if (c->draft_ranks == 1) return wish->mode >= 0 && c->layer_width == 2;
    return c->layer_width > 1 && c->layer_width <= c->draft_ranks;
}

static void consider(struct planner_result *out, const struct planner_input *input,
                     struct planner_candidate candidate) {
    const struct planner_wish *wish = &input->wish;
    if (!allowed(wish, &candidate)) return;
    CHECK(out->n_candidates < PLANNER_MAX_CANDIDATES);
    struct planner_candidate *c = &out->candidates[out->n_candidates++];
    *c = candidate;
    check_memory(c, input);
    out->n_fitting += c->fits;
    struct speed_model model = planner_speed_model(input, c);
    int low = wish->window != 0 ? (int)wish->window : 1;
    int high = wish->window != 0 ? (int)wish->window : (int)input->limits.max_window;
    c->choice = speed_model_best(&model, c->mode, low, high);
}

/* All modes and widths of one placement. */
static void consider_split(struct planner_result *out, const struct planner_input *input,
                           enum placement_split split, uint32_t target, uint32_t draft) {
    struct placement placement = {.drafter = input->drafter, .split = split};
    for (enum spec_mode mode = SPEC_SD; mode < SPEC_N_MODES; mode++) {
        if (!placement_supports(&placement, mode)) continue;
        uint32_t widest = spec_mode_layer_parallel(mode) ? SPEC_MAX_LAYER_WIDTH : 1;
        for (uint32_t width = 1; width <= widest; width *= 2) {
            consider(out, input, (struct planner_candidate){.mode = mode, .split = split,
                                                            .target_ranks = target,
                                                            .draft_ranks = draft,
                                                            .layer_width = width});
        }
    }
}

static void enumerate(struct planner_result *out, const struct planner_input *input) {
    for (uint32_t target = 1; target <= PLACEMENT_MAX_DEGREE; target *= 2) {
        consider(out, input, (struct planner_candidate){.mode = SPEC_PLAIN, .target_ranks = target,
                                                        .layer_width = 1});
        if (input->drafter == PLACEMENT_NGRAM) {
            consider_split(out, input, PLACEMENT_ALONE, target, 0);
        }
        if (input->drafter != PLACEMENT_MODEL) continue;
        for (uint32_t draft = 1; draft <= PLACEMENT_MAX_DEGREE; draft *= 2) {
            if (draft <= target) consider_split(out, input, PLACEMENT_SHARED, target, draft);
            consider_split(out, input, PLACEMENT_DISJOINT, target, draft);
        }
    }
}

/* Fitting ones first; then from fast to slow; then with fewer ranks. */
static int by_speed(const void *a_, const void *b_) {
    const struct planner_candidate *a = a_, *b = b_;
    if (a->fits != b->fits) return a->fits ? -1 : 1;
    double x = a->choice.tokens_per_second, y = b->choice.tokens_per_second;
    if (x != y) return x > y ? -1 : 1;
    return (int)ranks_of(a) - (int)ranks_of(b);
}

static const struct planner_candidate *smallest(const struct planner_result *result) {
    const struct planner_candidate *least = &result->candidates[0];
    for (uint32_t i = 1; i < result->n_candidates; i++) {
        if (result->candidates[i].memory_bytes < least->memory_bytes) least = &result->candidates[i];
    }
    return least;
}

static bool has_mode(const struct planner_result *result, int mode) {
    for (uint32_t i = 0; i < result->n_candidates; i++) {
        if ((int)result->candidates[i].mode == mode) return true;
    }
    return false;
}

/* INVALID_ARGUMENT for a wish that no placement is. */
static enum status check_wish(const struct planner_result *result, const struct planner_wish *wish,
                              struct error *err) {
    if (result->n_candidates > 0 && (wish->mode < 0 || has_mode(result, wish->mode))) {
        return STATUS_OK;
    }
    char fixed[128] = "";
    int n = 0;
    if (wish->mode >= 0) {
        n = snprintf(fixed, sizeof fixed, " for mode %s", spec_mode_name((enum spec_mode)wish->mode));
    }
    if (wish->target_ranks != 0) {
        n += snprintf(fixed + n, sizeof fixed - (size_t)n, " with %" PRIu32 " target ranks",
                      wish->target_ranks);
    }
    if (wish->draft_ranks != 0) {
        snprintf(fixed + n, sizeof fixed - (size_t)n, " with %" PRIu32 " draft ranks",
                 wish->draft_ranks);
    }
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "there is no placement%s on %" PRIu32 " rank%s; expected degrees of 1, 2, 4 or 8 "
                     "that fit side by side (pearl) or one on the other (sd, easyspec)",
                     fixed, wish->n_ranks, wish->n_ranks == 1 ? "" : "s");
}

enum status planner_run(struct planner_result *out, const struct planner_input *input,
                        struct error *err) {
    const struct planner_wish *wish = &input->wish;
    *out = (struct planner_result){0};
    enumerate(out, input);
    TRY(check_wish(out, wish, err));
    qsort(out->candidates, out->n_candidates, sizeof *out->candidates, by_speed);
    if (out->n_fitting > 0) return STATUS_OK;
    const struct planner_candidate *least = smallest(out);
    char name[64];
    planner_name(least, name, sizeof name);
    return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                     "none of %" PRIu32 " placements fits; the smallest, %s: %s", out->n_candidates,
                     name, least->reason);
}

/* ---- the choice ------------------------------------------------------------------------------ */

const struct planner_candidate *planner_place(const struct planner_result *result, int mode) {
    const struct planner_candidate *first = &result->candidates[0];
    if (result->n_fitting == 0) return NULL;
    if (mode < 0 && first->mode != SPEC_PLAIN) return first;
    for (uint32_t i = 0; i < result->n_fitting; i++) {
        const struct planner_candidate *c = &result->candidates[i];
        bool free_of_cost = c->split != PLACEMENT_DISJOINT && c->target_ranks == first->target_ranks;
        if ((int)c->mode == mode) return c;
        if (mode < 0 && c->mode != SPEC_PLAIN && free_of_cost) return c;
    }
    return NULL;
}

void planner_name(const struct planner_candidate *c, char *out, size_t size) {
    const char *mode = spec_mode_name(c->mode);
    if (c->mode == SPEC_PLAIN) {
        snprintf(out, size, "%s %" PRIu32, mode, c->target_ranks);
    } else if (c->draft_ranks == 0) {
        snprintf(out, size, "%s %" PRIu32 "+ngram", mode, c->target_ranks);
    } else {
        int n = snprintf(out, size, "%s %" PRIu32 "%c%" PRIu32, mode, c->target_ranks,
                         c->split == PLACEMENT_SHARED ? '/' : '+', c->draft_ranks);
        if (spec_mode_layer_parallel(c->mode) && n < (int)size) {
            snprintf(out + n, size - (size_t)n, " N %" PRIu32, c->layer_width);
        }
    }
}

static int append(char *out, size_t size, int at, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
static int append(char *out, size_t size, int at, const char *format, ...) {
    if (at >= (int)size) return at;
    va_list values;
    va_start(values, format);
    int n = vsnprintf(out + at, size - (size_t)at, format, values);
    va_end(values);
    return at + n;
}

static const struct planner_candidate *fastest_plain(const struct planner_result *result) {
    for (uint32_t i = 0; i < result->n_fitting; i++) {
        if (result->candidates[i].mode == SPEC_PLAIN) return &result->candidates[i];
    }
    return NULL;
}

void planner_explain(const struct planner_result *result, char *out, size_t size) {
    out[0] = '\0';
    if (result->n_fitting == 0) return;
    const struct planner_candidate *best = &result->candidates[0];
    const struct planner_candidate *plain = fastest_plain(result);
    double speed = best->choice.tokens_per_second;
    char name[64];
    planner_name(best, name, sizeof name);
    int at = append(out, size, 0, "%s wins: %.2f tokens a round of %.0f us", name,
                    best->choice.round.tokens, best->choice.round.us);
    if (best->mode == SPEC_PLAIN) {
        at = append(out, size, at, ", %.1f tokens/s.", speed);
    } else if (plain != NULL) {
        at = append(out, size, at, ", %.2f x plain on %" PRIu32 " rank%s (1 token in %.0f us).",
                    speed / plain->choice.tokens_per_second, plain->target_ranks,
                    plain->target_ranks == 1 ? "" : "s", plain->choice.round.us);
    } else {
        at = append(out, size, at, "; plain does not fit.");
    }
    if (result->n_fitting < 2) return;
    const struct planner_candidate *next = &result->candidates[1];
    planner_name(next, name, sizeof name);
    append(out, size, at, " The runner-up, %s, makes %.2f tokens a round of %.0f us: %.0f %% slower.",
           name, next->choice.round.tokens, next->choice.round.us,
           100 * (1 - next->choice.tokens_per_second / speed));
}
