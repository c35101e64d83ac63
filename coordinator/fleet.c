#include "coordinator/fleet.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *replica_state_name(enum replica_state state) {
    static const char *const names[] = {"joining", "loading", "serving", "lost", "refused"};
    return names[state];
}

static struct replica *find(const struct fleet *fleet, const char *id) {
    for (size_t i = 0; i < fleet->n_replicas; i++) {
        if (strcmp(fleet->replicas[i]->id, id) == 0) return fleet->replicas[i];
    }
    return NULL;
}

static bool is_live(const struct replica *replica) {
    return replica->state <= REPLICA_SERVING;
}

static enum status check_ranks(const Tandem__V1__Hello *hello, struct error *err) {
    for (size_t i = 0; i < hello->n_ranks; i++) {
        if (hello->ranks[i]->rank == i) continue;
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "entry %zu of the hello is rank %" PRIu32 "; expected ranks 0 to %zu in order",
                         i, hello->ranks[i]->rank, hello->n_ranks - 1);
    }
    return STATUS_OK;
}

/* A place in the table: the one of this id if it is not live, a new one, or that of a dead replica. */
static enum status take_place(struct fleet *fleet, struct replica **out, const char *id,
                              struct error *err) {
    struct replica *replica = find(fleet, id);
    if (replica != NULL && is_live(replica)) {
        return error_set(err, STATUS_ALREADY_EXISTS,
                         "a replica named \"%s\" is already here and %s; expected another name", id,
                         replica_state_name(replica->state));
    }
    if (replica == NULL && fleet->n_replicas < FLEET_MAX_REPLICAS) {
        replica = fleet->replicas[fleet->n_replicas++] = xcalloc(1, sizeof *replica);
    }
    for (size_t i = 0; replica == NULL && i < fleet->n_replicas; i++) {
        if (!is_live(fleet->replicas[i])) replica = fleet->replicas[i];
    }
    if (replica == NULL) {
        return error_set(err, STATUS_RESOURCE_EXHAUSTED, "%d replicas are here; expected no more",
                         FLEET_MAX_REPLICAS);
    }
    memset(replica, 0, sizeof *replica);
    snprintf(replica->id, sizeof replica->id, "%s", id);
    *out = replica;
    return STATUS_OK;
}

static void keep_facts(struct replica *replica, const Tandem__V1__Hello *hello) {
    replica->n_ranks = (uint32_t)hello->n_ranks;
    for (size_t i = 0; i < hello->n_ranks; i++) {
        struct replica_rank *rank = &replica->ranks[i];
        snprintf(rank->host, sizeof rank->host, "%s", hello->ranks[i]->host);
        snprintf(rank->device, sizeof rank->device, "%s", hello->ranks[i]->device);
        rank->memory_bytes = hello->ranks[i]->memory_bytes;
        rank->cores = hello->ranks[i]->cores;
    }
}

/* A rank that stands alone sends no links, nor does a replica that did not measure. */
static enum status check_links(const Tandem__V1__Hello *hello, struct error *err) {
    const Tandem__V1__Links *links = hello->links;
    if (links == NULL) return STATUS_OK;
    size_t n = hello->n_ranks;
    if (links->n_latency_ns != n * n || links->n_gigabytes_per_second != n * n) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "the hello has %zu latencies and %zu bandwidths of links; expected %zu of "
                         "%zu ranks", links->n_latency_ns, links->n_gigabytes_per_second, n * n, n);
    }
    if (links->n_host_latency_ns != 0 && links->n_host_latency_ns != n * n) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "the hello has %zu latencies of links between hosts; expected none, or %zu "
                         "of %zu ranks",
                         links->n_host_latency_ns, n * n, n);
    }
    for (size_t i = 0; i < n * n; i++) {
        float speed = links->gigabytes_per_second[i];
        if (i / n == i % n || (speed > 0 && isfinite(speed))) continue;
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "the link from rank %zu to %zu has %g GB/s; expected more than 0", i / n,
                         i % n, (double)speed);
    }
    return STATUS_OK;
}

