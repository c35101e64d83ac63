/* `lossless`: every way to run a lot of requests brings the tokens and log-probability bits of
 * mode plain, one request at a time, on one rank. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/lossless/lot.h"
#include "tests/lossless/parts.h"
#include "worker/draft/oracle_drafter.h"

struct suite {
    const struct part_options *options;
    const struct lot *lot;
    struct lot_outcomes reference;
    struct local_group *group; /* of the last way, kept while the topology stays */
    struct way of_group;
    int n_runs, n_failures;
    /* Over all ways: none may be 0, or something was not tested. */
    uint64_t accepted, rejected, preemptions;
};

static bool same_topology(const struct way *a, const struct way *b) {
    return (a->mode == SPEC_PLAIN) == (b->mode == SPEC_PLAIN) &&
           a->target_degree == b->target_degree && a->draft_degree == b->draft_degree &&
           a->shared == b->shared && a->ngram == b->ngram &&
           a->max_step_tokens == b->max_step_tokens && a->n_blocks == b->n_blocks &&
           a->prefix_cache == b->prefix_cache && (a->drafter == NULL) == (b->drafter == NULL);
}

static enum status get_group(struct suite *s, const struct way *way, struct error *err) {
    if (s->group != NULL && same_topology(way, &s->of_group)) return STATUS_OK;
    local_group_destroy(s->group);
    s->group = NULL;
    s->of_group = *way;
    struct way there = *way;
    there.isa = s->options->isa;
    return way_open(&s->group, &there, err);
}

static enum status run(struct suite *s, const struct way *way, struct lot_outcomes *out,
                       struct error *err) {
    TRY(get_group(s, way, err));
    return way_run(s->group, way, s->lot, out, err);
}

static void try_way(struct suite *s, struct way way) {
    static struct lot_outcomes outcomes;
    struct error err;
    char name[160];
    int request = -1;
    const char *difference = NULL;
    if (run(s, &way, &outcomes, &err) != STATUS_OK) difference = err.text;
    else difference = lot_compare(&s->reference, &outcomes, &request);
    if (difference == NULL && way.prefix_cache && way.batch > 1 && way.n_blocks == 0 &&
        outcomes.hit_tokens == 0) {
        difference = "nothing was found in the prefix cache";
    }
    s->n_runs++;
    s->preemptions += outcomes.preemptions;
    s->accepted += outcomes.accepted;
    s->rejected += outcomes.rollbacks;
    if (difference == NULL) return;
    s->n_failures++;
    printf("FAILED %s, request %d: %s\n", way_name(name, sizeof name, &way), request + 1,
           difference);
    fflush(stdout);
}

static bool begin(struct suite *s, const struct part_options *options, float temperature,
                  uint64_t seed) {
    memset(s, 0, sizeof *s);
    s->options = options;
    s->lot = lot_create(seed, temperature);
    struct way alone = {0};
    struct error err;
    if (run(s, &alone, &s->reference, &err) == STATUS_OK) return true;
    printf("FAILED: %s\n", err.text);
    return false;
}

static int end(struct suite *s, const char *what) {
    printf("%s: %d ways, %llu drafted tokens held, %llu rounds fell, %llu preemptions, %d failures\n",
           what, s->n_runs, (unsigned long long)s->accepted, (unsigned long long)s->rejected,
           (unsigned long long)s->preemptions, s->n_failures);
    fflush(stdout);
    int failures = s->n_failures;
    failures += s->accepted == 0 || s->rejected == 0 || s->preemptions == 0;
    local_group_destroy(s->group);
    free((void *)s->lot);
    return failures;
}

/* --- modes, windows, widths, batches ---------------------------------------------------------- */

static const enum spec_mode modes[] = {SPEC_SD, SPEC_EASYSPEC, SPEC_PEARL, SPEC_PEARL_LP};

