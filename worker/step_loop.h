/* The leader's step: what runs now (scheduler.h, kv_blocks.h), what is drafted for it
 * (speculation.h), one forward pass of the group (engine.h), the target's own token at every place
 * and the verdict over the drafted ones, and what came of it. Knows no network: requests come in
 * by calls, results go out as columns. Used by replica.c, by tests and by the bench.
 *
 * Owned and called by rank 0's compute thread. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "kernels/backend.h"
#include "model/config.h"
#include "tandem/v1/replica.pb-c.h"
#include "worker/draft/drafter.h"
#include "worker/engine.h"
#include "worker/spec/accept.h"
#include "worker/spec/policy.h"

struct step_loop;
struct trace;

struct step_loop_options {
    struct engine *engine;   /* borrowed */
    struct backend *backend; /* borrowed: draws tokens */
    const struct model_config *config;
    int n_blocks;        /* of the group's KV memory */
    int max_sequences;   /* running at once */
    int max_step_tokens; /* token budget of a step */
    int max_context;     /* positions of one sequence, at most the model's */
    bool prefix_cache;
    int max_logit_rows;  /* of a step; 0: max_sequences */
    /* Speculation; all zero: none. */
    struct drafter *drafter; /* borrowed */
    bool drafter_remote;     /* on ranks of its own */
    int64_t handoff_ns;
    int max_window;
    enum sampling_rule rule;
    struct trace *trace; /* borrowed; NULL: none */
};

struct step_loop *step_loop_create(const struct step_loop_options *options);
void step_loop_destroy(struct step_loop *loop);

/* One request; everything is copied. Parameters were checked by the coordinator. */
struct step_request {
    uint64_t key; /* unique among live requests */
    const int32_t *prompt;
    int n_prompt; /* >= 1 */
    struct sample_params sampling; /* bias and banned are filled in here */
    const int32_t *bias_tokens;
    const float *biases;
    int n_biases;
    const int32_t *stop_token_ids;
    int n_stop_token_ids;
    bool ignore_eos;
    int max_tokens; /* >= 1; the context limit ends a sequence as well */
    int min_tokens;
    int64_t deadline_ns; /* on clock_now_ns's clock; 0: none */
    struct spec_wish wish; /* mode -1: the policy's */
};

/* In force from the next step on, as far as this replica can run it (speculation_fit). Without a
 * drafter nothing changes. */
void step_loop_set_policy(struct step_loop *loop, const struct spec_policy *policy);

/* A request that can never run (longer than the context, more KV than there is) is finished with
 * FINISH_REFUSED in the next step. */
void step_loop_submit(struct step_loop *loop, const struct step_request *request);

/* The request ends in the next step with FINISH_CANCELLED; unknown keys are ignored (it may have
 * just finished). */
void step_loop_cancel(struct step_loop *loop, uint64_t key);

/* Nothing to compute and nothing to report. */
bool step_loop_idle(const struct step_loop *loop);

/* One iteration. UNAVAILABLE or ABORTED when the group is lost. */
enum status step_loop_step(struct step_loop *loop, int64_t now_ns, struct error *err);

/* What the last step brought, as the coordinator is told it. Both structs are filled with pointers
 * that stay valid until the next step. */
void step_loop_describe(struct step_loop *loop, Tandem__V1__Step *step,
                        Tandem__V1__StepStats *stats);

/* Where the time of the leader's steps went, since creation. */
struct step_loop_times {
    int64_t steps;     /* that computed something */
    int64_t total_ns;
    int64_t pass_ns;   /* the target's passes, collectives and telling included */
    int64_t draft_ns;  /* waiting for the drafter, or drafting where it is local */
    int64_t sample_ns; /* the target's own tokens */
};
struct step_loop_times step_loop_times(const struct step_loop *loop);
