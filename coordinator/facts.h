/* What the coordinator counts, for /metrics and for the periodic log line. Names are vLLM's behind
 * the prefix tandem_. Filled on the coordinator's thread; rendering is for any thread. */
#pragma once
#include "common/metrics.h"
#include "coordinator/fleet.h"

enum facts_finish { FACTS_STOP, FACTS_LENGTH, FACTS_CANCELLED, FACTS_N_FINISH };

enum facts_refusal {
    FACTS_INVALID, FACTS_QUEUE_FULL, FACTS_UNAVAILABLE, FACTS_DEADLINE, FACTS_OTHER,
    FACTS_N_REFUSAL
};

/* What drafting did, over all replicas. */
struct facts_speculation {
    struct metric *drafts, *draft_tokens, *accepted_tokens;
    struct metric *accepted_per_position[SPEC_MAX_WINDOW];
    struct metric *pre_verify_hits, *post_verify_continuations, *rollbacks, *discarded_tokens;
    struct metric *draft_wait, *target_wait;
    struct metric *window, *layer_width, *mode[SPEC_N_MODES];
};

struct facts {
    struct metrics *metrics;
    struct metric *running, *waiting, *kv_usage;
    struct metric *prefix_queries, *prefix_hits, *preemptions;
    struct metric *prompt_tokens, *generation_tokens;
    struct metric *success[FACTS_N_FINISH], *refused[FACTS_N_REFUSAL], *disconnected;
    struct metric *ttft, *itl, *e2e, *queue_time, *iteration_tokens;
    struct metric *replicas[REPLICA_N_STATES];
    struct facts_speculation speculation;
    uint64_t logged_prompt, logged_generated, logged_drafts, logged_accepted;
    int64_t logged_ns;
};

void facts_init(struct facts *facts, const char *model, const char *weights);
void facts_fini(struct facts *facts);

/* Counts a request that ended with a status other than OK. */
void facts_refuse(struct facts *facts, enum status status);

/* Takes the counters of a step's statistics, as the difference to those that the replica has from
 * the step before. Counters that went back count from 0: the replica has started again. */
void facts_step(struct facts *facts, const struct replica *before, const Tandem__V1__Step *step);

/* Brings the gauges up to date. */
void facts_gauges(struct facts *facts, const struct fleet *fleet, uint32_t n_queued);

/* Every ten seconds, while there is something to say: the log line. */
void facts_log(struct facts *facts, const struct fleet *fleet, uint32_t n_queued, int64_t now_ns);
