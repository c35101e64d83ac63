/* `ends`: end tokens, stop ids, max_tokens, the context limit and Cancel, inside a block, at its
 * border, in PRE and in POST. Every text is cut at every place in every mode, and must be the
 * beginning of the plain text, with the reason that plain has. (Stop strings are the
 * coordinator's: tests/e2e.) */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/lossless/lot.h"
#include "tests/lossless/parts.h"

/* Places where texts are cut: all there are in the first blocks, or those around their borders. */
enum { N_CUTS = 14 };
static const int few_cuts[] = {0, 1, 3, 4, 8};

struct mode_way {
    enum spec_mode mode;
    int window, width;
};
static const struct mode_way mode_ways[] = {{SPEC_SD, 3, 1}, {SPEC_PEARL, 1, 1}, {SPEC_PEARL, 4, 1},
                                            {SPEC_PEARL_LP, 5, 2}};

static int failures;

static void fail(const char *what, const struct way *way, int cut, const char *how) {
    char name[160];
    printf("FAILED %s at %d, %s: %s\n", what, cut, way_name(name, sizeof name, way), how);
    failures++;
}

/* The lot with one end put at place `cut` of every text. */
static void cut_lot(struct lot *lot, const struct lot *from, const struct lot_outcomes *reference,
                    const char *what, int cut) {
    *lot = *from;
    for (int i = 0; i < LOT_REQUESTS; i++) {
        struct step_request *request = &lot->requests[i];
        request->prompt = lot->prompts[i];
        request->stop_token_ids = &lot->stop_ids[i];
        request->n_stop_token_ids = 0;
        if (strcmp(what, "max_tokens") == 0) request->max_tokens = cut + 1;
        if (strcmp(what, "stop id") == 0 && cut < reference->of[i].n_tokens) {
            lot->stop_ids[i] = reference->of[i].tokens[cut];
            request->n_stop_token_ids = 1;
        }
    }
}

static void try_cut(struct local_group *plain, struct local_group *group, const struct way *way,
                    const struct lot *lot, const char *what, int cut) {
    static struct lot_outcomes wanted, seen;
    struct way alone = {.max_step_tokens = way->max_step_tokens};
    struct error err;
    int request;
    if (way_run(plain, &alone, lot, &wanted, &err) != STATUS_OK ||
        way_run(group, way, lot, &seen, &err) != STATUS_OK) {
        fail(what, way, cut, err.text);
        return;
    }
    const char *difference = lot_compare(&wanted, &seen, &request);
    if (difference != NULL) fail(what, way, cut, difference);
}

/* Cancelled after some steps: it ends as cancelled, with a beginning of its text; the others are
 * whole. */
static void try_cancel(struct local_group *group, const struct way *way, const struct lot *lot,
                       const struct lot_outcomes *reference, int n_steps) {
    struct lot_cancel cancel = {.key = 3, .after_steps = n_steps};
    static struct lot_outcomes seen;
    struct error err;
    if (way_run_cancelling(group, way, lot, &seen, &cancel, &err) != STATUS_OK) {
        fail("cancel", way, n_steps, err.text);
        return;
    }
    for (int i = 0; i < LOT_REQUESTS; i++) {
        const struct lot_outcome *a = &reference->of[i], *b = &seen.of[i];
        bool cut = i + 1 == (int)cancel.key && b->reason == FINISH_CANCELLED;
        bool same = memcmp(a->tokens, b->tokens, (size_t)b->n_tokens * sizeof *a->tokens) == 0;
        if (!same || b->n_ends != 1 || (!cut && a->n_tokens != b->n_tokens)) {
            fail("cancel", way, n_steps, "another text than without");
        }
    }
}

int part_ends(const struct part_options *options) {
    static struct lot_outcomes reference;
    struct lot *lot = lot_create(options->seed, 0.7f), *cut = calloc(1, sizeof *cut);
    struct error err;
    struct way alone = {0};
    struct local_group *plain, *group;
    if (way_open(&plain, &alone, &err) != STATUS_OK) return 1;
    if (way_run(plain, &alone, lot, &reference, &err) != STATUS_OK) return 1;
    for (size_t m = 0; m < sizeof mode_ways / sizeof *mode_ways; m++) {
        struct way way = {.mode = mode_ways[m].mode, .window = mode_ways[m].window,
                          .layer_width = mode_ways[m].width, .batch = 5};
        if (way_open(&group, &way, &err) != STATUS_OK) return 1;
        int n_cuts = options->full ? N_CUTS : (int)(sizeof few_cuts / sizeof *few_cuts);
        for (int c = 0; c < n_cuts; c++) {
            int i = options->full ? c : few_cuts[c];
            cut_lot(cut, lot, &reference, "max_tokens", i);
            try_cut(plain, group, &way, cut, "max_tokens", i);
            cut_lot(cut, lot, &reference, "stop id", i);
            try_cut(plain, group, &way, cut, "stop id", i);
            try_cancel(group, &way, lot, &reference, i + 1);
        }
        local_group_destroy(group);
        printf("%s, window %d: cut at %d places by max_tokens, stop ids and Cancel\n",
               spec_mode_name(way.mode), way.window, n_cuts);
    }
    /* Prompts that end close to the context limit, at every distance. */
    static const struct mode_way far[] = {{SPEC_SD, 5, 1}, {SPEC_PEARL, 5, 1}};
    for (int m = 0; m < 2; m++) {
        struct way way = {.mode = far[m].mode, .window = far[m].window, .batch = 7};
        if (way_open(&group, &way, &err) != STATUS_OK) return 1;
        struct lot *limit = lot_near_limit(options->seed);
        try_cut(plain, group, &way, limit, "context limit", 0);
        free(limit);
        local_group_destroy(group);
    }
    local_group_destroy(plain);
    free(lot);
    free(cut);
    return failures;
}
