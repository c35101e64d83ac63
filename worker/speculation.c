#include "worker/speculation.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "common/log.h"
#include "worker/draft/history.h"
#include "worker/spec/spec_counts.h"
#include "worker/trace.h"

struct speculation {
    struct speculation_options options;
    struct spec_policy policy;
    uint32_t round;
    int *free_slots; /* a stack */
    int n_free;
    int *ends; /* slots to be told as free; grows: one may begin and end between two orders */
    int n_ends, ends_capacity;
    /* The order that is out. */
    struct draft_begin *begins; /* [max_sequences] */
    struct draft_job *jobs;     /* [max_sequences] */
    struct scheduler_item **items; /* [max_sequences] each job's */
    struct draft_chain *chains; /* [max_sequences] */
    int n_begins, n_jobs, layer_width;
    bool out;        /* an order is out and not collected as a whole */
    bool prefilling; /* the drafter still computes prompts */
    int64_t idle_since_ns; /* end of the last step; a pause is no wait */
    bool followed;   /* this step follows the last one at once */
    struct spec_counts counts;
};

struct speculation *speculation_create(const struct speculation_options *options) {
    struct speculation *s = xcalloc(1, sizeof *s);
    size_t n = (size_t)options->max_sequences;
    s->options = *options;
    s->policy = (struct spec_policy){.mode = SPEC_PLAIN, .window = 1, .layer_width = 1};
    s->free_slots = xcalloc(n, sizeof *s->free_slots);
    s->n_free = options->max_sequences;
    for (int i = 0; i < s->n_free; i++) s->free_slots[i] = s->n_free - 1 - i;
    s->begins = xcalloc(n, sizeof *s->begins);
    s->jobs = xcalloc(n, sizeof *s->jobs);
    s->items = xcalloc(n, sizeof *s->items);
    s->chains = xcalloc(n, sizeof *s->chains);
    s->counts.handoff_ns = options->handoff_ns;
    return s;
}

void speculation_destroy(struct speculation *s) {
    if (s == NULL) return;
    void *memory[] = {s->free_slots, s->ends, s->begins, s->jobs, s->items, s->chains};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) free(memory[i]);
    free(s);
}

static int clamp(int value, int low, int high) {
    return value < low ? low : value > high ? high : value;
}

struct spec_policy speculation_fit(const struct speculation *s, const struct spec_policy *policy) {
    struct spec_policy fit = *policy;
    if (!s->options.remote && fit.mode == SPEC_PEARL) fit.mode = SPEC_SD;
    if (!s->options.remote && fit.mode == SPEC_PEARL_LP) fit.mode = SPEC_EASYSPEC;
    fit.window = clamp(fit.window, 1, s->options.max_window);
    fit.layer_width = clamp(fit.layer_width, 1, SPEC_MAX_LAYER_WIDTH);
    fit.delay = clamp(fit.delay, 0, fit.window);
    return fit;
}

void speculation_set_policy(struct speculation *s, const struct spec_policy *policy) {
    s->policy = *policy;
    spec_counts_policy_changed(&s->counts);
}

/* --- the order -------------------------------------------------------------------------------- */

static void update_hash(struct request *request) {
    struct request_spec *spec = &request->spec;
    for (; spec->n_hashed < request->n_tokens; spec->n_hashed++) {
        spec->hash = draft_history_hash(spec->hash, request->tokens[spec->n_hashed]);
    }
}

static void add_begin(struct speculation *s, struct request *request) {
    CHECK(s->n_free > 0);
    request->spec.slot = s->free_slots[--s->n_free];
    request->spec.n_told = request->n_tokens;
    request->spec.n_accepted_since = 0;
    request->spec.abandon = false;
    s->begins[s->n_begins++] = (struct draft_begin){
        .slot = request->spec.slot,
        .tokens = request->tokens,
        .n_prompt = request->n_prompt,
        .n_tokens = request->n_tokens,
        .sampling = request->sampling,
        .stop_ids = request->stop_ids,
        .n_stop_ids = request->n_stop_ids,
        .min_tokens = request->min_tokens,
    };
}

static void add_job(struct speculation *s, struct scheduler_item *item) {
    struct request *request = item->request;
    struct request_spec *spec = &request->spec;
    int first_own = spec->n_told + spec->n_accepted_since;
    update_hash(request);
    s->items[s->n_jobs] = item;
    s->jobs[s->n_jobs++] = (struct draft_job){
        .slot = spec->slot,
        .accepted = spec->n_accepted_since,
        .n_own = request->n_tokens - first_own,
        .own = request->tokens + first_own,
        .abandon = spec->abandon,
        .plan = item->round,
        .n_committed = request->n_tokens,
        .hash = spec->hash,
    };
    spec->n_told = request->n_tokens;
    spec->n_accepted_since = 0;
    spec->abandon = false;
}

/* Layer-parallel steps only where every sequence of the round is in such a mode: the others were
 * promised exact ones. */
