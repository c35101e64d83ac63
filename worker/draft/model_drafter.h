/* A draft model as drafter: its own paged KV and prefix cache over an engine, prompts in chunks,
 * rollback by truncation, and three numbers for each sequence: committed, exact and present
 * positions.
 *
 * Layer-parallel steps (EasySpec, arXiv 2502.02493; speculation.md 3) leave KV that is only nearly
 * right ("fuzzy": present, not exact). The first pass of a round is exact and begins behind the
 * last exact position, so fuzzy KV never outlives a round: that is the bonus calibration, and its
 * logits are the round's first token, which therefore is never a fuzzy one. */
#pragma once
#include "kernels/backend.h"
#include "model/config.h"
#include "worker/draft/drafter.h"
#include "worker/engine.h"

/* For measuring with an acceptance of one's choice: the token to propose at a position of the request
 * with this seed, whatever the model drew; -1: what it drew. On the drafter's thread. */
typedef int32_t (*model_drafter_replace_fn)(void *user, uint64_t seed, int position);

struct model_drafter_options {
    struct engine *engine;   /* borrowed; holds ENGINE_DRAFT */
    struct backend *backend; /* borrowed: draws tokens */
    struct trace *trace;     /* borrowed; NULL: none */
    int vocab;               /* ids from here on are never drafted */
    int stride;              /* logits of a row: the draft's vocabulary */
    int n_blocks;
    int max_sequences;
    int max_rows; /* of one pass */
    bool prefix_cache;
    bool keeps_distributions; /* for sampling rule `rejection` */
    bool keeps_fuzzy; /* fuzzy KV passes for exact: measures what the calibration is worth */
    bool feeds;       /* a block's tokens go from pass to pass on the device; the host waits once, at
                         its end. For a draft on one rank */
    model_drafter_replace_fn replace; /* NULL: none */
    void *replace_user;
};

struct drafter *model_drafter_create(const struct model_drafter_options *options);

/* How many positions of a slot have exact KV, and where; for tests. blocks: borrowed until the
 * next call. */
int model_drafter_exact(const struct drafter *drafter, int slot, const int32_t **blocks);

/* In the slack behind an answer: makes the KV of everything drafted exact, which also brings the
 * next round's first token should everything hold. Only after a collect of all. *took_ns: 0 where
 * there was nothing to do. */
enum status model_drafter_calibrate(struct drafter *drafter, int64_t *took_ns,
                                    struct error *err);
/* Whether the last round left fuzzy KV behind. */
bool model_drafter_is_fuzzy(const struct drafter *drafter);
