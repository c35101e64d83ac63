/* A group of ranks that compute forward passes together. Rank 0 leads: it decides what runs and gives
 * the order; the others follow. A step is told in full every time (tokens, positions, block tables),
 * so followers keep no state that could disagree with the leader's.
 *
 * One engine per rank, used by the rank's compute thread. */
#pragma once
#include "worker/transformer.h"

struct engine;

struct engine_options {
    struct transformer *transformer; /* borrowed */
    struct comm *group;              /* borrowed */
    int max_rows, max_segments, max_logit_rows, max_blocks; /* per step; blocks over all segments */
};

struct engine *engine_create(const struct engine_options *options);
void engine_destroy(struct engine *engine);

/* Leader: one step over the whole group. See transformer_forward for *logits and errors. */
enum status engine_forward(struct engine *engine, const struct transformer_batch *batch,
                           float **logits, struct error *err);

/* Leader: tells the followers to return from engine_follow. */
enum status engine_stop(struct engine *engine, struct error *err);

/* Follower: computes steps until the leader stops. OK after engine_stop, else why the group died. */
enum status engine_follow(struct engine *engine, struct error *err);

/* Time the leader spent in telling steps (not in transformer_forward), ns since start. */
int64_t engine_tell_ns(const struct engine *engine);