/* One topology: every mode it can run, at the given windows and widths. */
static void modes_of(struct suite *s, struct way way, const int *windows, int n_windows,
                     const int *widths, int n_widths) {
    for (int m = 0; m < 4; m++) {
        way.mode = modes[m];
        if (way.shared && spec_mode_overlapped(way.mode)) continue;
        bool parallel = spec_mode_layer_parallel(way.mode);
        for (int w = 0; w < n_windows; w++) {
            for (int n = 0; n < (parallel ? n_widths : 1); n++) {
                way.window = windows[w];
                way.layer_width = parallel ? widths[n] : 1;
                try_way(s, way);
            }
        }
    }
}

static void full_grid(struct suite *s) {
    static const int windows[] = {1, 2, 3, 5, 8}, widths[] = {1, 2, 4}, batches[] = {1, 7, 16};
    static const int degrees[][3] = {{1, 1, 0}, {1, 1, 1}, {2, 1, 1}, {2, 2, 1}, {2, 2, 0},
                                     {4, 2, 1}, {4, 1, 0}, {1, 4, 0}};
    for (size_t d = 0; d < sizeof degrees / sizeof *degrees; d++) {
        for (int chunk = 0; chunk < 2; chunk++) {
            for (int cache = 0; cache < 2; cache++) {
                for (int b = 0; b < 3; b++) {
                    modes_of(s, (struct way){.target_degree = degrees[d][0],
                                             .draft_degree = degrees[d][1],
                                             .shared = degrees[d][2],
                                             .max_step_tokens = chunk ? LOT_REQUESTS * 3 : 0,
                                             .prefix_cache = cache, .batch = batches[b]},
                             windows, 5, widths, 3);
                }
            }
        }
        printf("topology %zu of 8: %d ways, %d failures\n", d + 1, s->n_runs, s->n_failures);
        fflush(stdout);
    }
}

static void reduced_grid(struct suite *s) {
    static const int all[] = {1, 2, 3, 5, 8}, some[] = {3}, widths[] = {1, 2, 4}, two[] = {2};
    modes_of(s, (struct way){.target_degree = 1, .draft_degree = 1, .batch = 16}, all, 5, widths, 3);
    modes_of(s, (struct way){.target_degree = 1, .draft_degree = 1, .batch = 1}, some, 1, two, 1);
    modes_of(s, (struct way){.target_degree = 1, .draft_degree = 1, .shared = true, .batch = 7}, all,
             5, two, 1);
    modes_of(s, (struct way){.target_degree = 2, .draft_degree = 2, .shared = true, .batch = 7,
                             .prefix_cache = true}, some, 1, widths, 3);
    modes_of(s, (struct way){.target_degree = 2, .draft_degree = 2, .batch = 16,
                             .max_step_tokens = 3 * LOT_REQUESTS}, some, 1, two, 1);
}

/* --- what is not in the grid ------------------------------------------------------------------ */

static void delays(struct suite *s) {
    for (int delay = 1; delay <= 5; delay += 2) {
        for (int batch = 1; batch <= 7; batch += 6) {
            try_way(s, (struct way){.mode = SPEC_PEARL, .window = 5, .delay = delay, .batch = batch});
        }
    }
    try_way(s, (struct way){.mode = SPEC_PEARL_LP, .window = 6, .layer_width = 2, .delay = 2});
}

static void look_up(struct suite *s) {
    for (int batch = 1; batch <= 16; batch += 15) {
        try_way(s, (struct way){.mode = SPEC_SD, .ngram = true, .window = 4, .batch = batch});
        try_way(s, (struct way){.mode = SPEC_SD, .ngram = true, .window = 8, .batch = batch,
                                .target_degree = 2});
    }
}

static void short_memory(struct suite *s) {
    try_way(s, (struct way){.mode = SPEC_PEARL, .window = 4, .batch = 16, .n_blocks = 12});
    try_way(s, (struct way){.mode = SPEC_SD, .window = 4, .batch = 16, .n_blocks = 12,
                            .shared = true});
    try_way(s, (struct way){.mode = SPEC_PEARL_LP, .window = 4, .layer_width = 2, .batch = 16,
                            .n_blocks = 12, .prefix_cache = true});
}

