/* The streams to the replicas' leaders (tandem.v1.Replica/Attach), on the coordinator's thread. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/clock.h"
#include "common/log.h"
#include "coordinator/coordinator.h"

struct line {
    struct rpc_call *call;        /* a reference */
    struct replica *replica;      /* NULL before the hello, and once it is over */
    bool over;                    /* refused or lost: what still arrives is ignored */
    int logged_mode;              /* enum spec_mode of the last decision at level info; -1: none */
    /* Gathered for the next message downwards. */
    struct session **submits;
    size_t n_submits, submits_capacity;
    uint64_t *cancels;
    size_t n_cancels, cancels_capacity;
};

struct line *line_create(struct coordinator *c, struct rpc_call *call) {
    atomic_fetch_add(&c->n_lines, 1);
    struct line *line = xcalloc(1, sizeof *line);
    line->call = rpc_call_ref(call);
    line->logged_mode = -1;
    return line;
}

static void line_free(struct line *line) {
    rpc_call_unref(line->call);
    free(line->submits);
    free(line->cancels);
    free(line);
}

/* ---- states that others see ------------------------------------------------------------------ */

static void write_ready_file(struct coordinator *c) {
    struct error err;
    if (c->ready_written || c->options.ready_file == NULL) return;
    c->ready_written = true;
    if (coordinator_write_ports(c, c->options.ready_file, &err) != STATUS_OK) {
        log_error("%s", err.text);
    }
}

/* After any change of a replica's state: health, readiness, the context that all can hold. */
static void announce(struct coordinator *c) {
    bool serving = fleet_count(&c->fleet, REPLICA_SERVING) > 0 && !c->shutting_down;
    uint32_t context = c->model.context;
    for (size_t i = 0; i < c->fleet.n_replicas; i++) {
        const struct replica *replica = c->fleet.replicas[i];
        if (replica->state != REPLICA_SERVING) continue;
        if (replica->max_context < context) context = replica->max_context;
    }
    atomic_store(&c->context, context);
    atomic_store(&c->serving, serving);
    health_set(c->health, "", serving);
    health_set(c->health, "tandem.v1.Generation", serving);
    facts_gauges(&c->facts, &c->fleet, c->admission.n_requests);
    if (serving) write_ready_file(c);
}

/* ---- joining --------------------------------------------------------------------------------- */

static void refuse(struct line *line, const struct error *err) {
    Tandem__V1__Refusal refusal = TANDEM__V1__REFUSAL__INIT;
    Tandem__V1__ReplicaDown down = TANDEM__V1__REPLICA_DOWN__INIT;
    refusal.reason = (char *)err->text;
    down.kind_case = TANDEM__V1__REPLICA_DOWN__KIND_REFUSAL;
    down.refusal = &refusal;
    rpc_call_send(line->call, &down.base);
    rpc_call_fail(line->call, err);
    line->over = true;
}

static Tandem__V1__Policy policy_message(const struct policy_setting *setting) {
    Tandem__V1__Policy message = TANDEM__V1__POLICY__INIT;
    message.mode = (char *)spec_mode_name(setting->mode);
    message.window = (uint32_t)setting->window;
    message.layer_width = (uint32_t)setting->layer_width;
    message.delay = (uint32_t)setting->delay;
    return message;
}

void line_policy(struct replica *replica) {
    struct line *line = replica->line;
    if (line == NULL) return;
    Tandem__V1__Policy policy = policy_message(&replica->policy.current);
    Tandem__V1__ReplicaDown down = TANDEM__V1__REPLICA_DOWN__INIT;
    down.kind_case = TANDEM__V1__REPLICA_DOWN__KIND_POLICY;
    down.policy = &policy;
    rpc_call_send(line->call, &down.base);
}

