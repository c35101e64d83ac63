/* The planner: from what checkpoints say of themselves and what is declared of the machine to which
 * ranks do what, in which mode, with which window and layer width. Pure.
 *
 * It enumerates every placement that the ranks allow, keeps those that fit into each rank's memory,
 * predicts their speed (speed_model.h) for one sequence and sorts. `plain` is always among them. What
 * really happens is measured later: policy.h. Step times are the roofline of a rank (bytes of weights
 * over bandwidth, and arithmetic), a fixed time per layer, and its collectives. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/dtype.h"
#include "common/error.h"
#include "common/spec_mode.h"
#include "coordinator/placement.h"
#include "coordinator/speed_model.h"
#include "model/config.h"

/* Of one rank; all ranks are alike. */
struct planner_machine {
    uint64_t memory_bytes;   /* 0: not known, everything fits */
    double bandwidth_gbs;    /* 10^9 bytes a second that weights are read with */
    double compute_gflops;   /* 10^9 operations a second that products reach */
    double collective_us;    /* one all-reduce of a few rows */
    double handoff_us;       /* tokens from draft to target or back, ranks of their own */
    double layer_us;         /* of a decoder layer, besides its weights */
    double acceptance;       /* assumed probability that a drafted token holds; below 0: by drafter */
};
struct planner_machine planner_machine_default(void); /* a core of a server processor */

/* What ranks measured of the links between them; 0: not measured, or no such link. */
struct planner_links {
    double latency_us, gigabytes_per_second; /* of the slowest link inside a group */
    double handoff_us;                       /* between the leaders of target and draft */
};

/* Puts what was measured in place of what is declared: a collective moves a row of `width` floats. */
void planner_use_links(struct planner_machine *machine, const struct planner_links *links,
                       int width);

struct planner_limits {
    uint32_t max_sequences, max_step_tokens;
    uint32_t max_context;    /* what will be served */
    uint32_t max_window;
};

/* What is fixed by whoever asks; 0 (mode, split: -1) leaves it to the planner. Besides the plain
 * candidates of the wish there is always plain on all ranks. */
struct planner_wish {
    int mode;                /* enum spec_mode */
    int split;               /* enum placement_split of those with a drafter; -1: free */
    uint32_t target_ranks, draft_ranks;
    uint32_t n_ranks;        /* at most so many in all; > 0 */
    uint32_t layer_width, window;
};

struct planner_input {
    const struct model_config *target;
    const struct model_config *draft;   /* of drafter MODEL */
    enum placement_drafter drafter;
    enum dtype weights;
    struct planner_machine machine;
    struct planner_limits limits;
    struct planner_wish wish;
};

struct planner_candidate {
    enum spec_mode mode;
    enum placement_split split;
    uint32_t target_ranks, draft_ranks;  /* draft_ranks 0: plain or n-gram */
    uint32_t layer_width;
    struct speed_choice choice;
    uint64_t memory_bytes;   /* that the fullest rank needs: weights, scratch, KV of one sequence */
    bool fits;
    char reason[240];        /* why not, with the numbers */
};

enum { PLANNER_MAX_CANDIDATES = 192 };

struct planner_result {
    uint32_t n_candidates, n_fitting; /* the fitting ones first, each kind from fast to slow */
    struct planner_candidate candidates[PLANNER_MAX_CANDIDATES];
};

/* INVALID_ARGUMENT when no placement is what is wished; RESOURCE_EXHAUSTED with the reason of the
 * smallest when none fits (*out is filled then as well). */
enum status planner_run(struct planner_result *out, const struct planner_input *input,
                        struct error *err);

/* What the ranks of a candidate promise: step times for 1 to SPEC_MAX_WINDOW + 1 rows. */
struct speed_model planner_speed_model(const struct planner_input *input,
                                       const struct planner_candidate *candidate);

/* The acceptance that is assumed. */
double planner_acceptance(const struct planner_input *input);

/* The placement to start with. mode >= 0: the fastest fitting candidate of that mode. -1: the fastest
 * of all; where that is `plain`, the fastest with the drafter that costs the target no rank, for a
 * drafter that is there can be used online. NULL: none fits (with -1: none but plain). */
const struct planner_candidate *planner_place(const struct planner_result *result, int mode);

/* One or two sentences: why the first of the fitting candidates is the first, against plain and the
 * runner-up. */
void planner_explain(const struct planner_result *result, char *out, size_t size);

/* "pearl 2+1", "easyspec 4/2 N 2", "sd 2+ngram", "plain 2": a candidate in short. */
void planner_name(const struct planner_candidate *candidate, char *out, size_t size);
