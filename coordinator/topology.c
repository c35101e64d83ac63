#include "coordinator/topology.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/coordinator.h"
#include "model/checkpoint.h"

/* ---- the draft ------------------------------------------------------------------------------- */

static const char *spelling(const struct tokenizer *tokenizer, int id) {
    const char *text = id < tokenizer_size(tokenizer) ? tokenizer_token(tokenizer, id) : NULL;
    return text != NULL ? text : "";
}

enum status topology_check_tokenizers(const struct tokenizer *target, const char *target_dir,
                                      const struct tokenizer *draft, const char *draft_dir,
                                      struct error *err) {
    if (tokenizer_fingerprint(target) == tokenizer_fingerprint(draft)) return STATUS_OK;
    int n_target = tokenizer_size(target), n_draft = tokenizer_size(draft);
    for (int id = 0; id < n_target || id < n_draft; id++) {
        if (strcmp(spelling(target, id), spelling(draft, id)) == 0) continue;
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "the draft %s has another tokenizer than %s: id %d is \"%.40s\" there and "
                         "\"%.40s\" here (%d and %d ids); expected a draft of the same vocabulary",
                         draft_dir, target_dir, id, spelling(draft, id), spelling(target, id),
                         n_draft, n_target);
    }
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "the draft %s has another tokenizer than %s: all %d ids are spelled alike, "
                     "merges or special tokens differ; expected the same tokenizer.json",
                     draft_dir, target_dir, n_target);
}

static enum status check_draft_tokenizer(const struct topology *topology,
                                         const struct coordinator_model *model, struct error *err) {
    struct tokenizer *tokenizer;
    TRY(tokenizer_load(&tokenizer, topology->draft_dir, err));
    enum status status = topology_check_tokenizers(model->tokenizer, model->dir, tokenizer,
                                                   topology->draft_dir, err);
    tokenizer_free(tokenizer);
    TRY(status);
    /* Both may pad their embedding; what is beyond the tokenizer is never proposed. */
    int n_ids = tokenizer_size(model->tokenizer);
    if (topology->draft.vocab >= n_ids) return STATUS_OK;
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "%s: the tokenizer has %d ids, config.json's vocab_size is %d; expected the "
                     "tokenizer to fit",
                     topology->draft_dir, n_ids, topology->draft.vocab);
}

static enum status open_draft(struct topology *topology, const char *dir,
                              const struct coordinator_model *model, struct error *err) {
    struct checkpoint *checkpoint;
    if (realpath(dir, topology->draft_dir) == NULL) {
        return error_set(err, STATUS_NOT_FOUND,
                         "--draft %s: %s; expected a Hugging Face folder, or ngram", dir,
                         strerror(errno));
    }
    TRY(checkpoint_open(&checkpoint, topology->draft_dir, err));
    topology->draft = *checkpoint_config(checkpoint);
    topology->draft_fingerprint = checkpoint_fingerprint(checkpoint);
    checkpoint_close(checkpoint);
    TRY(check_draft_tokenizer(topology, model, err));
    if ((uint32_t)topology->draft.max_position >= model->context) return STATUS_OK;
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "the draft %s has a context of %d tokens, %" PRIu32 " are to be served; use "
                     "another draft or --max-context %d",
                     topology->draft_dir, topology->draft.max_position, model->context,
                     topology->draft.max_position);
}

/* ---- options --------------------------------------------------------------------------------- */

/* Options that would be ignored. */
static enum status check_meaning(const struct coordinator_options *o,
                                 enum placement_drafter drafter, struct error *err) {
    if (drafter == PLACEMENT_NO_DRAFTER && o->window != 0) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "--window is %" PRIu32 " without a drafter; expected --draft DIR or ngram",
                         o->window);
    }
    if (drafter != PLACEMENT_MODEL && o->layer_width != 0) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "--layer-width is %" PRIu32 " without a draft model; expected --draft DIR",
                         o->layer_width);
    }
    if (drafter != PLACEMENT_MODEL && o->draft_ranks != 0) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "--draft-ranks is %" PRIu32 " without a draft model; expected --draft DIR",
                         o->draft_ranks);
    }
    if (o->window > o->max_window) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "--window is %" PRIu32 " with --max-window %" PRIu32
                         "; expected at most that",
                         o->window, o->max_window);
    }
    return STATUS_OK;
}