static void send_plan(struct coordinator *c, struct line *line) {
    const struct topology *topology = &c->topology;
    const struct placement *placement = &line->replica->placement;
    Tandem__V1__PlannedRank ranks[2 * PLACEMENT_MAX_RANKS], *rows[2 * PLACEMENT_MAX_RANKS];
    Tandem__V1__Plan plan = TANDEM__V1__PLAN__INIT;
    Tandem__V1__ReplicaDown down = TANDEM__V1__REPLICA_DOWN__INIT;
    for (uint32_t i = 0; i < placement->n_parts; i++) {
        const struct placement_part *part = &placement->parts[i];
        tandem__v1__planned_rank__init(&ranks[i]);
        ranks[i].rank = part->rank;
        ranks[i].role = (char *)placement_role_name(part->role);
        ranks[i].shard = part->shard;
        ranks[i].degree = part->degree;
        rows[i] = &ranks[i];
    }
    plan.model_dir = c->model.dir;
    plan.tokenizer_fingerprint = tokenizer_fingerprint(c->model.tokenizer);
    plan.checkpoint_fingerprint = c->model.checkpoint_fingerprint;
    plan.weights = (char *)c->options.weights;
    Tandem__V1__Policy policy = policy_message(&line->replica->policy.current);
    plan.policy = &policy;
    plan.drafter = (char *)placement_drafter_name(placement->drafter);
    plan.draft_dir = (char *)topology->draft_dir;
    plan.draft_checkpoint_fingerprint = topology->draft_fingerprint;
    plan.max_window = c->options.max_window;
    plan.max_layer_width = topology->max_layer_width;
    plan.sampling_rule = (char *)c->options.sampling_rule;
    plan.n_ranks = placement->n_parts;
    plan.ranks = rows;
    plan.kv_budget_bytes = c->options.kv_budget_bytes;
    plan.max_sequences = c->options.max_sequences;
    plan.max_step_tokens = c->options.max_step_tokens;
    plan.max_context = c->options.max_context;
    plan.prefix_cache_off = c->options.prefix_cache_off;
    down.kind_case = TANDEM__V1__REPLICA_DOWN__KIND_PLAN;
    down.plan = &plan;
    rpc_call_send(line->call, &down.base);
}

/* The policy to begin with, from what the ranks measured where that is known. */
static void begin_policy(struct coordinator *c, struct replica *replica) {
    const struct topology *t = &c->topology;
    struct policy_options policy = t->policy;
    policy.wish = c->policy_wish;
    if (t->placement.drafter != PLACEMENT_NO_DRAFTER) {
        struct planner_input input = t->input;
        struct planner_candidate placed = {.split = t->placement.split,
                                           .target_ranks = t->placement.target_degree,
                                           .draft_ranks = t->placement.draft_degree,
                                           .layer_width = t->max_layer_width};
        planner_use_links(&input.machine, &replica->links, t->target.hidden);
        policy.prior = planner_speed_model(&input, &placed);
    }
    policy_init(&replica->policy, &policy);
}

static void hello(struct coordinator *c, struct line *line, const Tandem__V1__Hello *message) {
    struct error err;
    struct replica *replica;
    enum status status;
    if (line->replica != NULL) {
        status = error_set(&err, STATUS_FAILED_PRECONDITION, "a second hello on one stream");
    } else if (c->shutting_down) {
        status = error_set(&err, STATUS_UNAVAILABLE, "shutting down");
    } else {
        status = fleet_join(&c->fleet, &replica, message, &c->topology.wish, &err);
    }
    if (status != STATUS_OK) {
        log_warn("replica \"%.64s\" (%s) refused: %s", message->replica_id, rpc_call_peer(line->call),
                 err.text);
        refuse(line, &err);
        return;
    }
    begin_policy(c, replica);
    line->replica = replica;
    replica->line = line;
    log_info("replica %s joined from %s: %" PRIu32 " rank%s on %s, %s", replica->id,
             rpc_call_peer(line->call), replica->n_ranks, replica->n_ranks == 1 ? "" : "s",
             replica->ranks[0].host, replica->ranks[0].device);
    if (replica->links.gigabytes_per_second > 0) {
        log_info("replica %s measured its slowest link: %.1f us, %.2f GB/s", replica->id,
                 replica->links.latency_us, replica->links.gigabytes_per_second);
    }
    send_plan(c, line);
}

