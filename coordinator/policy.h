/* The policy: which mode, window and delay a replica runs with, from what its steps report. Pure: time
 * is what the messages say, and nothing is random.
 *
 * Every mode that the placement supports is estimated as (prediction of speed_model.h, fed with the
 * measured acceptance and step times) x (how far measured speed was from that prediction when the mode
 * last ran). So a mode at rest follows the acceptance and the times that the running one measures.
 *
 *   exploring ──all modes tried──▶ settled ──a budget for it, and a stale estimate──▶ probing
 *                                     ▲──────────────── best estimate ──────────────────┘
 *
 * A segment is a quarter second and 64 rounds in one setting (slow replicas: a second, trials: less);
 * at its end, and only then, the policy decides. Settled, it changes for a gain of 5 %, twice in a row;
 * to plain for any gain, for speculation must earn its keep. Probes cost at most 2 % of the time, and
 * grow rarer while they change nothing. A mode that is fixed never changes; its window follows where
 * it is not fixed too.
 *
 * One for each replica; owner: the coordinator's thread. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "coordinator/speed_model.h"
#include "tandem/v1/replica.pb-c.h"

enum { POLICY_BUCKETS = 10 };   /* batches of 1, 2, 3-4, 5-8 ... sequences, as in SpecStats */

struct policy_setting {
    enum spec_mode mode;
    int window, layer_width, delay;
};

/* What is fixed. */
struct policy_wish {
    int mode;         /* enum spec_mode; -1: auto */
    int window;       /* 0: auto */
    int delay;        /* -1: auto; cut to window - 1 */
    int layer_width;  /* of layer-parallel modes: 1, 2, 4 */
};

struct policy_options {
    struct policy_wish wish;
    unsigned modes;            /* bit m: the placement supports enum spec_mode m */
    int max_window;
    struct speed_model prior;  /* until something is measured; and its shape afterwards */
};

enum policy_phase { POLICY_EXPLORING, POLICY_SETTLED, POLICY_PROBING };

/* What is known of a mode with batches of one size. */
struct policy_record {
    double factor;             /* measured / predicted; 0: never ran */
    double tokens_per_second;  /* measured, all sequences */
    double at_us;              /* busy time when it was measured */
};

/* The times that replicas report, as multiples of the prior's. */
enum policy_series {
    POLICY_TARGET, POLICY_VERIFY, POLICY_DRAFT, POLICY_FUZZY, POLICY_CALIBRATE, POLICY_N_SERIES
};

/* One of them. What a mode at rest does not measure drifts as what the running one does: a machine
 * that has become slow is slow for both. */
struct policy_time {
    double raw;                /* as reported, to see it change */
    double scale, drift;       /* when it last changed; 0: never */
    double at_us;
    int streak;                /* changes with no pause between */
};

struct policy {
    struct policy_options options;
    struct policy_setting current, settled;   /* settled: to go back to after a probe */
    enum policy_phase phase;
    struct speed_model model;                 /* measured, of the last step's bucket */
    double accept_exact, accept_fuzzy;        /* smoothed; 0: not measured */
    struct policy_time times[POLICY_BUCKETS][POLICY_N_SERIES];
    const struct policy_time *lead;           /* whose changes are the machine's drift; NULL: none */
    double drift, verify_rows;
    int bucket;
    double n_sequences;
    struct policy_record records[POLICY_BUCKETS][SPEC_N_MODES];

    /* The segment that runs. */
    bool in_force, warm;                      /* the replica says so; its first rounds are over */
    uint32_t rounds, warm_rounds;
    uint64_t drafts_before;
    int segment_bucket;
    double segment_us, tokens, measured_us, sequence_us; /* sequence_us: us x sequences */

    double busy_us;                           /* of all steps */
    double explored_us, probe_loss_us;        /* since exploring ended: when, and what probes cost */
    double next_probe_us, probe_pause_us;
    int rival_streak;                         /* decisions in a row for the same other setting */
    struct policy_setting rival;
};

void policy_init(struct policy *policy, const struct policy_options *options);

/* Another wish from now on; what was measured stays. The caller has checked that the modes are
 * supported. */
void policy_set_wish(struct policy *policy, const struct policy_wish *wish);

/* One step of the replica. */
struct policy_step {
    const Tandem__V1__SpecStats *spec;
    uint32_t n_sequences, n_tokens, step_us;
    bool prefill;              /* its time says nothing about rounds */
};

/* Takes a step in. True: policy->current has changed, the replica is to be told. */
bool policy_observe(struct policy *policy, const struct policy_step *step);

/* What the policy holds of a mode now: the best setting and its speed over all sequences. */
struct policy_estimate {
    struct policy_setting setting;
    double predicted;          /* tokens/s by the model, uncorrected */
    double expected;           /* by the model and what was measured */
    double measured;           /* when it last ran with such batches; 0: never */
};
struct policy_estimate policy_estimate(const struct policy *policy, enum spec_mode mode);

bool policy_allows(const struct policy *policy, enum spec_mode mode);
const char *policy_phase_name(enum policy_phase phase);
