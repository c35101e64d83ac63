/* A group of ranks that compute forward passes together. Rank 0 leads: it decides what runs and
 * gives the order; the others follow. A step is told in full every time (tokens, positions, block
 * tables), so followers keep no state that could disagree with the leader's.
 *
 * A group may hold two models: where draft and target share ranks, the leader's order says whose
 * step it is, and ranks without a shard of that model pass it over.
 *
 * One engine per rank, used by the rank's compute thread. */
#pragma once
#include "worker/transformer.h"

struct engine;
struct trace;

enum engine_model { ENGINE_TARGET, ENGINE_DRAFT, ENGINE_N_MODELS };

struct engine_options {
    struct transformer *transformers[ENGINE_N_MODELS]; /* borrowed; NULL: this rank has no shard of it */
    struct comm *group;                                /* borrowed: everybody who is told */
    struct trace *trace;                               /* borrowed; NULL: none */
    int max_rows, max_segments, max_logit_rows, max_blocks; /* per step; blocks over all segments */
};

struct engine *engine_create(const struct engine_options *options);
void engine_destroy(struct engine *engine);

/* Leader: one step of a model, which rank 0 has a shard of, over its ranks. See
 * transformer_forward for *logits and errors. */
enum status engine_forward(struct engine *engine, enum engine_model model,
                           const struct transformer_batch *batch, float **logits,
                           struct error *err);

/* Leader: tells the followers to return from engine_follow. */
enum status engine_stop(struct engine *engine, struct error *err);

/* Follower: computes steps until the leader stops. OK after engine_stop, else why the group died. */
enum status engine_follow(struct engine *engine, struct error *err);

/* Time the leader spent in telling steps (not in transformer_forward), ns since start. */
int64_t engine_tell_ns(const struct engine *engine);