static uint32_t or_else(uint32_t value, uint32_t otherwise) {
    return value != 0 ? value : otherwise;
}

/* True: the ranks follow from the options alone, and stand in `out`. */
static bool ranks_given(struct placement_wish *out, const struct coordinator_options *o,
                        enum placement_drafter drafter) {
    *out = (struct placement_wish){.drafter = drafter};
    if (drafter != PLACEMENT_MODEL) {
        out->target_ranks = or_else(o->target_ranks, or_else(o->n_ranks, 1));
        out->n_ranks = or_else(o->n_ranks, out->target_ranks);
        return true;
    }
    if (o->n_ranks != 0 && (o->target_ranks == 0 || o->draft_ranks == 0)) return false;
    bool apart = o->mode < 0 || spec_mode_overlapped((enum spec_mode)o->mode);
    out->target_ranks = or_else(o->target_ranks, 1);
    out->draft_ranks = or_else(o->draft_ranks, 1);
    out->n_ranks = or_else(o->n_ranks, out->target_ranks + (apart ? out->draft_ranks : 0));
    return true;
}

/* ---- the plan -------------------------------------------------------------------------------- */

static void fill_input(struct topology *t, const struct coordinator_options *o,
                       const struct coordinator_model *model, enum placement_drafter drafter) {
    t->input = (struct planner_input){
        .target = &t->target,
        .draft = drafter == PLACEMENT_MODEL ? &t->draft : NULL,
        .drafter = drafter,
        .weights = (enum dtype)dtype_of_weights(o->weights),
        .machine = o->machine,
        .limits = {.max_sequences = o->max_sequences, .max_step_tokens = o->max_step_tokens,
                   .max_context = model->context, .max_window = o->max_window},
        .wish = {.mode = o->mode, .split = -1, .target_ranks = o->target_ranks,
                 .draft_ranks = o->draft_ranks, .n_ranks = o->n_ranks,
                 .layer_width = o->layer_width, .window = o->window},
    };
}

/* Everything about the ranks is said; the planner says what they promise. */
static enum status plan_given(struct topology *t, struct error *err) {
    struct planner_wish *wish = &t->input.wish;
    TRY(placement_make(&t->placement, &t->wish, err));
    if (wish->mode >= 0) TRY(placement_check_mode(&t->placement, (enum spec_mode)wish->mode, err));
    wish->target_ranks = t->wish.target_ranks;
    wish->draft_ranks = t->wish.draft_ranks;
    wish->n_ranks = t->wish.n_ranks;
    wish->split = (int)t->placement.split;
    TRY(planner_run(&t->result, &t->input, err));
    for (uint32_t i = 0; i < t->result.n_fitting && t->placed == NULL; i++) {
        const struct planner_candidate *c = &t->result.candidates[i];
        if (c->mode != SPEC_PLAIN) t->placed = c;
    }
    return STATUS_OK;
}

/* The planner chooses. A draft that is asked for is loaded: it can then be used online. */
static enum status plan_free(struct topology *t, struct error *err) {
    const struct planner_wish *wish = &t->input.wish;
    TRY(planner_run(&t->result, &t->input, err));
    t->placed = planner_place(&t->result, wish->mode);
    if (t->placed == NULL) {
        for (uint32_t i = 0; i < t->result.n_candidates; i++) {
            const struct planner_candidate *c = &t->result.candidates[i];
            if (c->mode == SPEC_PLAIN || c->fits) continue;
            return error_set(err, STATUS_RESOURCE_EXHAUSTED,
                             "the target fits, with the draft beside it nothing does: %s",
                             c->reason);
        }
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "no placement of target and draft on %" PRIu32 " ranks is as wished; "
                         "expected --target-ranks and --draft-ranks as well",
                         wish->n_ranks);
    }
    t->wish.target_ranks = t->placed->target_ranks;
    t->wish.draft_ranks = t->placed->draft_ranks;
    t->wish.n_ranks = t->placed->target_ranks +
                      (t->placed->split == PLACEMENT_DISJOINT ? t->placed->draft_ranks : 0);
    return placement_make(&t->placement, &t->wish, err);
}

