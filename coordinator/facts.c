#include "coordinator/facts.h"

#include <inttypes.h>
#include <stdio.h>

#include "common/log.h"

static const int64_t LOG_EVERY_NS = 10LL * 1000000000;

static void init_gauges(struct facts *facts, const char *model, const char *weights) {
    struct metrics *m = facts->metrics;
    char name[256], format[64], labels[400];
    metrics_label(name, sizeof name, "model_name", model);
    metrics_label(format, sizeof format, "weights", weights);
    snprintf(labels, sizeof labels, "version=\"" TANDEM_VERSION "\",%s,%s", name, format);
    metric_set(metrics_gauge(m, "tandem_build_info", labels, "Version and model; always 1."), 1);
    facts->running = metrics_gauge(m, "tandem_num_requests_running", "",
                                   "Requests in the running batches of the replicas.");
    facts->waiting = metrics_gauge(m, "tandem_num_requests_waiting", "",
                                   "Requests waiting, here and at the replicas.");
    facts->kv_usage = metrics_gauge(m, "tandem_kv_cache_usage_perc", "",
                                    "Share of the KV blocks in use, 0 to 1.");
    for (int state = 0; state < REPLICA_N_STATES; state++) {
        metrics_label(labels, sizeof labels, "state", replica_state_name(state));
        facts->replicas[state] = metrics_gauge(m, "tandem_replicas", labels, "Replicas by state.");
    }
}

static void init_counters(struct facts *facts) {
    static const char *const reasons[] = {"stop", "length", "cancelled"};
    static const char *const refusals[] = {"invalid_argument", "queue_full", "unavailable",
                                           "deadline", "other"};
    struct metrics *m = facts->metrics;
    char labels[64];
    facts->prefix_queries = metrics_counter(m, "tandem_prefix_cache_queries_total", "",
                                            "Prompt tokens looked up in the prefix cache.");
    facts->prefix_hits = metrics_counter(m, "tandem_prefix_cache_hits_total", "",
                                         "Prompt tokens found in the prefix cache.");
    facts->preemptions = metrics_counter(m, "tandem_num_preemptions_total", "",
                                         "Sequences put back because KV blocks ran out.");
    facts->prompt_tokens = metrics_counter(m, "tandem_prompt_tokens_total", "",
                                           "Prompt tokens of requests given to replicas.");
    facts->generation_tokens =
        metrics_counter(m, "tandem_generation_tokens_total", "", "Tokens generated.");
    for (int i = 0; i < FACTS_N_FINISH; i++) {
        metrics_label(labels, sizeof labels, "finished_reason", reasons[i]);
        facts->success[i] = metrics_counter(m, "tandem_request_success_total", labels,
                                            "Requests finished, by reason.");
    }
    for (int i = 0; i < FACTS_N_REFUSAL; i++) {
        metrics_label(labels, sizeof labels, "reason", refusals[i]);
        facts->refused[i] = metrics_counter(m, "tandem_requests_refused_total", labels,
                                            "Requests ended with an error, by reason.");
    }
    facts->disconnected = metrics_counter(m, "tandem_requests_disconnected_total", "",
                                          "Requests whose client went away or ran past its "
                                          "deadline.");
}

static void init_speculation_counters(struct facts_speculation *speculation, struct metrics *m) {
    char labels[64], number[16];
    speculation->drafts = metrics_counter(m, "tandem_spec_decode_num_drafts_total", "",
                                          "Rounds of a sequence that judged drafted tokens.");
    speculation->draft_tokens = metrics_counter(m, "tandem_spec_decode_num_draft_tokens_total", "",
                                                "Drafted tokens that were judged.");
    speculation->accepted_tokens =
        metrics_counter(m, "tandem_spec_decode_num_accepted_tokens_total", "",
                        "Drafted tokens that held; the acceptance length is 1 + these / drafts.");
    for (int i = 0; i < SPEC_MAX_WINDOW; i++) {
        snprintf(number, sizeof number, "%d", i);
        metrics_label(labels, sizeof labels, "position", number);
        speculation->accepted_per_position[i] =
            metrics_counter(m, "tandem_spec_decode_num_accepted_tokens_per_pos_total", labels,
                            "Drafted tokens that held, by place in their round, from 0.");
    }
    speculation->pre_verify_hits =
        metrics_counter(m, "tandem_spec_pre_verify_hits_total", "",
                        "Rounds without drafted tokens to verify whose first new one held.");
    speculation->post_verify_continuations =
        metrics_counter(m, "tandem_spec_post_verify_continuations_total", "",
                        "Rounds whose drafted tokens held as a whole.");
    speculation->rollbacks = metrics_counter(m, "tandem_spec_rollbacks_total", "",
                                             "Rounds in which a drafted token fell.");
    speculation->discarded_tokens = metrics_counter(m, "tandem_spec_discarded_tokens_total", "",
                                                    "Drafted tokens that were never committed.");
    speculation->draft_wait = metrics_seconds(m, "tandem_spec_draft_wait_seconds_total", "",
                                              "Time in which the draft waited for the target.");
    speculation->target_wait = metrics_seconds(m, "tandem_spec_target_wait_seconds_total", "",
                                               "Time in which the target waited for the draft.");
}

