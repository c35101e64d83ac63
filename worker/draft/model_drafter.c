#include "worker/draft/model_drafter.h"

#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "worker/draft/history.h"
#include "worker/kv_blocks.h"
#include "worker/trace.h"

/* A slot can have so many candidates at once: a tail, a block, and the one drawn in the slack. */
enum { MAX_CANDIDATES = 2 * SPEC_MAX_WINDOW + 1 };

/* What the model's side of a sequence is. present >= exact. */
struct place {
    struct kv_sequence kv;
    int present, exact; /* positions 0..n-1 have KV, and KV of an exact pass */
    bool has_next;      /* the token behind everything known was drawn in the slack */
    int32_t next;
    float *rows;        /* [MAX_CANDIDATES][vocab] distributions by position modulo; NULL: none kept */
};

/* A job of this round. */
struct active {
    int slot;
    struct round_plan plan;
    int made;
    bool ended; /* nothing more is worth or possible */
};

struct model_drafter {
    struct drafter head;
    struct model_drafter_options options;
    struct draft_history *history;
    struct kv_blocks *pool;
    struct place *places;   /* [max_sequences] */
    struct active *actives; /* [max_sequences] */
    int n_actives;
    int layer_width;
    bool begun; /* the round's first pass is done */
    /* One pass. */
    int32_t *tokens;                  /* [max_rows] */
    struct backend_segment *segments; /* [max_sequences] */
    int32_t *logit_rows;              /* [max_sequences] */
    int *owners;                      /* [max_sequences] active that a logit row belongs to */
    int n_rows, n_segments, n_logit_rows;
    struct sample_params *params;     /* [max_sequences], as are the next two: the pass's draws */
    struct sample_draw *draws;
    struct sample_result *results;
    /* A block whose passes feed each other on the device: draws the host has not seen yet. */
    bool feeds;    /* this round */
    int n_batches;
    int (*fed_owners)[BACKEND_MAX_FED]; /* [BACKEND_FED_BATCHES] active that a draw belongs to */
    int n_fed[BACKEND_FED_BATCHES];
    int32_t *fed_tokens; /* [BACKEND_FED_BATCHES][BACKEND_MAX_FED] */
    int64_t fed_since_ns;
    struct draft_report report;
    int64_t exact_ns, fuzzy_ns, answered_ns;
    int n_exact, n_fuzzy;
};

static struct model_drafter *self(struct drafter *head) {
    return (struct model_drafter *)head;
}

/* --- the order --------------------------------------------------------------------------------- */

static void forget_kv(struct model_drafter *d, struct place *place) {
    kv_blocks_release(d->pool, &place->kv);
    place->present = place->exact = 0;
    place->has_next = false;
}

static void end_slot(struct model_drafter *d, int slot) {
    draft_history_end(d->history, slot);
    struct place *place = &d->places[slot];
    forget_kv(d, place);
    free(place->rows);
    place->rows = NULL;
}

static enum status apply_job(struct model_drafter *d, const struct draft_job *job,
                             struct error *err) {
    bool dropped;
    TRY(draft_history_apply(d->history, job, &dropped, err));
    struct draft_sequence *sequence = &d->history->sequences[job->slot];
    struct place *place = &d->places[job->slot];
    if (!dropped && job->n_own == 0) return STATUS_OK;
    place->has_next = false;
    int valid = sequence->n_committed - job->n_own;
    if (place->present > valid) place->present = valid;
    if (place->exact > place->present) place->exact = place->present;
    kv_blocks_truncate(d->pool, &place->kv, place->present);
    return STATUS_OK;
}

static enum status start(struct drafter *head, const struct draft_order *order,
                         struct error *err) {
    struct model_drafter *d = self(head);
    d->report = (struct draft_report){0};
    d->exact_ns = d->fuzzy_ns = 0;
    d->n_exact = d->n_fuzzy = 0;
    if (d->answered_ns != 0) d->report.waited_ns = clock_now_ns() - d->answered_ns;
    trace_set_round(d->options.trace, order->round);
    for (int i = 0; i < order->n_ends; i++) end_slot(d, order->ends[i]);
    for (int i = 0; i < order->n_begins; i++) draft_history_begin(d->history, &order->begins[i]);
    CHECK(order->n_jobs <= d->options.max_sequences);
    d->n_actives = order->n_jobs;
    d->layer_width = order->layer_width;
    d->begun = false;
    for (int i = 0; i < order->n_jobs; i++) {
        TRY(apply_job(d, &order->jobs[i], err));
        d->actives[i] = (struct active){order->jobs[i].slot, order->jobs[i].plan, 0,
                                        order->jobs[i].plan.make == 0};
    }
    return STATUS_OK;
}

