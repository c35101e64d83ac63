/* What operators ask: the fleet's state (status_plan.c: the plan). On the coordinator's thread. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/clock.h"
#include "coordinator/coordinator.h"
#include "tandem/v1/operations.pb-c.h"

/* One replica's answer with everything it points to. */
struct replica_answer {
    Tandem__V1__ReplicaStatus status;
    Tandem__V1__RankStatus ranks[PLACEMENT_MAX_RANKS], *rows[PLACEMENT_MAX_RANKS];
    char detail[256];
};

static void describe_rank(Tandem__V1__RankStatus *out, const struct replica *replica, uint32_t i) {
    struct replica_rank *rank = (struct replica_rank *)&replica->ranks[i];
    tandem__v1__rank_status__init(out);
    out->rank = i;
    out->host = rank->host;
    out->device = rank->device;
    const struct placement_part *part = placement_find(&replica->placement, i, PLACEMENT_TARGET);
    if (part == NULL) part = placement_find(&replica->placement, i, PLACEMENT_DRAFT);
    out->role = (char *)placement_rank_roles(&replica->placement, i);
    out->shard = part != NULL ? part->shard : 0;
    out->memory_bytes = rank->memory_bytes;
    out->cores = rank->cores;
    out->weights_bytes = rank->weights_bytes;
    out->kv_bytes = rank->kv_bytes;
    out->scratch_bytes = rank->scratch_bytes;
}

static void describe_speculation(Tandem__V1__ReplicaStatus *status, const struct replica *replica) {
    const struct speculation_facts *facts = &replica->speculation;
    status->mode = (char *)spec_mode_name(facts->mode);
    status->window = facts->window;
    status->layer_width = facts->layer_width;
    if (spec_mode_overlapped(facts->mode)) status->delay = (uint32_t)replica->policy.current.delay;
    status->drafts = facts->drafts;
    status->draft_tokens = facts->draft_tokens;
    status->accepted_tokens = facts->accepted_tokens;
    status->acceptance = replica->policy.accept_exact;
    status->draft_wait_seconds = (double)facts->draft_wait_us / 1e6;
    status->target_wait_seconds = (double)facts->target_wait_us / 1e6;
}

static void describe(struct replica_answer *out, const struct replica *replica, int64_t now_ns) {
    Tandem__V1__ReplicaStatus *status = &out->status;
    tandem__v1__replica_status__init(status);
    status->id = (char *)replica->id;
    status->state = (char *)replica_state_name(replica->state);
    snprintf(out->detail, sizeof out->detail, "%s", replica->detail);
    if (replica->state == REPLICA_LOADING && replica->load_total > 0) {
        snprintf(out->detail, sizeof out->detail, "%.0f %% of %.1f MB",
                 100.0 * (double)replica->load_done / (double)replica->load_total,
                 (double)replica->load_total / 1e6);
    }
    status->detail = out->detail;
    for (uint32_t i = 0; i < replica->n_ranks; i++) {
        describe_rank(&out->ranks[i], replica, i);
        out->rows[i] = &out->ranks[i];
    }
    status->n_ranks = replica->n_ranks;
    status->ranks = out->rows;
    status->running = replica->stats.running;
    status->waiting = replica->stats.waiting;
    status->kv_blocks = replica->kv_blocks;
    status->kv_blocks_used = replica->stats.kv_blocks_used;
    status->tokens_per_second = replica_rate(replica, now_ns);
    status->link_latency_us = replica->links.latency_us;
    status->link_gigabytes_per_second = replica->links.gigabytes_per_second;
    status->handoff_latency_us = replica->links.handoff_us;
    describe_speculation(status, replica);
}

void status_reply(struct coordinator *c, struct rpc_call *call) {
    int64_t now_ns = clock_now_ns();
    size_t n = c->fleet.n_replicas;
    struct replica_answer *answers = xcalloc(n, sizeof *answers);
    Tandem__V1__ReplicaStatus **rows = xcalloc(n, sizeof *rows);
    for (size_t i = 0; i < n; i++) {
        describe(&answers[i], c->fleet.replicas[i], now_ns);
        rows[i] = &answers[i].status;
    }
    Tandem__V1__GetStatusResponse response = TANDEM__V1__GET_STATUS_RESPONSE__INIT;
    response.version = TANDEM_VERSION;
    response.uptime_seconds = (double)(now_ns - c->started_ns) / 1e9;
    response.model = c->model.config.name;
    response.ready = atomic_load(&c->serving);
    response.queued_requests = c->admission.n_requests;
    response.queued_prompt_tokens = (uint32_t)c->admission.n_prompt_tokens;
    response.finished_requests = c->finished;
    response.generated_tokens = metric_count(c->facts.generation_tokens);
    response.n_replicas = n;
    response.replicas = rows;
    rpc_call_reply(call, &response.base);
    free(rows);
    free(answers);
}