static void init_speculation(struct facts_speculation *speculation, struct metrics *m) {
    char labels[64];
    init_speculation_counters(speculation, m);
    speculation->window = metrics_gauge(m, "tandem_spec_window", "",
                                        "Tokens drafted for a sequence in a round; 0 while plain. "
                                        "The largest of the replicas.");
    speculation->layer_width = metrics_gauge(m, "tandem_spec_layer_width", "",
                                             "Draft layers whose attention runs at once; 0 while "
                                             "plain. The largest of the replicas.");
    for (int mode = 0; mode < SPEC_N_MODES; mode++) {
        metrics_label(labels, sizeof labels, "mode", spec_mode_name(mode));
        speculation->mode[mode] = metrics_gauge(m, "tandem_spec_mode", labels,
                                                "1 for a mode that a serving replica runs.");
    }
}

void facts_init(struct facts *facts, const char *model, const char *weights) {
    *facts = (struct facts){.metrics = metrics_create()};
    init_gauges(facts, model, weights);
    init_counters(facts);
    init_speculation(&facts->speculation, facts->metrics);
    struct metrics *m = facts->metrics;
    facts->ttft = metrics_histogram(m, "tandem_time_to_first_token_seconds", "",
                                    "Arrival to first token.", METRICS_REQUEST_SECONDS,
                                    METRICS_N_REQUEST_SECONDS);
    facts->itl = metrics_histogram(m, "tandem_inter_token_latency_seconds", "",
                                   "Time between tokens of one request.", METRICS_TOKEN_SECONDS,
                                   METRICS_N_TOKEN_SECONDS);
    facts->e2e = metrics_histogram(m, "tandem_e2e_request_latency_seconds", "",
                                   "Arrival to last token.", METRICS_REQUEST_SECONDS,
                                   METRICS_N_REQUEST_SECONDS);
    facts->queue_time = metrics_histogram(m, "tandem_request_queue_time_seconds", "",
                                          "Arrival to first scheduled.", METRICS_REQUEST_SECONDS,
                                          METRICS_N_REQUEST_SECONDS);
    facts->iteration_tokens = metrics_histogram(m, "tandem_iteration_tokens_total", "",
                                                "Rows computed in a step.", METRICS_STEP_TOKENS,
                                                METRICS_N_STEP_TOKENS);
}

void facts_fini(struct facts *facts) {
    metrics_destroy(facts->metrics);
}

void facts_refuse(struct facts *facts, enum status status) {
    enum facts_refusal reason = status == STATUS_INVALID_ARGUMENT     ? FACTS_INVALID
                                : status == STATUS_RESOURCE_EXHAUSTED ? FACTS_QUEUE_FULL
                                : status == STATUS_UNAVAILABLE        ? FACTS_UNAVAILABLE
                                : status == STATUS_DEADLINE_EXCEEDED  ? FACTS_DEADLINE
                                                                      : FACTS_OTHER;
    metric_add(facts->refused[reason], 1);
}

/* What a counter gained; one that went back began again at 0. */
static uint64_t grown(uint64_t before, uint64_t now) {
    return now >= before ? now - before : now;
}

static void count_speculation(struct facts_speculation *speculation,
                              const struct speculation_facts *before,
                              const struct speculation_facts *now) {
#define COUNT(metric_, field_) metric_add(speculation->metric_, grown(before->field_, now->field_))
    COUNT(drafts, drafts);
    COUNT(draft_tokens, draft_tokens);
    COUNT(accepted_tokens, accepted_tokens);
    for (int i = 0; i < SPEC_MAX_WINDOW; i++) {
        COUNT(accepted_per_position[i], accepted_per_position[i]);
    }
    COUNT(pre_verify_hits, pre_verify_hits);
    COUNT(post_verify_continuations, post_verify_continuations);
    COUNT(rollbacks, rollbacks);
    COUNT(discarded_tokens, discarded_tokens);
    COUNT(draft_wait, draft_wait_us);
    COUNT(target_wait, target_wait_us);
#undef COUNT
}

void facts_step(struct facts *facts, const struct replica *replica, const Tandem__V1__Step *step) {
    metric_add(facts->generation_tokens, step->n_tokens);
    const Tandem__V1__StepStats *now = step->stats, *before = &replica->stats;
    if (now == NULL) return;
    metric_add(facts->preemptions, grown(before->preemptions, now->preemptions));
    metric_add(facts->prefix_queries, grown(before->prefix_query_tokens, now->prefix_query_tokens));
    metric_add(facts->prefix_hits, grown(before->prefix_hit_tokens, now->prefix_hit_tokens));
    if (now->rows > 0) metric_observe(facts->iteration_tokens, now->rows);
    struct speculation_facts speculation = speculation_facts_of(now->spec);
    count_speculation(&facts->speculation, &replica->speculation, &speculation);
}