static void take_slower(struct planner_links *out, const Tandem__V1__Links *links, size_t i) {
    double latency = (double)links->latency_ns[i] / 1e3, speed = links->gigabytes_per_second[i];
    if (latency > out->latency_us) out->latency_us = latency;
    bool first = out->gigabytes_per_second == 0;
    if (first || speed < out->gigabytes_per_second) out->gigabytes_per_second = speed;
}

/* Once it is placed: links inside groups carry collectives, the leaders' the hand-off. */
static void keep_links(struct replica *replica, const Tandem__V1__Hello *hello) {
    const struct placement *p = &replica->placement;
    size_t n = hello->n_ranks;
    if (hello->links == NULL) return;
    for (size_t i = 0; i < n * n; i++) {
        bool same_group = (i / n < p->target_degree) == (i % n < p->target_degree);
        if (i / n != i % n && same_group) take_slower(&replica->links, hello->links, i);
    }
    if (p->split != PLACEMENT_DISJOINT) return;
    bool apart = hello->links->n_host_latency_ns > 0;
    const uint32_t *latency_ns = apart ? hello->links->host_latency_ns : hello->links->latency_ns;
    uint32_t there = latency_ns[p->target_degree], back = latency_ns[p->target_degree * n];
    replica->links.handoff_us = (double)(there > back ? there : back) / 1e3;
}

enum status fleet_join(struct fleet *fleet, struct replica **out, const Tandem__V1__Hello *hello,
                       const struct placement_wish *wish, struct error *err) {
    struct replica *replica = NULL;
    if (hello->protocol != FLEET_PROTOCOL) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "the worker speaks protocol %" PRIu32 ", this coordinator %d; "
                         "expected both of one release",
                         hello->protocol, FLEET_PROTOCOL);
    }
    size_t n = strlen(hello->replica_id);
    if (n == 0 || n >= sizeof replica->id) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "replica_id has %zu bytes; expected 1 to %zu", n, sizeof replica->id - 1);
    }
    TRY(take_place(fleet, &replica, hello->replica_id, err));
    enum status status = check_ranks(hello, err);
    if (status == STATUS_OK) status = check_links(hello, err);
    if (status == STATUS_OK) {
        uint32_t n_ranks = hello->n_ranks > UINT32_MAX ? UINT32_MAX : (uint32_t)hello->n_ranks;
        status = placement_plan(&replica->placement, n_ranks, wish, err);
    }
    if (status != STATUS_OK) {
        replica->state = REPLICA_REFUSED;
        snprintf(replica->detail, sizeof replica->detail, "%s", err->text);
        return status;
    }
    keep_facts(replica, hello);
    keep_links(replica, hello);
    replica->state = REPLICA_LOADING;
    *out = replica;
    return STATUS_OK;
}

void fleet_free(struct fleet *fleet) {
    for (size_t i = 0; i < fleet->n_replicas; i++) free(fleet->replicas[i]);
    *fleet = (struct fleet){0};
}

static enum status expect_loading(const struct replica *replica, const char *message,
                                  struct error *err) {
    if (replica->state == REPLICA_LOADING) return STATUS_OK;
    return error_set(err, STATUS_INTERNAL, "replica %s sent %s while %s; expected it while loading",
                     replica->id, message, replica_state_name(replica->state));
}

enum status replica_progress(struct replica *replica, const Tandem__V1__LoadProgress *progress,
                             struct error *err) {
    TRY(expect_loading(replica, "load progress", err));
    replica->load_done = progress->bytes_done;
    replica->load_total = progress->bytes_total;
    return STATUS_OK;
}

