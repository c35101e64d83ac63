/* What operators ask of the plan: GetPlan, and SetPolicy, which changes how replicas speculate. On the
 * coordinator's thread. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coordinator/coordinator.h"

/* ---- replicas -------------------------------------------------------------------------------- */

struct policy_answer {
    Tandem__V1__ReplicaPolicy policy;
    Tandem__V1__ModeEstimate modes[SPEC_N_MODES], *rows[SPEC_N_MODES];
};

static bool can_speculate(const struct coordinator *c) {
    return c->topology.placement.drafter != PLACEMENT_NO_DRAFTER;
}

static void describe_policy(struct policy_answer *out, const struct replica *replica) {
    const struct policy *policy = &replica->policy;
    Tandem__V1__ReplicaPolicy *message = &out->policy;
    tandem__v1__replica_policy__init(message);
    message->id = (char *)replica->id;
    message->mode = (char *)spec_mode_name(policy->current.mode);
    message->window = (uint32_t)policy->current.window;
    message->layer_width = (uint32_t)policy->current.layer_width;
    message->delay = (uint32_t)policy->current.delay;
    message->phase = (char *)policy_phase_name(policy->phase);
    message->modes = out->rows;
    for (enum spec_mode mode = SPEC_PLAIN; mode < SPEC_N_MODES; mode++) {
        if (!policy_allows(policy, mode)) continue;
        struct policy_estimate estimate = policy_estimate(policy, mode);
        Tandem__V1__ModeEstimate *row = &out->modes[mode];
        tandem__v1__mode_estimate__init(row);
        row->mode = (char *)spec_mode_name(mode);
        row->window = mode == SPEC_PLAIN ? 0 : (uint32_t)estimate.setting.window;
        row->delay = (uint32_t)estimate.setting.delay;
        row->predicted = estimate.predicted;
        row->expected = estimate.expected;
        row->measured = estimate.measured;
        out->rows[message->n_modes++] = row;
    }
}

/* Of the replicas that have a policy in force: those that serve, or will. `id` NULL: all. */
static size_t describe_policies(struct policy_answer *out, Tandem__V1__ReplicaPolicy **rows,
                                const struct coordinator *c, const char *id) {
    size_t n = 0;
    for (size_t i = 0; i < c->fleet.n_replicas && can_speculate(c); i++) {
        const struct replica *replica = c->fleet.replicas[i];
        if (replica->line == NULL || (id != NULL && strcmp(id, replica->id) != 0)) continue;
        describe_policy(&out[n], replica);
        rows[n] = &out[n].policy;
        n++;
    }
    return n;
}

/* ---- GetPlan --------------------------------------------------------------------------------- */

struct plan_answer {
    Tandem__V1__RankPlan ranks[2 * PLACEMENT_MAX_RANKS], *rank_rows[2 * PLACEMENT_MAX_RANKS];
    Tandem__V1__PlanCandidate candidates[PLANNER_MAX_CANDIDATES];
    Tandem__V1__PlanCandidate *candidate_rows[PLANNER_MAX_CANDIDATES];
    struct policy_answer policies[FLEET_MAX_REPLICAS];
    Tandem__V1__ReplicaPolicy *policy_rows[FLEET_MAX_REPLICAS];
};

static size_t describe_ranks(struct plan_answer *out, const struct placement *placement) {
    for (uint32_t i = 0; i < placement->n_parts; i++) {
        const struct placement_part *part = &placement->parts[i];
        Tandem__V1__RankPlan *rank = out->rank_rows[i] = &out->ranks[i];
        tandem__v1__rank_plan__init(rank);
        rank->rank = part->rank;
        rank->role = (char *)placement_role_name(part->role);
        rank->shard = part->shard;
        rank->degree = part->degree;
    }
    return placement->n_parts;
}

static size_t describe_candidates(struct plan_answer *out, const struct topology *topology) {
    const struct planner_result *result = &topology->result;
    for (uint32_t i = 0; i < result->n_candidates; i++) {
        const struct planner_candidate *c = &result->candidates[i];
        Tandem__V1__PlanCandidate *row = out->candidate_rows[i] = &out->candidates[i];
        tandem__v1__plan_candidate__init(row);
        row->mode = (char *)spec_mode_name(c->mode);
        row->split = (char *)placement_split_name(c->split);
        row->target_degree = c->target_ranks;
        row->draft_degree = c->draft_ranks;
        row->layer_width = c->layer_width;
        row->window = (uint32_t)c->choice.window;
        row->delay = (uint32_t)c->choice.delay;
        row->tokens_per_round = c->choice.round.tokens;
        row->round_us = c->choice.round.us;
        row->tokens_per_second = c->choice.tokens_per_second;
        row->memory_bytes = c->memory_bytes;
        row->fits = c->fits;
        row->reason = (char *)c->reason;
        row->served = c == topology->placed;
    }
    return result->n_candidates;
}

static const char *wished_mode(const struct coordinator *c) {
    if (!can_speculate(c)) return spec_mode_name(SPEC_PLAIN);
    int mode = c->policy_wish.mode;
    return mode < 0 ? "auto" : spec_mode_name((enum spec_mode)mode);
}

