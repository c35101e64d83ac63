#include "worker/draft/oracle_drafter.h"

#include <stdlib.h>
#include <string.h>

#include "common/philox.h"
#include "worker/draft/history.h"

struct text {
    const int32_t *tokens;
    int n;
};

struct oracle_drafter {
    struct drafter head;
    struct oracle_drafter_options options;
    struct draft_history *history;
    struct text *texts;         /* [max_sequences] */
    struct draft_chain *chains; /* [max_sequences] of the round */
    int n_chains;
    uint32_t n_drawn;
};

/* Fresh chance at every proposal, also where one is made again at the same position. */
static bool knows(struct oracle_drafter *d) {
    uint32_t key[2] = {(uint32_t)d->options.seed, (uint32_t)(d->options.seed >> 32)};
    uint32_t counter[4] = {d->n_drawn++, 0, 0, 0}, words[4];
    philox4x32_10(words, counter, key);
    return (double)philox_uniform(words[0]) < d->options.accuracy;
}

static void propose(struct oracle_drafter *d, const struct draft_job *job,
                    struct draft_chain *chain) {
    struct draft_sequence *sequence = &d->history->sequences[job->slot];
    const struct text *text = &d->texts[job->slot];
    chain->n = 0;
    while (chain->n < job->plan.make) {
        int position = draft_sequence_length(sequence);
        if (position >= text->n) return;
        int32_t token = text->tokens[position];
        if (!knows(d)) token = (token + 1) % d->options.vocab;
        chain->q[chain->n] = 1;
        chain->tokens[chain->n++] = token;
        draft_history_append(sequence, token);
    }
}

static enum status start(struct drafter *head, const struct draft_order *order,
                         struct error *err) {
    struct oracle_drafter *d = (struct oracle_drafter *)head;
    for (int i = 0; i < order->n_ends; i++) draft_history_end(d->history, order->ends[i]);
    for (int i = 0; i < order->n_begins; i++) {
        const struct draft_begin *begin = &order->begins[i];
        struct text *text = &d->texts[begin->slot];
        draft_history_begin(d->history, begin);
        text->tokens = d->options.truth(d->options.user, begin, &text->n);
    }
    d->n_chains = order->n_jobs;
    for (int i = 0; i < order->n_jobs; i++) {
        bool dropped;
        TRY(draft_history_apply(d->history, &order->jobs[i], &dropped, err));
        propose(d, &order->jobs[i], &d->chains[i]);
    }
    return STATUS_OK;
}

static enum status collect(struct drafter *head, struct draft_chain *chains, bool all,
                           struct draft_report *report, struct error *err) {
    (void)all;
    (void)err;
    struct oracle_drafter *d = (struct oracle_drafter *)head;
    memcpy(chains, d->chains, (size_t)d->n_chains * sizeof *chains);
    if (report != NULL) *report = (struct draft_report){0};
    return STATUS_OK;
}

static enum status distribution(struct drafter *head, float *q, int slot, int index,
                                struct error *err) {
    (void)err;
    struct oracle_drafter *d = (struct oracle_drafter *)head;
    const struct draft_sequence *sequence = &d->history->sequences[slot];
    q[sequence->tokens[sequence->n_committed + index]] = 1;
    return STATUS_OK;
}

static enum status stop(struct drafter *head, struct error *err) {
    (void)head;
    (void)err;
    return STATUS_OK;
}

static void destroy(struct drafter *head) {
    struct oracle_drafter *d = (struct oracle_drafter *)head;
    draft_history_destroy(d->history);
    free(d->texts);
    free(d->chains);
    free(d);
}

static const struct drafter_ops ops = {start, collect, distribution, stop, destroy};

struct drafter *oracle_drafter_create(const struct oracle_drafter_options *options) {
    struct oracle_drafter *d = xcalloc(1, sizeof *d);
    d->head.ops = &ops;
    d->options = *options;
    d->history = draft_history_create(options->max_sequences, options->vocab);
    d->texts = xcalloc((size_t)options->max_sequences, sizeof *d->texts);
    d->chains = xcalloc((size_t)options->max_sequences, sizeof *d->chains);
    return &d->head;
}