/* Plain and a draft: the planner is asked about serial modes, so that plain keeps all ranks. */
static enum status plan(struct topology *t, bool given, struct error *err) {
    struct planner_wish *wish = &t->input.wish;
    int mode = wish->mode;
    if (mode == SPEC_PLAIN && t->input.drafter != PLACEMENT_NO_DRAFTER) {
        wish->mode = -1;
        if (!given) wish->split = PLACEMENT_SHARED;
    }
    TRY(given ? plan_given(t, err) : plan_free(t, err));
    wish->mode = mode;
    return STATUS_OK;
}

static void fill_policy(struct topology *t, const struct coordinator_options *o) {
    struct planner_candidate placed = {.split = t->placement.split,
                                       .target_ranks = t->placement.target_degree,
                                       .draft_ranks = t->placement.draft_degree,
                                       .layer_width = t->max_layer_width};
    t->policy = (struct policy_options){
        .wish = {.mode = o->mode, .window = (int)o->window, .delay = -1,
                 .layer_width = (int)t->max_layer_width},
        .max_window = (int)o->max_window,
        .prior = planner_speed_model(&t->input, &placed),
    };
    for (enum spec_mode mode = SPEC_PLAIN; mode < SPEC_N_MODES; mode++) {
        t->policy.modes |= (unsigned)placement_supports(&t->placement, mode) << mode;
    }
}

enum status topology_make(struct topology *out, const struct coordinator_options *options,
                          const struct coordinator_model *model, struct error *err) {
    *out = (struct topology){.target = model->config};
    const char *draft = options->draft;
    enum placement_drafter drafter = draft == NULL                ? PLACEMENT_NO_DRAFTER
                                     : strcmp(draft, "ngram") == 0 ? PLACEMENT_NGRAM
                                                                   : PLACEMENT_MODEL;
    TRY(check_meaning(options, drafter, err));
    if (drafter == PLACEMENT_MODEL) TRY(open_draft(out, draft, model, err));
    fill_input(out, options, model, drafter);
    TRY(plan(out, ranks_given(&out->wish, options, drafter), err));
    out->max_layer_width =
        options->layer_width != 0 ? options->layer_width
        : out->placed != NULL     ? out->placed->layer_width
                                  : 1;
    fill_policy(out, options);
    planner_explain(&out->result, out->why, sizeof out->why);
    return STATUS_OK;
}

/* ---- the table ------------------------------------------------------------------------------- */

enum { ROWS_FITTING = 20, ROWS_NOT_FITTING = 8 };

static void print_machine(const struct topology *t, FILE *out) {
    const struct planner_machine *m = &t->input.machine;
    fprintf(out, "Assumed of each rank: %g GB/s, %g GFLOP/s, ", m->bandwidth_gbs, m->compute_gflops);
    if (m->memory_bytes != 0) fprintf(out, "%.1f MiB", (double)m->memory_bytes / 1048576.0);
    else fputs("memory not declared", out);
    fprintf(out, "; a collective %g us, a layer %g us", m->collective_us, m->layer_us);
    if (t->input.drafter == PLACEMENT_MODEL) fprintf(out, ", a hand-off %g us", m->handoff_us);
    if (t->input.drafter != PLACEMENT_NO_DRAFTER) {
        fprintf(out, "; acceptance %g", planner_acceptance(&t->input));
    }
    fputs(".\n\n", out);
}

static void print_count(FILE *out, int width, uint32_t n) {
    if (n != 0) fprintf(out, "  %*" PRIu32, width, n);
    else fprintf(out, "  %*s", width, "-");
}