/* --- drawing ----------------------------------------------------------------------------------- */

static float *row_of(struct model_drafter *d, struct place *place, int position) {
    size_t vocab = (size_t)d->options.vocab;
    if (place->rows == NULL) place->rows = xcalloc(MAX_CANDIDATES * vocab, sizeof *place->rows);
    return place->rows + (size_t)(position % MAX_CANDIDATES) * vocab;
}

static void add_draw(struct model_drafter *d, int i) {
    int slot = d->actives[d->owners[i]].slot;
    struct draft_sequence *sequence = &d->history->sequences[slot];
    int length = draft_sequence_length(sequence);
    d->params[i] = draft_sequence_params(sequence);
    d->draws[i] = (struct sample_draw){
        .params = &d->params[i],
        .history = sequence->tokens,
        .n_prompt = sequence->n_prompt,
        .n_history = length,
        .position = length,
        .candidate = -1,
    };
}

/* Starts drawing the token behind everything known of each logit row's owner. */
static enum status begin_draws(struct model_drafter *d, float *logits, struct error *err) {
    struct backend *backend = d->options.backend;
    int stride = d->options.stride, vocab = d->options.vocab;
    for (int i = 0; i < d->n_logit_rows; i++) {
        add_draw(d, i);
        if (!d->options.keeps_distributions) continue;
        struct place *place = &d->places[d->actives[d->owners[i]].slot];
        TRY(backend_distribution(backend, row_of(d, place, (int)d->draws[i].position),
                                 logits + (size_t)i * (size_t)stride, vocab, &d->draws[i], err));
    }
    backend_sample_begin(backend, logits, stride, vocab, d->draws, d->n_logit_rows);
    return STATUS_OK;
}

/* The same, and their results. */
static enum status draw_all(struct model_drafter *d, float *logits, struct error *err) {
    if (d->n_logit_rows == 0) return STATUS_OK;
    TRY(begin_draws(d, logits, err));
    return backend_sample_end(d->options.backend, d->results, err);
}

static void take(struct model_drafter *d, struct active *active, int32_t token) {
    struct draft_sequence *sequence = &d->history->sequences[active->slot];
    struct sample_params params = draft_sequence_params(sequence);
    draft_history_append(sequence, token);
    active->made++;
    bool banned = params.n_banned > 0;
    active->ended = active->made == active->plan.make ||
                    (!banned && draft_sequence_ends_with(sequence, token));
}

/* What is proposed behind everything known of a slot where the model drew `token`. */
static int32_t replaced(struct model_drafter *d, int slot, int32_t token) {
    const struct draft_sequence *sequence = &d->history->sequences[slot];
    if (d->options.replace == NULL) return token;
    int32_t other = d->options.replace(d->options.replace_user, sequence->sampling.seed,
                                       draft_sequence_length(sequence));
    return other >= 0 ? other : token;
}

static void take_all(struct model_drafter *d) {
    for (int i = 0; i < d->n_logit_rows; i++) {
        struct active *active = &d->actives[d->owners[i]];
        take(d, active, replaced(d, active->slot, d->results[i].token));
    }
}

/* --- passes ------------------------------------------------------------------------------------ */

static void clear_pass(struct model_drafter *d) {
    d->n_rows = d->n_segments = d->n_logit_rows = 0;
}

/* Rows [from, from + n_rows) of a slot join the pass. owner: the active that the last row's logits
 * are for, -1: none. */
static void add_rows(struct model_drafter *d, int slot, int from, int n_rows, int owner) {
    const struct draft_sequence *sequence = &d->history->sequences[slot];
    memcpy(d->tokens + d->n_rows, sequence->tokens + from, (size_t)n_rows * sizeof *d->tokens);
    d->segments[d->n_segments++] =
        (struct backend_segment){d->n_rows, n_rows, from, d->places[slot].kv.blocks};
    d->n_rows += n_rows;
    if (owner < 0) return;
    d->owners[d->n_logit_rows] = owner;
    d->logit_rows[d->n_logit_rows++] = d->n_rows - 1;
}