static int width_of(const struct speculation *s, const struct scheduler_plan *plan) {
    for (int i = 0; i < plan->n_items; i++) {
        const struct scheduler_item *item = &plan->items[i];
        if (item->round.make == 0) continue;
        enum spec_mode mode = spec_policy_mode(&s->policy, &item->request->spec.wish);
        if (!spec_mode_layer_parallel(mode)) return 1;
    }
    return s->policy.layer_width;
}

static bool is_speculative(const struct speculation *s, const struct request *request) {
    return spec_policy_mode(&s->policy, &request->spec.wish) != SPEC_PLAIN;
}

static struct draft_order gather_order(struct speculation *s, struct scheduler_plan *plan) {
    struct draft_order order = {
        .round = s->round,
        .ends = s->ends,
        .n_ends = s->n_ends,
        .begins = s->begins,
        .jobs = s->jobs,
        .layer_width = width_of(s, plan),
    };
    s->n_begins = s->n_jobs = 0;
    for (int i = 0; i < plan->n_items; i++) {
        struct scheduler_item *item = &plan->items[i];
        struct request *request = item->request;
        if (request->spec.slot < 0 && is_speculative(s, request)) add_begin(s, request);
        if (item->round.make == 0) continue;
        add_job(s, item);
        order.early |= item->round.wait > 0;
    }
    order.n_begins = s->n_begins;
    order.n_jobs = s->n_jobs;
    s->layer_width = order.layer_width;
    return order;
}

/* --- the tokens ------------------------------------------------------------------------------- */

/* Candidates of the chain come to stand behind the tail. */
static void place_chain(struct speculation *s, struct scheduler_item *item,
                        const struct draft_chain *chain) {
    struct request *request = item->request;
    int first = item->round.tail;
    scheduler_reserve(request, request->n_tokens + first + chain->n + 1);
    for (int j = 0; j < chain->n; j++) {
        request->tokens[request->n_tokens + first + j] = chain->tokens[j];
        request->spec.candidates[first + j] =
            (struct candidate){chain->q[j], j > 0 && s->layer_width > 1};
    }
}

/* Fewer tokens than the target was to wait for: its rows shrink. */
static void shrink_wait(struct scheduler_item *item, int n) {
    if (n >= item->round.wait) return;
    item->round.wait = n;
    item->n_rows = round_rows(item->round);
}

/* The draft says what it has; this is the target's side of the same sequences. */
static void log_histories(const struct speculation *s) {
    for (int i = 0; i < s->n_jobs; i++) {
        const struct request *request = s->items[i]->request;
        char words[256] = "";
        size_t used = 0;
        int first = request->n_tokens > 16 ? request->n_tokens - 16 : 0;
        for (int j = first; j < request->n_tokens; j++) {
            used += (size_t)snprintf(words + used, sizeof words - used, " %d", request->tokens[j]);
        }
        log_error("slot %d: the target has %d committed tokens, hash %016llx, the last ones:%s",
                  request->spec.slot, request->n_tokens, (unsigned long long)request->spec.hash,
                  words);
    }
}

static enum status noticed(const struct speculation *s, enum status status) {
    if (status == STATUS_ABORTED) log_histories(s);
    return status;
}

static enum status collect(struct speculation *s, bool all, struct error *err) {
    struct draft_report report = {0};
    int64_t begin = clock_now_ns();
    struct draft_report *wanted = all ? &report : NULL;
    TRY(noticed(s, drafter_collect(s->options.drafter, s->chains, all, wanted, err)));
    int64_t end = clock_now_ns();
    trace_add(s->options.trace, s->options.remote ? "wait" : "draft", begin, end);
    if (s->options.remote) s->counts.target_wait_ns += end - begin;
    for (int i = 0; i < s->n_jobs; i++) {
        place_chain(s, s->items[i], &s->chains[i]);
        if (all) scheduler_made(s->items[i], s->chains[i].n);
        else shrink_wait(s->items[i], s->chains[i].n);
    }
    if (!all) return STATUS_OK;
    s->out = false;
    s->prefilling = report.prefilling;
    if (s->options.remote && s->followed) s->counts.draft_wait_ns += report.waited_ns;
    spec_counts_draft_times(&s->counts, s->n_jobs, &report);
    return STATUS_OK;
}

/* Whether the target's rows hold all new tokens: then they come in one answer. */
static bool waits_for_all(const struct speculation *s) {
    for (int i = 0; i < s->n_jobs; i++) {
        const struct round_plan *round = &s->items[i]->round;
        if (round->wait < round->make) return false;
    }
    return true;
}

static enum status send_order(struct speculation *s, const struct draft_order *order,
                              struct error *err) {
    int64_t begin = clock_now_ns();
    TRY(noticed(s, drafter_start(s->options.drafter, order, err)));
    trace_add(s->options.trace, "hand-off", begin, clock_now_ns());
    s->n_ends = 0;
    s->out = true;
    return STATUS_OK;
}

