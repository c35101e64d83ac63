/* `sync`: both sides compare a rolling hash of the committed tokens every round. A drafter between
 * both changes one token of one order on its way; the replica must stop in that round, with both
 * histories in the words. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/lossless/lot.h"
#include "tests/lossless/parts.h"

struct liar {
    struct drafter head;
    struct drafter *honest;
    int round, lies_in_round;
    bool lied;
};

static enum status start(struct drafter *head, const struct draft_order *order,
                         struct error *err) {
    struct liar *liar = (struct liar *)head;
    struct draft_order told = *order;
    struct draft_job jobs[LOT_REQUESTS];
    int32_t own[LOT_MAX_TEXT];
    memcpy(jobs, order->jobs, (size_t)order->n_jobs * sizeof *jobs);
    told.jobs = jobs;
    for (int i = 0; i < order->n_jobs && !liar->lied && liar->round >= liar->lies_in_round; i++) {
        if (jobs[i].n_own == 0) continue;
        memcpy(own, jobs[i].own, (size_t)jobs[i].n_own * sizeof *own);
        own[jobs[i].n_own - 1]++;
        jobs[i].own = own;
        liar->lied = true;
    }
    liar->round++;
    return drafter_start(liar->honest, &told, err);
}

static enum status collect(struct drafter *head, struct draft_chain *chains, bool all,
                           struct draft_report *report, struct error *err) {
    return drafter_collect(((struct liar *)head)->honest, chains, all, report, err);
}

static const struct drafter_ops ops = {.start = start, .collect = collect};

/* remote: the words must come from the other rank. */
static int try_lie(const struct part_options *options, enum spec_mode mode, bool shared, int round) {
    static struct lot_outcomes outcomes;
    struct way way = {.mode = mode, .window = 3, .batch = 3, .shared = shared};
    struct local_group *group;
    struct error err = {.text = ""};
    struct lot *lot = lot_create(options->seed, 0);
    if (way_open(&group, &way, &err) != STATUS_OK) return 1;
    struct liar liar = {{&ops}, local_group_leadership(group)->drafter, 0, round, false};
    way.drafter = &liar.head;
    enum status status = way_run(group, &way, lot, &outcomes, &err);
    bool stopped = liar.lied && status == STATUS_ABORTED;
    bool tells = strstr(err.text, "out of step") != NULL && strstr(err.text, "hash") != NULL &&
                 strstr(err.text, "last tokens") != NULL;
    printf("%s, a lie in round %d: %s: %.160s...\n", spec_mode_name(mode), round,
           stopped && tells ? "stopped" : "FAILED", err.text);
    local_group_destroy(group);
    free(lot);
    return !(stopped && tells);
}

int part_sync(const struct part_options *options) {
    int failures = 0;
    for (int round = 1; round <= 21; round += 10) {
        failures += try_lie(options, SPEC_SD, true, round);
        failures += try_lie(options, SPEC_PEARL, false, round);
    }
    return failures;
}
