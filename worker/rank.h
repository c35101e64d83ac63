/* One rank of a replica: which shards of which models it holds by the plan, and what it does once
 * it is loaded. The same for ranks under mpirun (replica.c) and for threads of one process
 * (local_group.c).
 *
 * Topology: target ranks are 0..T-1. A draft model stands on ranks of its own, T..T+D-1 (disjoint:
 * both can compute at once), or on the target's first D (shared). Rank 0 leads the replica; in a
 * disjoint one rank T leads the draft.
 *
 * Owned and called by the rank's compute thread. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "kernels/backend.h"
#include "model/checkpoint.h"
#include "worker/capacity.h"
#include "worker/comm/comm.h"
#include "worker/draft/drafter.h"
#include "worker/draft/model_drafter.h"
#include "worker/engine.h"
#include "worker/spec/accept.h"

enum { RANK_MAX_PATH = 4096 };

enum rank_drafter { RANK_NO_DRAFTER, RANK_MODEL_DRAFTER, RANK_NGRAM_DRAFTER };

/* The plan as every rank needs it, small and flat: it is broadcast as bytes. */
struct rank_plan {
    char model_dir[RANK_MAX_PATH], draft_dir[RANK_MAX_PATH];
    uint64_t fingerprint, draft_fingerprint; /* 0: not known */
    enum dtype weights;
    enum rank_drafter drafter;
    bool shared;
    int32_t target_degree, draft_degree; /* draft_degree 0 without a draft model */
    int64_t kv_budget_bytes;
    int32_t max_sequences, max_step_tokens;
    int32_t max_context; /* 0: the target's */
    bool prefix_cache;
    int32_t max_window, max_layer_width;
    int32_t max_logit_rows; /* of a step of the target; 0: what windows and sequences want */
    enum sampling_rule rule;
    /* For measuring, see model_drafter.h; a pointer holds within one process. */
    bool keeps_fuzzy;
    model_drafter_replace_fn replace;
    void *replace_user;
};

/* Ranks of the replica, and the shard of a rank, -1 where it has none. */
int rank_plan_n_ranks(const struct rank_plan *plan);
int rank_plan_target_shard(const struct rank_plan *plan, int rank);
int rank_plan_draft_shard(const struct rank_plan *plan, int rank);
/* Rank 0 and the draft's leader are a pair; -1: there is none. */
int rank_plan_draft_leader(const struct rank_plan *plan);
/* Whether two ranks of the group that `rank` is in (the target's, or a draft's of its own) stand on one
 * device, which NCCL refuses; devices[n_ranks]: equal numbers, equal devices. The same for all of a
 * group, who must go one way. */
bool rank_plan_shares_device(const struct rank_plan *plan, int rank, const int *devices);
/* Rows whose logits a step may want. */
int rank_plan_logit_rows(const struct rank_plan *plan);

/* The groups of a rank, of host memory; NULL where it is no member. Borrowed. Tensors of a device go
 * through groups that the rank makes of them. */
struct rank_comms {
    struct comm *target, *draft, *pair;
};

struct rank_options {
    const struct rank_plan *plan; /* borrowed */
    int rank;
    enum backend_isa isa; /* not AUTO */
    int device;           /* CUDA: which */
    bool shares_device;   /* rank_plan_shares_device: no NCCL */
    bool one_process;     /* all ranks are threads of this process */
    int n_threads;
    int64_t memory_bytes; /* available to this rank */
};

struct rank;

/* Reads what the checkpoints say of themselves and computes what fits; no weights yet.
 * FAILED_PRECONDITION when a checkpoint is not the plan's or the draft's context is too short;
 * RESOURCE_EXHAUSTED with the numbers when it does not fit. */
enum status rank_open(struct rank **out, const struct rank_options *options, struct error *err);
void rank_close(struct rank *rank);

/* After rank_open. */
const struct capacity *rank_capacity(const struct rank *rank);
uint64_t rank_fingerprint(const struct rank *rank); /* of both checkpoints together */
uint64_t rank_target_fingerprint(const struct rank *rank);
int rank_max_context(const struct rank *rank);
const struct model_config *rank_target_config(const struct rank *rank);
const char *rank_role(const struct rank *rank); /* "target 0/2, draft 0/1" */

struct rank_loading {
    struct rank_comms comms;
    int n_blocks; /* KV blocks of each pool, agreed on by all ranks */
    struct trace *trace; /* NULL: none */
    void (*progress)(void *user, size_t bytes_done, size_t bytes_total); /* NULL: none */
    void *progress_user;
};

/* Packs weights, allocates KV and scratch. Collective where ranks compute on devices; a failure aborts the
 * groups of `loading`, so that nobody waits for this rank. */
enum status rank_load(struct rank *rank, const struct rank_loading *loading, struct error *err);

/* As transformer_memory, of both models. */
struct transformer_memory rank_memory(const struct rank *rank);
struct transformer *rank_transformer(struct rank *rank, enum engine_model model); /* NULL: none */

/* Rank 0 after rank_load: what its step loop needs. Makes contact with the draft's leader where it
 * is remote, whose rank must be in rank_follow. */
struct rank_leadership {
    struct engine *engine;
    struct backend *backend;
    struct drafter *drafter; /* owned by the rank; NULL: none */
    bool drafter_remote;
    int64_t handoff_ns;
};
enum status rank_lead(struct rank *rank, struct rank_leadership *out, struct error *err);
/* Rank 0: tells all other ranks to return from rank_follow. */
enum status rank_stop(struct rank *rank, struct error *err);

/* Every other rank: computes until rank 0 stops. OK then, else why the group died. */
enum status rank_follow(struct rank *rank, struct error *err);