/* ---- leaving --------------------------------------------------------------------------------- */

/* The replica is gone, for the reason in `why`; its requests end. */
static void lose(struct coordinator *c, struct line *line, const char *why) {
    struct replica *replica = line->replica;
    line->over = true;
    line->n_submits = line->n_cancels = 0;
    if (replica == NULL) return;
    struct error err;
    line->replica = NULL;
    error_set(&err, STATUS_UNAVAILABLE, "replica %s lost: %.400s", replica->id, why);
    log_write(c->shutting_down ? LOG_INFO : LOG_ERROR, "%s; %" PRIu32 " requests end", err.text,
              replica->n_submitted);
    replica_lost(replica, why);
    announce(c);
    generate_fail_all(c, replica, &err);
    /* Those that wait would wait for nobody; new ones are refused as well. */
    if (fleet_count(&c->fleet, REPLICA_SERVING) == 0) generate_fail_queued(c, &err);
}

/* The replica breaks the protocol: it is told, and lost. */
static void break_off(struct coordinator *c, struct line *line, const struct error *err) {
    lose(c, line, err->text);
    refuse(line, err);
}

/* ---- messages upwards ------------------------------------------------------------------------ */

static void ready(struct coordinator *c, struct line *line, const Tandem__V1__Ready *message) {
    struct error err;
    struct replica *replica = line->replica;
    if (replica_ready(replica, message, c->model.checkpoint_fingerprint, &err) != STATUS_OK) {
        break_off(c, line, &err);
        return;
    }
    log_info("replica %s serves: %" PRIu32 " sequences, context %" PRIu32 ", %" PRIu32 " KV blocks",
             replica->id, replica->max_sequences, replica->max_context, replica->kv_blocks);
    announce(c);
    /* It may have changed while the replica loaded. */
    if (c->topology.placement.drafter != PLACEMENT_NO_DRAFTER) line_policy(replica);
    generate_route(c);
}

/* Another mode is news; probes and windows are not. */
static void log_policy(struct line *line) {
    const struct replica *replica = line->replica;
    const struct policy_setting *now = &replica->policy.current;
    bool news = replica->policy.phase == POLICY_SETTLED && (int)now->mode != line->logged_mode;
    enum log_level level = news ? LOG_INFO : LOG_DEBUG;
    if (news) line->logged_mode = (int)now->mode;
    log_write(level, "replica %s: %s, window %d, layer width %d, delay %d (%s; %.1f tokens/s "
              "expected, plain %.1f)",
              replica->id, spec_mode_name(now->mode), now->window, now->layer_width, now->delay,
              policy_phase_name(replica->policy.phase),
              policy_estimate(&replica->policy, now->mode).expected,
              policy_estimate(&replica->policy, SPEC_PLAIN).expected);
}

/* Every decoding sequence commits in every round: `keys` counts them. */
static void decide(struct line *line, const Tandem__V1__Step *message) {
    struct replica *replica = line->replica;
    const Tandem__V1__StepStats *stats = message->stats;
    if (stats == NULL || stats->spec == NULL) return;
    struct policy_step step = {
        .spec = stats->spec,
        .n_sequences = (uint32_t)message->n_keys,
        .n_tokens = (uint32_t)message->n_tokens,
        .step_us = stats->step_us,
        .prefill = stats->prefill_rows > 0,
    };
    if (!policy_observe(&replica->policy, &step)) return;
    log_policy(line);
    line_policy(replica);
}