/* More requests than run at once: the drafter's slots go from one to the next. */
static void few_slots(struct suite *s) {
    for (int n = 1; n <= 3; n++) {
        try_way(s, (struct way){.mode = SPEC_PEARL, .window = 4, .batch = 16, .max_sequences = n});
        try_way(s, (struct way){.mode = SPEC_SD, .window = 3, .batch = 16, .max_sequences = n,
                                .shared = true, .mixed_wishes = true});
    }
}

/* Mode, window and width change between rounds, at random. */
static struct spec_policy changing(int step, const struct way *way) {
    uint32_t x = (uint32_t)step / 3 * 2654435761u + (uint32_t)way->window;
    enum spec_mode mode = (enum spec_mode)((x >> 8) % SPEC_N_MODES);
    return (struct spec_policy){mode, 1 + (int)((x >> 12) % 8), 1 + (int)((x >> 20) % 4),
                                (int)((x >> 24) % 3)};
}

static void changes(struct suite *s) {
    for (int i = 1; i <= 4; i++) {
        struct way way = {.mode = SPEC_PEARL, .window = i, .batch = 1 + 5 * (i - 1),
                          .policy_at = changing};
        try_way(s, way);
        way.shared = true;
        way.mixed_wishes = i % 2 == 0;
        try_way(s, way);
    }
    try_way(s, (struct way){.mode = SPEC_PEARL, .window = 4, .batch = 16, .mixed_wishes = true});
    try_way(s, (struct way){.mode = SPEC_EASYSPEC, .window = 4, .layer_width = 4, .batch = 16,
                            .mixed_wishes = true});
}

/* The text of a request, found by its seed. */
struct truth {
    const struct lot *lot;
    const struct lot_outcomes *reference;
    int32_t texts[LOT_REQUESTS][LOT_MAX_TEXT];
};

static const int32_t *truth_of(void *user, const struct draft_begin *begin, int *n) {
    struct truth *truth = user;
    int i = 0;
    while (truth->lot->requests[i].sampling.seed != begin->sampling.seed) i++;
    const struct step_request *request = &truth->lot->requests[i];
    const struct lot_outcome *outcome = &truth->reference->of[i];
    memcpy(truth->texts[i], request->prompt, (size_t)request->n_prompt * sizeof(int32_t));
    memcpy(truth->texts[i] + request->n_prompt, outcome->tokens,
           (size_t)outcome->n_tokens * sizeof(int32_t));
    *n = request->n_prompt + outcome->n_tokens;
    return truth->texts[i];
}

/* Drafters that propose garbage, the truth, and something in between. */
static void oracles(struct suite *s) {
    static struct truth truth;
    truth.lot = s->lot;
    truth.reference = &s->reference;
    for (int tenths = 0; tenths <= 10; tenths += 5) {
        struct oracle_drafter_options options = {LOT_REQUESTS, 4000, tenths / 10.0,
                                                 s->options->seed, truth_of, &truth};
        struct drafter *oracle = oracle_drafter_create(&options);
        for (int m = 0; m < 4; m += 2) {
            for (int window = 1; window <= 8; window += 7) {
                for (int batch = 1; batch <= 16; batch += 15) {
                    try_way(s, (struct way){.mode = modes[m], .window = window, .batch = batch,
                                            .drafter = oracle});
                }
            }
        }
        drafter_destroy(oracle);
    }
}

int part_lossless(const struct part_options *options) {
    static struct suite suite;
    int failures = 0;
    static const float temperatures[] = {-1, 0, 0.7f, 1};
    int n_temperatures = options->full ? 4 : 1;
    for (int t = 0; t < n_temperatures; t++) {
        char name[48];
        snprintf(name, sizeof name, t == 0 ? "mixed requests" : "temperature %g",
                 (double)temperatures[t]);
        if (!begin(&suite, options, temperatures[t], options->seed + (uint64_t)t)) return 1;
        if (options->full && t == 0) full_grid(&suite);
        else reduced_grid(&suite);
        delays(&suite);
        look_up(&suite);
        short_memory(&suite);
        few_slots(&suite);
        changes(&suite);
        oracles(&suite);
        failures += end(&suite, name);
    }
    return failures;
}