void status_reply_plan(struct coordinator *c, struct rpc_call *call) {
    const struct topology *topology = &c->topology;
    const struct placement *placement = &topology->placement;
    struct plan_answer *answer = xcalloc(1, sizeof *answer);
    Tandem__V1__GetPlanResponse response = TANDEM__V1__GET_PLAN_RESPONSE__INIT;
    response.mode = (char *)wished_mode(c);
    response.weights = (char *)c->options.weights;
    response.target_degree = placement->target_degree;
    response.split = (char *)placement_split_name(placement->split);
    response.draft_degree = placement->draft_degree;
    response.drafter = (char *)placement_drafter_name(placement->drafter);
    if (placement->drafter == PLACEMENT_MODEL) response.draft = (char *)topology->draft.name;
    if (can_speculate(c)) {
        response.max_window = c->options.max_window;
        response.max_layer_width = topology->max_layer_width;
        response.sampling_rule = (char *)c->options.sampling_rule;
    }
    response.reason = (char *)topology->why;
    response.n_ranks = describe_ranks(answer, placement);
    response.ranks = answer->rank_rows;
    response.n_candidates = describe_candidates(answer, topology);
    response.candidates = answer->candidate_rows;
    response.n_replicas = describe_policies(answer->policies, answer->policy_rows, c, NULL);
    response.replicas = answer->policy_rows;
    rpc_call_reply(call, &response.base);
    free(answer);
}

/* ---- SetPolicy ------------------------------------------------------------------------------- */

static enum status check_window(const struct coordinator *c,
                                const Tandem__V1__SetPolicyRequest *request, struct error *err) {
    if (request->window > c->options.max_window) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "window is %" PRIu32 "; expected at most %" PRIu32 " (--max-window), or 0 "
                         "for auto",
                         request->window, c->options.max_window);
    }
    bool delayed = request->delay_choice_case == TANDEM__V1__SET_POLICY_REQUEST__DELAY_CHOICE_DELAY;
    uint32_t most = request->window != 0 ? request->window : c->options.max_window;
    if (delayed && request->delay >= most) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "delay is %" PRIu32 " with a window of at most %" PRIu32
                         "; expected less than the window",
                         request->delay, most);
    }
    return STATUS_OK;
}

/* Reads and checks a request. */
static enum status read_wish(struct policy_wish *out, const struct coordinator *c,
                             const Tandem__V1__SetPolicyRequest *request, struct error *err) {
    bool automatic = strcmp(request->mode, "auto") == 0;
    int mode = automatic ? -1 : spec_mode_parse(request->mode);
    if (!automatic && mode < 0) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "mode is \"%.40s\"; expected auto, plain, sd, easyspec, pearl or pearl+lp",
                         request->mode);
    }
    if (mode >= 0) {
        TRY(placement_check_mode(&c->topology.placement, (enum spec_mode)mode, err));
    }
    TRY(check_window(c, request, err));
    uint32_t width = request->layer_width, widest = c->topology.max_layer_width;
    if (width == 3 || width > widest) {
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "layer_width is %" PRIu32 "; the draft was loaded for at most %" PRIu32
                         " (--layer-width); expected 1, 2 or 4 within that, or 0 for it",
                         width, widest);
    }
    bool delayed = request->delay_choice_case == TANDEM__V1__SET_POLICY_REQUEST__DELAY_CHOICE_DELAY;
    *out = (struct policy_wish){.mode = mode,
                                .window = (int)request->window,
                                .delay = delayed ? (int)request->delay : -1,
                                .layer_width = (int)(width != 0 ? width : widest)};
    return STATUS_OK;
}

/* True: the replica is there. `id` empty: all, and the wish for those that come. */
static bool set_policies(struct coordinator *c, const struct policy_wish *wish, const char *id) {
    bool found = id[0] == '\0';
    if (found) c->policy_wish = *wish;
    for (size_t i = 0; i < c->fleet.n_replicas; i++) {
        struct replica *replica = c->fleet.replicas[i];
        if (replica->line == NULL || (id[0] != '\0' && strcmp(id, replica->id) != 0)) continue;
        policy_set_wish(&replica->policy, wish);
        if (replica->state == REPLICA_SERVING) line_policy(replica);
        found = true;
    }
    return found;
}

void status_set_policy(struct coordinator *c, struct rpc_call *call,
                       const Tandem__V1__SetPolicyRequest *request) {
    struct error err;
    struct policy_wish wish;
    enum status status = read_wish(&wish, c, request, &err);
    if (status == STATUS_OK && !set_policies(c, &wish, request->replica)) {
        status = error_set(&err, STATUS_INVALID_ARGUMENT,
                           "replica is \"%.64s\"; no replica of that name is here", request->replica);
    }
    if (status != STATUS_OK) {
        rpc_call_fail(call, &err);
        return;
    }
    struct policy_answer *answers = xcalloc(FLEET_MAX_REPLICAS, sizeof *answers);
    Tandem__V1__ReplicaPolicy *rows[FLEET_MAX_REPLICAS];
    Tandem__V1__SetPolicyResponse response = TANDEM__V1__SET_POLICY_RESPONSE__INIT;
    const char *id = request->replica[0] != '\0' ? request->replica : NULL;
    response.n_replicas = describe_policies(answers, rows, c, id);
    response.replicas = rows;
    rpc_call_reply(call, &response.base);
    free(answers);
}