static void step(struct coordinator *c, struct line *line, const Tandem__V1__Step *message) {
    struct error err;
    struct replica *replica = line->replica;
    if (replica->state != REPLICA_SERVING) {
        error_set(&err, STATUS_INTERNAL, "a step while %s; expected it while serving",
                  replica_state_name(replica->state));
        break_off(c, line, &err);
        return;
    }
    facts_step(&c->facts, replica, message);
    replica_step(replica, message, clock_now_ns());
    decide(line, message);
    if (!generate_step(c, replica, message, &err)) {
        break_off(c, line, &err);
        return;
    }
    generate_route(c);
}

void line_message(struct coordinator *c, struct line *line, const Tandem__V1__ReplicaUp *message) {
    struct error err;
    if (line->over) return;
    if (message->kind_case == TANDEM__V1__REPLICA_UP__KIND_HELLO) {
        hello(c, line, message->hello);
        return;
    }
    if (line->replica == NULL) {
        error_set(&err, STATUS_FAILED_PRECONDITION, "the first message is of kind %d; expected a hello",
                  (int)message->kind_case);
        refuse(line, &err);
        return;
    }
    switch (message->kind_case) {
    case TANDEM__V1__REPLICA_UP__KIND_PROGRESS:
        if (replica_progress(line->replica, message->progress, &err) != STATUS_OK) {
            break_off(c, line, &err);
        }
        break;
    case TANDEM__V1__REPLICA_UP__KIND_READY:
        ready(c, line, message->ready);
        break;
    case TANDEM__V1__REPLICA_UP__KIND_STEP:
        step(c, line, message->step);
        break;
    case TANDEM__V1__REPLICA_UP__KIND_FATAL:
        lose(c, line, message->fatal->reason);
        rpc_call_finish(line->call, STATUS_OK, NULL);
        break;
    default:
        error_set(&err, STATUS_INTERNAL, "a message of unknown kind %d", (int)message->kind_case);
        break_off(c, line, &err);
    }
}

void line_closed(struct coordinator *c, struct line *line) {
    lose(c, line, c->shutting_down ? "the coordinator shut down" : "its stream ended");
    line_free(line);
    atomic_fetch_sub(&c->n_lines, 1);
}

/* ---- messages downwards ---------------------------------------------------------------------- */

void line_submit(struct replica *replica, struct session *session) {
    struct line *line = replica->line;
    CHECK(line != NULL);
    if (line->n_submits == line->submits_capacity) {
        line->submits_capacity = line->submits_capacity * 2 + 16;
        line->submits = xrealloc(line->submits, line->submits_capacity * sizeof *line->submits);
    }
    line->submits[line->n_submits++] = session;
}

void line_cancel(struct replica *replica, uint64_t key) {
    struct line *line = replica->line;
    if (line == NULL) return;
    if (line->n_cancels == line->cancels_capacity) {
        line->cancels_capacity = line->cancels_capacity * 2 + 16;
        line->cancels = xrealloc(line->cancels, line->cancels_capacity * sizeof *line->cancels);
    }
    line->cancels[line->n_cancels++] = key;
}

/* The deadline as microseconds from now; one that has passed is the next microsecond. */
static int64_t time_left_us(int64_t deadline_ns) {
    if (deadline_ns == 0) return 0;
    int64_t left = (deadline_ns - clock_now_ns()) / 1000;
    return left < 1 ? 1 : left;
}