/* --- blocks on a device ------------------------------------------------------------------------ */

/* Whether this round's tokens can stay on the device until the block is done: nothing but the next
 * pass needs them there. */
static bool can_feed(const struct model_drafter *d) {
    if (!d->options.feeds || d->options.keeps_distributions) return false;
    if (d->options.max_sequences > BACKEND_MAX_FED) return false;
    for (int i = 0; i < d->n_actives; i++) {
        const struct sample_params *s = &d->history->sequences[d->actives[i].slot].sampling;
        if (s->repetition_penalty != 1 || s->presence_penalty != 0 || s->frequency_penalty != 0) {
            return false;
        }
    }
    return true;
}

/* Each chain grows by a token that only the device knows. */
static enum status take_fed(struct model_drafter *d, float *logits, struct error *err) {
    if (d->n_logit_rows == 0) return STATUS_OK;
    CHECK(d->n_batches < BACKEND_FED_BATCHES);
    TRY(begin_draws(d, logits, err));
    for (int i = 0; i < d->n_logit_rows; i++) {
        struct active *active = &d->actives[d->owners[i]];
        draft_history_append(&d->history->sequences[active->slot],
                             replaced(d, active->slot, BACKEND_FED(i)));
        active->made++;
        active->ended = active->made == active->plan.make;
        d->fed_owners[d->n_batches][i] = d->owners[i];
    }
    d->n_fed[d->n_batches++] = d->n_logit_rows;
    return STATUS_OK;
}

/* What a chain has behind an end token was drafted in vain. */
static void cut_at_end(struct model_drafter *d, struct active *active) {
    struct draft_sequence *sequence = &d->history->sequences[active->slot];
    struct place *place = &d->places[active->slot];
    int made = active->made, all = sequence->n_candidates;
    for (int i = 0; i < made; i++) {
        sequence->n_candidates = all - made + i;
        struct sample_params params = draft_sequence_params(sequence);
        sequence->n_candidates++;
        int32_t token = sequence->tokens[draft_sequence_length(sequence) - 1];
        if (params.n_banned > 0 || !draft_sequence_ends_with(sequence, token)) continue;
        active->made = i + 1;
        active->ended = true;
        int length = draft_sequence_length(sequence);
        if (place->present > length - 1) place->present = length - 1;
        if (place->exact > place->present) place->exact = place->present;
        return;
    }
}

/* The host learns what was drawn. Tokens were appended in the order of batches, at the end. */
static enum status settle_fed(struct model_drafter *d, struct error *err) {
    if (d->n_batches == 0) return STATUS_OK;
    TRY(backend_fed_tokens(d->options.backend, d->fed_tokens, d->n_batches, err));
    for (int batch = d->n_batches - 1; batch >= 0; batch--) {
        for (int i = 0; i < d->n_fed[batch]; i++) {
            struct active *active = &d->actives[d->fed_owners[batch][i]];
            struct draft_sequence *sequence = &d->history->sequences[active->slot];
            int at = draft_sequence_length(sequence) - 1;
            /* The last that is not known; one that was replaced is. */
            while (at >= sequence->n_committed && sequence->tokens[at] >= 0) at--;
            if (at < sequence->n_committed) continue;
            sequence->tokens[at] = d->fed_tokens[batch * BACKEND_MAX_FED + i];
        }
    }
    for (int i = 0; i < d->n_actives; i++) cut_at_end(d, &d->actives[i]);
    int64_t took = clock_now_ns() - d->fed_since_ns;
    bool fuzzy = d->layer_width > 1;
    *(fuzzy ? &d->fuzzy_ns : &d->exact_ns) += took;
    *(fuzzy ? &d->n_fuzzy : &d->n_exact) += d->n_batches;
    d->n_batches = 0;
    return STATUS_OK;
}

/* --- one pass ---------------------------------------------------------------------------------- */