enum status replica_ready(struct replica *replica, const Tandem__V1__Ready *ready,
                          uint64_t checkpoint_fingerprint, struct error *err) {
    TRY(expect_loading(replica, "ready", err));
    if (ready->checkpoint_fingerprint != checkpoint_fingerprint) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "the replica loaded a checkpoint with fingerprint %016" PRIx64
                         ", the coordinator's folder has %016" PRIx64
                         "; expected the same files on every host",
                         ready->checkpoint_fingerprint, checkpoint_fingerprint);
    }
    if (ready->max_sequences == 0 || ready->max_context < 2 || ready->kv_blocks == 0) {
        return error_set(err, STATUS_INTERNAL,
                         "the replica is ready for %" PRIu32 " sequences of %" PRIu32
                         " tokens in %" PRIu32 " KV blocks; expected at least 1, 2 and 1",
                         ready->max_sequences, ready->max_context, ready->kv_blocks);
    }
    replica->kv_blocks = ready->kv_blocks;
    replica->max_sequences = ready->max_sequences;
    replica->max_context = ready->max_context;
    replica->checkpoint_fingerprint = ready->checkpoint_fingerprint;
    for (size_t i = 0; i < ready->n_ranks; i++) {
        const Tandem__V1__RankReady *said = ready->ranks[i];
        if (said->rank >= replica->n_ranks) continue;
        struct replica_rank *rank = &replica->ranks[said->rank];
        rank->weights_bytes = said->weights_bytes;
        rank->kv_bytes = said->kv_bytes;
        rank->scratch_bytes = said->scratch_bytes;
        if (said->device[0]) snprintf(rank->device, sizeof rank->device, "%s", said->device);
    }
    replica->state = REPLICA_SERVING;
    return STATUS_OK;
}

void replica_step(struct replica *replica, const Tandem__V1__Step *step, int64_t now_ns) {
    if (step->stats != NULL) {
        replica->stats = *step->stats;
        replica->stats.spec = NULL;   /* it goes with the message */
        replica->speculation = speculation_facts_of(step->stats->spec);
    }
    const int slots = REPLICA_RATE_SECONDS + 1;
    int64_t second = now_ns / 1000000000;
    if (replica->rate_first_second == 0) replica->rate_first_second = replica->rate_second = second;
    int64_t from = replica->rate_second;
    if (second - from > slots) from = second - slots;
    for (int64_t s = from + 1; s <= second; s++) replica->rate_tokens[s % slots] = 0;
    replica->rate_second = second;
    replica->rate_tokens[second % slots] += (uint32_t)step->n_tokens;
}

double replica_rate(const struct replica *replica, int64_t now_ns) {
    const int slots = REPLICA_RATE_SECONDS + 1;
    int64_t second = now_ns / 1000000000;
    uint64_t tokens = 0;
    int64_t first = second - REPLICA_RATE_SECONDS;
    if (first < replica->rate_first_second) first = replica->rate_first_second;
    for (int64_t s = first; s <= replica->rate_second; s++) {
        if (replica->rate_second - s < slots) tokens += replica->rate_tokens[s % slots];
    }
    double seconds = (double)now_ns / 1e9 - (double)first;
    return replica->rate_first_second == 0 ? 0 : (double)tokens / (seconds < 1 ? 1 : seconds);
}

void replica_lost(struct replica *replica, const char *why) {
    replica->state = REPLICA_LOST;
    snprintf(replica->detail, sizeof replica->detail, "%s", why);
    replica->line = NULL;
    replica->n_submitted = 0;
    replica->n_tokens = 0;
    replica->stats.running = replica->stats.waiting = replica->stats.kv_blocks_used = 0;
}

size_t fleet_count(const struct fleet *fleet, enum replica_state state) {
    size_t n = 0;
    for (size_t i = 0; i < fleet->n_replicas; i++) n += fleet->replicas[i]->state == state;
    return n;
}

void fleet_explain(const struct fleet *fleet, char *out, size_t size) {
    int n = snprintf(out, size, "no replica is serving: ");
    if (fleet->n_replicas == 0) snprintf(out + n, size - (size_t)n, "none has joined");
    for (size_t i = 0; i < fleet->n_replicas && (size_t)n < size; i++) {
        const struct replica *replica = fleet->replicas[i];
        n += snprintf(out + n, size - (size_t)n, "%sreplica %s is %s", i > 0 ? "; " : "",
                      replica->id, replica_state_name(replica->state));
        if ((size_t)n >= size) break;
        if (replica->state == REPLICA_LOADING) {
            uint64_t total = replica->load_total ? replica->load_total : 1;
            n += snprintf(out + n, size - (size_t)n, ", %" PRIu64 " %%",
                          (uint64_t)(100.0 * (double)replica->load_done / (double)total));
        } else if (replica->detail[0] != '\0') {
            n += snprintf(out + n, size - (size_t)n, " (%s)", replica->detail);
        }
    }
}