enum status speculation_flush(struct speculation *s, struct error *err) {
    if (s->n_ends == 0) return STATUS_OK;
    struct draft_order order = {
        .round = s->round, .ends = s->ends, .n_ends = s->n_ends, .layer_width = 1};
    s->n_jobs = 0;
    TRY(send_order(s, &order, err));
    return collect(s, true, err);
}

enum status speculation_start(struct speculation *s, struct scheduler_plan *plan, int64_t now_ns,
                              struct error *err) {
    enum { PAUSE_NS = 2 * 1000 * 1000 };
    s->followed = s->idle_since_ns != 0 && now_ns - s->idle_since_ns < PAUSE_NS;
    trace_set_round(s->options.trace, ++s->round);
    struct draft_order order = gather_order(s, plan);
    if (order.n_jobs == 0 && order.n_begins == 0 && !s->prefilling) return STATUS_OK;
    bool first_all = order.n_jobs > 0 && waits_for_all(s);
    if (!s->options.remote) first_all = true;
    if (first_all) order.early = false;
    TRY(send_order(s, &order, err));
    if (first_all) return collect(s, true, err);
    return order.early ? collect(s, false, err) : STATUS_OK;
}

enum status speculation_finish(struct speculation *s, struct scheduler_plan *plan, int64_t pass_ns,
                               struct error *err) {
    if (s->out) TRY(collect(s, true, err));
    spec_counts_pass(&s->counts, plan, pass_ns);
    return STATUS_OK;
}

enum status speculation_distribution(struct speculation *s, float *q,
                                     const struct request *request, int position,
                                     struct error *err) {
    int index = position - request->spec.n_told;
    return drafter_distribution(s->options.drafter, q, request->spec.slot, index, err);
}

/* --- the verdict ------------------------------------------------------------------------------ */

int speculation_settle(struct speculation *s, const struct scheduler_item *item, int accepted,
                       bool over) {
    struct request_spec *spec = &item->request->spec;
    struct round_outcome outcome = round_settle(item->round, accepted);
    enum spec_mode mode = spec_policy_mode(&s->policy, &spec->wish);
    int judged = over ? accepted : round_judged(item->round);
    spec_counts_verdict(&s->counts, item, &outcome, judged, spec_mode_overlapped(mode));
    if (judged > 0) {
        spec->drafts++;
        spec->drafted += (uint32_t)judged;
        spec->accepted += (uint32_t)accepted;
        spec->histogram[accepted]++;
        spec->rounds_in_mode[mode]++;
    }
    spec->n_accepted_since += accepted;
    memmove(spec->candidates, spec->candidates + accepted,
            (size_t)outcome.tail * sizeof *spec->candidates);
    return outcome.tail;
}

void speculation_end(struct speculation *s, struct request *request) {
    if (request->spec.slot < 0) return;
    if (s->n_ends == s->ends_capacity) {
        s->ends_capacity = s->ends_capacity > 0 ? 2 * s->ends_capacity : 16;
        s->ends = xrealloc(s->ends, (size_t)s->ends_capacity * sizeof *s->ends);
    }
    /* Free at once: the order that begins it anew tells its end first. */
    s->ends[s->n_ends++] = request->spec.slot;
    s->free_slots[s->n_free++] = request->spec.slot;
    request->spec.slot = -1;
}

void speculation_note_step(struct speculation *s, int n_tokens, int64_t step_ns) {
    spec_counts_step(&s->counts, n_tokens, step_ns);
    s->idle_since_ns = clock_now_ns();
}

/* --- what is told ----------------------------------------------------------------------------- */

void speculation_describe(struct speculation *s, Tandem__V1__SpecStats *stats,
                          Tandem__V1__Policy *policy) {
    tandem__v1__policy__init(policy);
    policy->mode = (char *)spec_mode_name(s->policy.mode);
    policy->window = (uint32_t)s->policy.window;
    policy->layer_width = (uint32_t)s->policy.layer_width;
    policy->delay = (uint32_t)s->policy.delay;
    spec_counts_describe(&s->counts, stats);
    stats->policy = policy;
}

void speculation_report(const struct request *request, Tandem__V1__SpecReport *report) {
    const struct request_spec *spec = &request->spec;
    enum spec_mode most = SPEC_PLAIN;
    for (int mode = 0; mode < SPEC_N_MODES; mode++) {
        if (spec->rounds_in_mode[mode] > spec->rounds_in_mode[most]) most = (enum spec_mode)mode;
    }
    tandem__v1__spec_report__init(report);
    report->mode = (char *)spec_mode_name(most);
    report->drafts = spec->drafts;
    report->drafted_tokens = spec->drafted;
    report->accepted_tokens = spec->accepted;
    report->histogram = (uint32_t *)spec->histogram;
    report->n_histogram = spec->drafts > 0 ? SPEC_MAX_WINDOW + 1 : 0;
}
