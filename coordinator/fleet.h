/* The replicas: who joined, what state each is in, what it said of itself. Pure: time is an
 * argument; sending and receiving is attach.c's.
 *
 *   joining ──plan──▶ loading ──ready──▶ serving ──line lost, fatal──▶ lost ──same id joins──▶ joining
 *      └────does not fit────▶ refused (stays listed until its id joins again)
 *
 * Owner: the coordinator's thread. Replicas have stable addresses until fleet_free. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/error.h"
#include "coordinator/placement.h"
#include "coordinator/planner.h"
#include "coordinator/policy.h"
#include "coordinator/speculation_facts.h"
#include "tandem/v1/replica.pb-c.h"

enum { FLEET_MAX_REPLICAS = 64, FLEET_PROTOCOL = 1 };

enum replica_state {
    REPLICA_JOINING, REPLICA_LOADING, REPLICA_SERVING, REPLICA_LOST, REPLICA_REFUSED,
    REPLICA_N_STATES
};

struct replica_rank {
    char host[128], device[64];
    uint64_t memory_bytes, weights_bytes, kv_bytes, scratch_bytes;
    uint32_t cores;
};

enum { REPLICA_RATE_SECONDS = 10 };

struct replica {
    char id[64];
    enum replica_state state;
    char detail[256];                /* why, when lost or refused */
    uint64_t load_done, load_total;  /* bytes */
    struct placement placement;
    uint32_t n_ranks;
    struct replica_rank ranks[PLACEMENT_MAX_RANKS];
    struct planner_links links;      /* as its ranks measured them */
    uint32_t kv_blocks, max_sequences, max_context; /* once ready */
    uint64_t checkpoint_fingerprint;
    Tandem__V1__StepStats stats;     /* of the last step; its spec is NULL: see speculation */
    struct speculation_facts speculation;
    struct policy policy;            /* kept by the owner; used where there is a drafter */
    /* Tokens in each of the last seconds, for the rate; second s is in slot s % length. */
    uint32_t rate_tokens[REPLICA_RATE_SECONDS + 1];
    int64_t rate_second, rate_first_second;
    uint32_t n_submitted;            /* requests there now: kept by the owner of requests */
    uint64_t n_tokens;               /* prompt and made tokens of those */
    void *line;                      /* the owner's stream to it; NULL: none */
};

struct fleet {
    struct replica *replicas[FLEET_MAX_REPLICAS];
    size_t n_replicas;
};

const char *replica_state_name(enum replica_state state);

/* Checks a Hello, plans, and lists the replica as loading (*out). On failure the words go to the
 * replica's leader: FAILED_PRECONDITION (protocol, ranks, world size), ALREADY_EXISTS (a live
 * replica has this id), RESOURCE_EXHAUSTED (too many replicas). A hello with a usable id that does
 * not fit is listed as refused. */
enum status fleet_join(struct fleet *fleet, struct replica **out, const Tandem__V1__Hello *hello,
                       const struct placement_wish *wish, struct error *err);

void fleet_free(struct fleet *fleet);

/* INTERNAL when the message contradicts the replica's state or plan; the replica is unchanged. */
enum status replica_progress(struct replica *replica, const Tandem__V1__LoadProgress *progress,
                             struct error *err);
enum status replica_ready(struct replica *replica, const Tandem__V1__Ready *ready,
                          uint64_t checkpoint_fingerprint, struct error *err);

/* Keeps the step's figures. */
void replica_step(struct replica *replica, const Tandem__V1__Step *step, int64_t now_ns);

void replica_lost(struct replica *replica, const char *why);

/* Tokens per second over the last ten (fewer when younger). */
double replica_rate(const struct replica *replica, int64_t now_ns);

size_t fleet_count(const struct fleet *fleet, enum replica_state state);

/* Why no request can run now: "no replica is serving: replica r1 is loading, 43 %". */
void fleet_explain(const struct fleet *fleet, char *out, size_t size);