static enum status run_pass(struct model_drafter *d, int layer_width, float **logits,
                            struct error *err) {
    struct transformer_batch batch = {
        .tokens = d->tokens,
        .n_rows = d->n_rows,
        .segments = d->segments,
        .n_segments = d->n_segments,
        .logit_rows = d->logit_rows,
        .n_logit_rows = d->n_logit_rows,
        .layer_width = layer_width,
        .runs_on = d->feeds,
    };
    return engine_forward(d->options.engine, ENGINE_DRAFT, &batch, logits, err);
}

/* Finds the longest known prefix for a sequence without KV, and room for `n_positions`. False: its
 * KV is given back, it is not drafted for now. */
static bool make_room(struct model_drafter *d, int slot, int n_positions) {
    struct place *place = &d->places[slot];
    const struct draft_sequence *sequence = &d->history->sequences[slot];
    if (place->kv.n_blocks == 0) {
        place->exact = place->present = kv_blocks_match(d->pool, &place->kv, sequence->tokens,
                                                        sequence->n_committed);
    }
    if (kv_blocks_extend(d->pool, &place->kv, n_positions)) return true;
    forget_kv(d, place);
    return false;
}

/* Rows of a slot up to `end` that are not exact yet join the first pass, as far as it has room;
 * the last one at least, for its logits. True: all of them did. */
static bool add_inexact(struct model_drafter *d, int slot, int end, int owner) {
    struct place *place = &d->places[slot];
    int from = place->exact < end ? place->exact : end - 1;
    int room = d->options.max_rows - d->n_rows, need = end - from;
    int n_rows = need < room ? need : room;
    bool whole = n_rows == need;
    if (n_rows == 0) return false;
    if (place->exact < from + n_rows) place->exact = from + n_rows;
    if (place->present < place->exact) place->present = place->exact;
    add_rows(d, slot, from, n_rows, whole ? owner : -1);
    return whole;
}

static void publish(struct model_drafter *d, int slot) {
    const struct draft_sequence *sequence = &d->history->sequences[slot];
    struct place *place = &d->places[slot];
    int n = place->exact < sequence->n_committed ? place->exact : sequence->n_committed;
    kv_blocks_publish(d->pool, &place->kv, sequence->tokens, n);
}

static bool has_job(const struct model_drafter *d, int slot) {
    for (int i = 0; i < d->n_actives; i++) {
        if (d->actives[i].slot == slot && d->actives[i].plan.make > 0) return true;
    }
    return false;
}

/* Prompts of sequences that nothing is wanted of yet, as far as the pass has room. */
static void add_prompts(struct model_drafter *d) {
    for (int slot = 0; slot < d->options.max_sequences; slot++) {
        const struct draft_sequence *sequence = &d->history->sequences[slot];
        if (!sequence->live || d->places[slot].exact >= sequence->n_committed - 1) continue;
        if (has_job(d, slot) || d->n_rows == d->options.max_rows) continue;
        if (!make_room(d, slot, sequence->n_committed)) continue;
        if (d->places[slot].exact >= sequence->n_committed - 1) continue; /* found in the cache */
        if (!add_inexact(d, slot, sequence->n_committed - 1, -1)) d->report.prefilling = true;
    }
}

static void publish_all(struct model_drafter *d) {
    for (int slot = 0; slot < d->options.max_sequences; slot++) {
        if (d->history->sequences[slot].live) publish(d, slot);
    }
}

/* The round's first pass: exact, from the last exact position on. */
static enum status first_pass(struct model_drafter *d, struct error *err) {
    d->begun = true;
    clear_pass(d);
    int n_calibrated = 0;
    for (int i = 0; i < d->n_actives; i++) {
        struct active *active = &d->actives[i];
        struct place *place = &d->places[active->slot];
        int length = draft_sequence_length(&d->history->sequences[active->slot]);
        if (active->ended) continue;
        if (!make_room(d, active->slot, length + active->plan.make)) {
            active->ended = true;
        } else if (place->has_next) {
            place->has_next = false;
            take(d, active, place->next);
        } else {
            n_calibrated += place->exact < place->present;
            if (add_inexact(d, active->slot, length, i)) continue;
            active->ended = true;
            d->report.prefilling = true;
        }
    }
    add_prompts(d);
    if (d->n_rows == 0) return STATUS_OK;
    float *logits;
    int64_t begin = clock_now_ns();
    TRY(run_pass(d, 1, &logits, err));
    int64_t took = clock_now_ns() - begin;
    bool steps = d->n_rows <= 2 * d->n_logit_rows;
    if (d->feeds) {
        publish_all(d);
        return take_fed(d, logits, err);
    }
    if (n_calibrated > 0) {
        d->report.calibrate_ns = took;
        trace_add(d->options.trace, "calibration", begin, begin + took);
    } else if (steps) {
        d->exact_ns += took;
        d->n_exact++;
    }
    publish_all(d);
    TRY(draw_all(d, logits, err));
    take_all(d);
    return STATUS_OK;
}