/* `biases` and `bias_tokens` are filled for it and live as long as the message. */
static void fill_submit(Tandem__V1__Submit *out, const struct session *session,
                        int32_t *bias_tokens, float *biases) {
    const struct params *params = &session->params;
    tandem__v1__submit__init(out);
    out->key = session->key;
    out->n_prompt = session->prompt.n;
    out->prompt = session->prompt.ids;
    out->temperature = params->temperature;
    out->top_p = params->top_p;
    out->top_k = params->top_k;
    out->min_p = params->min_p;
    out->max_tokens = params->max_tokens;
    out->min_tokens = params->min_tokens;
    out->n_stop_token_ids = params->n_stop_token_ids;
    out->stop_token_ids = (int32_t *)params->stop_token_ids;
    out->ignore_eos = params->ignore_eos;
    out->seed = params->seed;
    out->repetition_penalty = params->repetition_penalty;
    out->presence_penalty = params->presence_penalty;
    out->frequency_penalty = params->frequency_penalty;
    for (size_t i = 0; i < params->n_biases; i++) {
        bias_tokens[i] = params->biases[i]->token_id;
        biases[i] = params->biases[i]->bias;
    }
    out->n_bias_tokens = out->n_biases = params->n_biases;
    out->bias_tokens = bias_tokens;
    out->biases = biases;
    out->logprobs = params->logprobs;
    out->deadline_us = time_left_us(session->entry.deadline_ns);
    out->speculation = (char *)params->speculation;
    out->num_speculative_tokens = params->num_speculative_tokens;
}

static enum status send_submit(struct line *line, const struct session *session) {
    Tandem__V1__Submit submit, *row = &submit;
    Tandem__V1__Work work = TANDEM__V1__WORK__INIT;
    Tandem__V1__ReplicaDown down = TANDEM__V1__REPLICA_DOWN__INIT;
    int32_t *bias_tokens = xcalloc(session->params.n_biases, sizeof *bias_tokens);
    float *biases = xcalloc(session->params.n_biases, sizeof *biases);
    fill_submit(&submit, session, bias_tokens, biases);
    work.n_submits = 1;
    work.submits = &row;
    down.kind_case = TANDEM__V1__REPLICA_DOWN__KIND_WORK;
    down.work = &work;
    enum status status = rpc_call_send(line->call, &down.base);
    free(bias_tokens);
    free(biases);
    return status;
}

static enum status send_cancels(struct line *line) {
    Tandem__V1__Work work = TANDEM__V1__WORK__INIT;
    Tandem__V1__ReplicaDown down = TANDEM__V1__REPLICA_DOWN__INIT;
    work.n_cancels = line->n_cancels;
    work.cancels = line->cancels;
    down.kind_case = TANDEM__V1__REPLICA_DOWN__KIND_WORK;
    down.work = &work;
    line->n_cancels = 0;
    return rpc_call_send(line->call, &down.base);
}

/* Submits go first, one message each (a prompt may be long), then the cancels in one. */
static void flush(struct coordinator *c, struct line *line) {
    enum status status = STATUS_OK;
    for (size_t i = 0; i < line->n_submits && status == STATUS_OK; i++) {
        status = send_submit(line, line->submits[i]);
    }
    line->n_submits = 0;
    if (status == STATUS_OK && line->n_cancels > 0) status = send_cancels(line);
    if (status != STATUS_RESOURCE_EXHAUSTED) return;   /* CANCELLED: its end is on the way */
    lose(c, line, "it does not read what it is sent");
    rpc_call_abort(line->call, STATUS_RESOURCE_EXHAUSTED, "the replica does not read what it is sent");
}

void attach_flush(struct coordinator *c) {
    for (size_t i = 0; i < c->fleet.n_replicas; i++) {
        struct line *line = c->fleet.replicas[i]->line;
        if (line != NULL && line->n_submits + line->n_cancels > 0) flush(c, line);
    }
}

void attach_stop_all(struct coordinator *c) {
    for (size_t i = 0; i < c->fleet.n_replicas; i++) {
        struct line *line = c->fleet.replicas[i]->line;
        if (line == NULL) continue;
        Tandem__V1__Stop stop = TANDEM__V1__STOP__INIT;
        Tandem__V1__ReplicaDown down = TANDEM__V1__REPLICA_DOWN__INIT;
        down.kind_case = TANDEM__V1__REPLICA_DOWN__KIND_STOP;
        down.stop = &stop;
        rpc_call_send(line->call, &down.base);
        rpc_call_finish(line->call, STATUS_OK, NULL);
    }
    announce(c);
}