static void print_candidate(const struct topology *t, const struct planner_candidate *c, FILE *out) {
    bool model = c->draft_ranks != 0;
    const char *split = model ? placement_split_name(c->split) : c->mode == SPEC_PLAIN ? "-" : "ngram";
    fprintf(out, "%c %-9s %-9s", c == t->placed ? '*' : ' ', spec_mode_name(c->mode), split);
    print_count(out, 9, c->target_ranks);
    print_count(out, 8, c->draft_ranks);
    print_count(out, 1, spec_mode_layer_parallel(c->mode) ? c->layer_width : 0);
    print_count(out, 2, (uint32_t)c->choice.window);
    if (spec_mode_overlapped(c->mode)) fprintf(out, "  %2d", c->choice.delay);
    else fprintf(out, "  %2s", "-");
    fprintf(out, "  %12.2f  %10.0f  %9.1f  %10.1f  ", c->choice.round.tokens, c->choice.round.us,
            c->choice.tokens_per_second, (double)c->memory_bytes / 1048576.0);
    fprintf(out, "%s%s\n", c->fits ? "yes" : "no: ", c->reason);
}

static void print_rows(const struct topology *t, uint32_t from, uint32_t to, uint32_t most,
                       const char *what, FILE *out) {
    uint32_t left_out = 0;
    for (uint32_t i = from; i < to; i++) {
        const struct planner_candidate *c = &t->result.candidates[i];
        bool shown = i - from < most || c == t->placed || c->mode == SPEC_PLAIN;
        if (shown) print_candidate(t, c, out);
        left_out += !shown;
    }
    if (left_out > 0) fprintf(out, "  (%" PRIu32 " more that are slower%s)\n", left_out, what);
}

static void print_served(const struct topology *t, FILE *out) {
    const struct placement *p = &t->placement;
    fprintf(out, "Served: target on %" PRIu32 " rank%s", p->target_degree,
            p->target_degree == 1 ? "" : "s");
    if (p->split == PLACEMENT_SHARED) {
        fprintf(out, ", draft on %" PRIu32 " of them", p->draft_degree);
    } else if (p->split == PLACEMENT_DISJOINT) {
        fprintf(out, ", draft on %" PRIu32 " of its own", p->draft_degree);
    } else if (p->drafter == PLACEMENT_NGRAM) {
        fputs(", n-gram look-up beside it", out);
    }
    int mode = t->policy.wish.mode;
    fprintf(out, "; mode %s", mode < 0 ? "auto, among" : spec_mode_name((enum spec_mode)mode));
    for (enum spec_mode m = SPEC_PLAIN; mode < 0 && m < SPEC_N_MODES; m++) {
        bool lp_without_width = spec_mode_layer_parallel(m) && t->max_layer_width == 1;
        if ((t->policy.modes >> m & 1) == 0 || lp_without_width) continue;
        fprintf(out, "%s %s", m == SPEC_PLAIN ? "" : ",", spec_mode_name(m));
    }
    fputs(".\n", out);
}

void topology_print(const struct topology *t, FILE *out) {
    const char *drafter = t->input.drafter == PLACEMENT_MODEL   ? t->draft.name
                          : t->input.drafter == PLACEMENT_NGRAM ? "n-gram look-up"
                                                                : "no draft";
    fprintf(out, "%s (%s) with %s on %s%" PRIu32 " rank%s, context %" PRIu32 ".\n", t->target.name,
            dtype_name(t->input.weights), drafter, t->input.wish.n_ranks > 1 ? "up to " : "",
            t->input.wish.n_ranks, t->input.wish.n_ranks == 1 ? "" : "s",
            t->input.limits.max_context);
    print_machine(t, out);
    fprintf(out, "  %-9s %-9s  %9s  %8s  %s  %2s  %2s  %12s  %10s  %9s  %10s  %s\n", "mode", "split",
            "target TP", "draft TP", "N", "g", "k", "tokens/round", "round (us)", "tokens/s",
            "MiB a rank", "fits");
    const struct planner_result *r = &t->result;
    print_rows(t, 0, r->n_fitting, ROWS_FITTING, "", out);
    print_rows(t, r->n_fitting, r->n_candidates, ROWS_NOT_FITTING, " and do not fit", out);
    fprintf(out, "\nN layer width, g window, k delay of the target in draft steps%s.\n",
            t->placed != NULL ? ", * served" : "");
    if (t->placement.n_ranks == 0) return;
    fprintf(out, "\n%s\n", t->why);
    print_served(t, out);
}