/* One more token for every chain that still grows. */
static enum status next_pass(struct model_drafter *d, struct error *err) {
    clear_pass(d);
    for (int i = 0; i < d->n_actives; i++) {
        struct active *active = &d->actives[i];
        if (active->ended) continue;
        struct place *place = &d->places[active->slot];
        int length = draft_sequence_length(&d->history->sequences[active->slot]);
        add_rows(d, active->slot, place->present, length - place->present, i);
        bool exact = d->layer_width <= 1 && place->exact == place->present;
        if (exact || d->options.keeps_fuzzy) place->exact = length;
        place->present = length;
    }
    float *logits;
    int64_t begin = clock_now_ns();
    TRY(run_pass(d, d->layer_width, &logits, err));
    if (d->feeds) return take_fed(d, logits, err);
    int64_t took = clock_now_ns() - begin;
    if (d->layer_width > 1) {
        d->fuzzy_ns += took;
        d->n_fuzzy++;
    } else {
        d->exact_ns += took;
        d->n_exact++;
    }
    TRY(draw_all(d, logits, err));
    take_all(d);
    return STATUS_OK;
}

/* Some chain has fewer tokens than are waited for. */
static bool wanting(const struct model_drafter *d, bool all) {
    for (int i = 0; i < d->n_actives; i++) {
        const struct active *active = &d->actives[i];
        if (!active->ended && (all || active->made < active->plan.wait)) return true;
    }
    return false;
}

static void answer(struct model_drafter *d, struct draft_chain *chains) {
    for (int i = 0; i < d->n_actives; i++) {
        const struct active *active = &d->actives[i];
        const struct draft_sequence *sequence = &d->history->sequences[active->slot];
        int first = draft_sequence_length(sequence) - active->made;
        chains[i].n = active->made;
        for (int j = 0; j < active->made; j++) {
            int32_t token = sequence->tokens[first + j];
            chains[i].tokens[j] = token;
            if (!d->options.keeps_distributions) continue;
            chains[i].q[j] = row_of(d, &d->places[active->slot], first + j)[token];
        }
    }
}

static enum status collect(struct drafter *head, struct draft_chain *chains, bool all,
                           struct draft_report *report, struct error *err) {
    struct model_drafter *d = self(head);
    d->feeds = can_feed(d);
    d->fed_since_ns = clock_now_ns();
    if (!d->begun) TRY(first_pass(d, err));
    while (wanting(d, all)) {
        if (d->n_batches == BACKEND_FED_BATCHES) TRY(settle_fed(d, err));
        TRY(next_pass(d, err));
    }
    TRY(settle_fed(d, err));
    d->feeds = false;
    answer(d, chains);
    if (!all) return STATUS_OK;
    if (d->n_exact > 0) d->report.step_ns = d->exact_ns / d->n_exact;
    if (d->n_fuzzy > 0) d->report.fuzzy_ns = d->fuzzy_ns / d->n_fuzzy;
    if (report != NULL) *report = d->report;
    d->answered_ns = clock_now_ns();
    return STATUS_OK;
}

int model_drafter_exact(const struct drafter *head, int slot, const int32_t **blocks) {
    const struct place *place = &((const struct model_drafter *)head)->places[slot];
    *blocks = place->kv.blocks;
    return place->exact;
}

/* --- calibration in the slack ----------------------------------------------------------------- */

bool model_drafter_is_fuzzy(const struct drafter *head) {
    const struct model_drafter *d = (const struct model_drafter *)head;
    for (int i = 0; i < d->n_actives; i++) {
        const struct place *place = &d->places[d->actives[i].slot];
        if (d->actives[i].made > 0 && place->exact < place->present) return true;
    }
    return false;
}