struct totals {
    uint64_t running, waiting, kv_blocks, kv_used;
};

static struct totals add_up(const struct fleet *fleet, uint32_t n_queued) {
    struct totals totals = {.waiting = n_queued};
    for (size_t i = 0; i < fleet->n_replicas; i++) {
        const struct replica *replica = fleet->replicas[i];
        if (replica->state != REPLICA_SERVING) continue;
        totals.running += replica->stats.running;
        totals.waiting += replica->stats.waiting;
        totals.kv_blocks += replica->kv_blocks;
        totals.kv_used += replica->stats.kv_blocks_used;
    }
    return totals;
}

static double kv_share(const struct totals *totals) {
    return totals->kv_blocks ? (double)totals->kv_used / (double)totals->kv_blocks : 0;
}

/* The policy in force; of several replicas the one that drafts most. */
static struct speculation_facts in_force(const struct fleet *fleet) {
    struct speculation_facts most = {.mode = SPEC_PLAIN};
    for (size_t i = 0; i < fleet->n_replicas; i++) {
        const struct replica *replica = fleet->replicas[i];
        if (replica->state != REPLICA_SERVING) continue;
        if (replica->speculation.window > most.window) most = replica->speculation;
    }
    return most;
}

static void gauge_speculation(struct facts_speculation *speculation, const struct fleet *fleet) {
    bool runs[SPEC_N_MODES] = {false};
    uint32_t window = 0, layer_width = 0;
    for (size_t i = 0; i < fleet->n_replicas; i++) {
        const struct replica *replica = fleet->replicas[i];
        if (replica->state != REPLICA_SERVING) continue;
        const struct speculation_facts *now = &replica->speculation;
        runs[now->mode] = true;
        if (now->window > window) window = now->window;
        if (now->layer_width > layer_width) layer_width = now->layer_width;
    }
    metric_set(speculation->window, window);
    metric_set(speculation->layer_width, layer_width);
    for (int mode = 0; mode < SPEC_N_MODES; mode++) metric_set(speculation->mode[mode], runs[mode]);
}

void facts_gauges(struct facts *facts, const struct fleet *fleet, uint32_t n_queued) {
    struct totals totals = add_up(fleet, n_queued);
    metric_set(facts->running, (double)totals.running);
    metric_set(facts->waiting, (double)totals.waiting);
    metric_set(facts->kv_usage, kv_share(&totals));
    for (int state = 0; state < REPLICA_N_STATES; state++) {
        metric_set(facts->replicas[state], (double)fleet_count(fleet, state));
    }
    gauge_speculation(&facts->speculation, fleet);
}

/* ", mode pearl, window 4, mean acceptance length 3.21" of what was drafted since the last line;
 * nothing where nothing was. */
static void describe_speculation(struct facts *facts, char *out, size_t size,
                                 const struct fleet *fleet) {
    uint64_t drafts = metric_count(facts->speculation.drafts);
    uint64_t accepted = metric_count(facts->speculation.accepted_tokens);
    out[0] = '\0';
    if (drafts > facts->logged_drafts) {
        struct speculation_facts now = in_force(fleet);
        double length = 1 + (double)(accepted - facts->logged_accepted) /
                                (double)(drafts - facts->logged_drafts);
        snprintf(out, size, ", mode %s, window %" PRIu32 ", mean acceptance length %.2f",
                 spec_mode_name(now.mode), now.window, length);
    }
    facts->logged_drafts = drafts;
    facts->logged_accepted = accepted;
}

void facts_log(struct facts *facts, const struct fleet *fleet, uint32_t n_queued, int64_t now_ns) {
    if (facts->logged_ns == 0) facts->logged_ns = now_ns;
    if (now_ns - facts->logged_ns < LOG_EVERY_NS) return;
    struct totals totals = add_up(fleet, n_queued);
    uint64_t prompt = metric_count(facts->prompt_tokens);
    uint64_t generated = metric_count(facts->generation_tokens);
    double seconds = (double)(now_ns - facts->logged_ns) / 1e9;
    uint64_t queries = metric_count(facts->prefix_queries);
    double hit_rate = queries ? 100.0 * (double)metric_count(facts->prefix_hits) / (double)queries : 0;
    bool busy = totals.running + totals.waiting > 0 || prompt != facts->logged_prompt ||
                generated != facts->logged_generated;
    char speculation[128];
    describe_speculation(facts, speculation, sizeof speculation, fleet);
    if (busy) {
        log_info("prompt throughput %.1f tokens/s, generation throughput %.1f tokens/s, running "
                 "%" PRIu64 ", waiting %" PRIu64 ", KV cache usage %.1f %%, prefix cache hit rate "
                 "%.1f %%%s",
                 (double)(prompt - facts->logged_prompt) / seconds,
                 (double)(generated - facts->logged_generated) / seconds, totals.running,
                 totals.waiting, 100 * kv_share(&totals), hit_rate, speculation);
    }
    facts->logged_prompt = prompt;
    facts->logged_generated = generated;
    facts->logged_ns = now_ns;
}
