#include "worker/draft/ngram_drafter.h"

#include <stdlib.h>
#include <string.h>

#include "worker/draft/history.h"

struct ngram_drafter {
    struct drafter head;
    struct draft_history *history;
    struct draft_chain *chains; /* [max_sequences] of the round */
    int n_chains;
};

/* How many tokens before `end` and before the last token agree, at most NGRAM_MAX. */
static int agreement(const int32_t *tokens, int n_tokens, int end) {
    int n = 0;
    while (n < NGRAM_MAX && n < end && tokens[end - 1 - n] == tokens[n_tokens - 1 - n]) n++;
    return n;
}

int ngram_find(const int32_t *tokens, int n_tokens) {
    int best = -1, longest = NGRAM_MIN - 1;
    for (int end = n_tokens - 1; end >= NGRAM_MIN && longest < NGRAM_MAX; end--) {
        int n = agreement(tokens, n_tokens, end);
        if (n <= longest) continue;
        longest = n;
        best = end;
    }
    return best;
}

/* The tokens that followed, as far as they are known; a repeating text goes on repeating. */
static void propose(struct draft_sequence *sequence, struct draft_chain *chain, int n) {
    chain->n = 0;
    int from = ngram_find(sequence->tokens, draft_sequence_length(sequence));
    if (from < 0) return;
    while (chain->n < n) {
        int32_t token = sequence->tokens[from++];
        chain->q[chain->n] = 1;
        chain->tokens[chain->n++] = token;
        draft_history_append(sequence, token);
        if (draft_sequence_ends_with(sequence, token)) return;
    }
}

static enum status start(struct drafter *head, const struct draft_order *order,
                         struct error *err) {
    struct ngram_drafter *d = (struct ngram_drafter *)head;
    for (int i = 0; i < order->n_ends; i++) draft_history_end(d->history, order->ends[i]);
    for (int i = 0; i < order->n_begins; i++) draft_history_begin(d->history, &order->begins[i]);
    d->n_chains = order->n_jobs;
    for (int i = 0; i < order->n_jobs; i++) {
        bool dropped;
        TRY(draft_history_apply(d->history, &order->jobs[i], &dropped, err));
        propose(&d->history->sequences[order->jobs[i].slot], &d->chains[i],
                order->jobs[i].plan.make);
    }
    return STATUS_OK;
}

static enum status collect(struct drafter *head, struct draft_chain *chains, bool all,
                           struct draft_report *report, struct error *err) {
    (void)all;
    (void)err;
    struct ngram_drafter *d = (struct ngram_drafter *)head;
    memcpy(chains, d->chains, (size_t)d->n_chains * sizeof *chains);
    if (report != NULL) *report = (struct draft_report){0};
    return STATUS_OK;
}

/* All probability lies on the proposed token. */
static enum status distribution(struct drafter *head, float *q, int slot, int index,
                                struct error *err) {
    (void)err;
    struct ngram_drafter *d = (struct ngram_drafter *)head;
    const struct draft_sequence *sequence = &d->history->sequences[slot];
    CHECK(index < sequence->n_candidates);
    q[sequence->tokens[sequence->n_committed + index]] = 1;
    return STATUS_OK;
}

static enum status stop(struct drafter *head, struct error *err) {
    (void)head;
    (void)err;
    return STATUS_OK;
}

static void destroy(struct drafter *head) {
    struct ngram_drafter *d = (struct ngram_drafter *)head;
    draft_history_destroy(d->history);
    free(d->chains);
    free(d);
}

static const struct drafter_ops ops = {start, collect, distribution, stop, destroy};

struct drafter *ngram_drafter_create(int max_sequences) {
    struct ngram_drafter *d = xcalloc(1, sizeof *d);
    d->head.ops = &ops;
    d->history = draft_history_create(max_sequences, INT32_MAX);
    d->chains = xcalloc((size_t)max_sequences, sizeof *d->chains);
    return &d->head;
}