enum status model_drafter_calibrate(struct drafter *head, int64_t *took_ns, struct error *err) {
    struct model_drafter *d = self(head);
    int64_t begin = clock_now_ns();
    clear_pass(d);
    for (int i = 0; i < d->n_actives; i++) {
        const struct active *active = &d->actives[i];
        const struct draft_sequence *sequence = &d->history->sequences[active->slot];
        struct place *place = &d->places[active->slot];
        int length = draft_sequence_length(sequence);
        bool grew = active->made > 0 && active->made == active->plan.make;
        if (!grew || place->exact == place->present) continue;
        if (d->n_rows + length - place->exact > d->options.max_rows) continue;
        add_inexact(d, active->slot, length, i);
    }
    *took_ns = 0;
    if (d->n_rows == 0) return STATUS_OK;
    float *logits;
    TRY(run_pass(d, 1, &logits, err));
    TRY(draw_all(d, logits, err));
    for (int i = 0; i < d->n_logit_rows; i++) {
        int slot = d->actives[d->owners[i]].slot;
        d->places[slot].next = replaced(d, slot, d->results[i].token);
        d->places[slot].has_next = true;
    }
    *took_ns = clock_now_ns() - begin;
    trace_add(d->options.trace, "calibration", begin, begin + *took_ns);
    return STATUS_OK;
}

/* --- the rest --------------------------------------------------------------------------------- */

static enum status distribution(struct drafter *head, float *q, int slot, int index,
                                struct error *err) {
    struct model_drafter *d = self(head);
    const struct draft_sequence *sequence = &d->history->sequences[slot];
    if (!d->options.keeps_distributions || index >= sequence->n_candidates) {
        return error_set(err, STATUS_INTERNAL, "no distribution of candidate %d in slot %d is kept",
                         index, slot);
    }
    memcpy(q, row_of(d, &d->places[slot], sequence->n_committed + index),
           (size_t)d->options.vocab * sizeof *q);
    return STATUS_OK;
}

/* The engine is stopped by whoever leads its group. */
static enum status stop(struct drafter *head, struct error *err) {
    (void)head;
    (void)err;
    return STATUS_OK;
}

static void destroy(struct drafter *head) {
    struct model_drafter *d = self(head);
    for (int slot = 0; slot < d->options.max_sequences; slot++) {
        if (d->history->sequences[slot].live) end_slot(d, slot);
        kv_sequence_free(&d->places[slot].kv);
    }
    draft_history_destroy(d->history);
    kv_blocks_destroy(d->pool);
    free(d->fed_owners);
    free(d->fed_tokens);
    void *memory[] = {d->places,   d->actives, d->tokens, d->segments,
                      d->logit_rows, d->owners, d->params, d->draws, d->results};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
    free(d);
}

static const struct drafter_ops ops = {start, collect, distribution, stop, destroy};

struct drafter *model_drafter_create(const struct model_drafter_options *options) {
    struct model_drafter *d = xcalloc(1, sizeof *d);
    size_t n = (size_t)options->max_sequences;
    d->head.ops = &ops;
    d->options = *options;
    d->history = draft_history_create(options->max_sequences, options->vocab);
    d->pool = kv_blocks_create(options->n_blocks, options->prefix_cache);
    d->places = xcalloc(n, sizeof *d->places);
    d->actives = xcalloc(n, sizeof *d->actives);
    d->tokens = xcalloc((size_t)options->max_rows, sizeof *d->tokens);
    d->segments = xcalloc(n, sizeof *d->segments);
    d->logit_rows = xcalloc(n, sizeof *d->logit_rows);
    d->owners = xcalloc(n, sizeof *d->owners);
    d->fed_owners = xcalloc(BACKEND_FED_BATCHES, sizeof *d->fed_owners);
    d->fed_tokens = xcalloc(BACKEND_FED_BATCHES * BACKEND_MAX_FED, sizeof *d->fed_tokens);
    d->params = xcalloc(n, sizeof *d->params);
    d->draws = xcalloc(n, sizeof *d->draws);
    d->results = xcalloc(n, sizeof *d->results);
    return &d->head;
}
