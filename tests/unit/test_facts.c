#include "coordinator/facts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/unit/test.h"

/* A step whose message may be changed before it is counted. */
struct said {
    Tandem__V1__Step step;
    Tandem__V1__StepStats stats;
    Tandem__V1__SpecStats spec;
    Tandem__V1__Policy policy;
    uint64_t per_position[SPEC_MAX_WINDOW + 1];
};

static void say(struct said *said, const char *mode, uint64_t scale) {
    tandem__v1__step__init(&said->step);
    tandem__v1__step_stats__init(&said->stats);
    tandem__v1__spec_stats__init(&said->spec);
    tandem__v1__policy__init(&said->policy);
    said->step.stats = &said->stats;
    said->stats.spec = &said->spec;
    said->spec.policy = &said->policy;
    said->policy.mode = (char *)mode;
    said->policy.window = 4;
    said->policy.layer_width = 2;
    said->spec.drafts = 10 * scale;
    said->spec.draft_tokens = 40 * scale;
    said->spec.accepted_tokens = 25 * scale;
    for (uint64_t i = 0; i <= SPEC_MAX_WINDOW; i++) said->per_position[i] = (20 - i) * scale;
    said->spec.accepted_per_position = said->per_position;
    said->spec.n_accepted_per_position = SPEC_MAX_WINDOW + 1;
    said->spec.pre_verify_hits = 3 * scale;
    said->spec.post_verify_continuations = 5 * scale;
    said->spec.rollbacks = 2 * scale;
    said->spec.discarded_tokens = 15 * scale;
    said->spec.draft_wait_us = 250000 * scale;
    said->spec.target_wait_us = 1000001 * scale;
}

/* As the coordinator does: counts first, then the replica keeps what it said. */
static void count(struct facts *facts, struct replica *replica, const struct said *said) {
    facts_step(facts, replica, &said->step);
    replica_step(replica, &said->step, 1000000000);
}

static bool shows(const struct facts *facts, const char *line) {
    size_t n;
    char *text = metrics_render(facts->metrics, &n);
    bool found = strstr(text, line) != NULL;
    free(text);
    return found;
}

static void expect_counts(const struct facts *facts, uint64_t scale) {
    static const struct { const char *name; uint64_t value; } rows[] = {
        {"spec_decode_num_drafts_total", 10},
        {"spec_decode_num_draft_tokens_total", 40},
        {"spec_decode_num_accepted_tokens_total", 25},
        {"spec_decode_num_accepted_tokens_per_pos_total{position=\"0\"}", 20},
        {"spec_decode_num_accepted_tokens_per_pos_total{position=\"15\"}", 5},
        {"spec_pre_verify_hits_total", 3},
        {"spec_post_verify_continuations_total", 5},
        {"spec_rollbacks_total", 2},
        {"spec_discarded_tokens_total", 15},
    };
    char line[200];
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        snprintf(line, sizeof line, "\ntandem_%s %llu\n", rows[i].name,
                 (unsigned long long)(rows[i].value * scale));
        cr_assert(shows(facts, line), "expected%s", line);
    }
    snprintf(line, sizeof line, "\ntandem_spec_draft_wait_seconds_total %.6f\n",
             0.25 * (double)scale);
    cr_assert(shows(facts, line), "expected%s", line);
    snprintf(line, sizeof line, "\ntandem_spec_target_wait_seconds_total %.6f\n",
             1.000001 * (double)scale);
    cr_assert(shows(facts, line), "expected%s", line);
}

Test(facts, speculation_is_counted_by_what_was_added) {
    struct replica replica = {.state = REPLICA_SERVING};
    struct facts facts;
    struct said said;
    facts_init(&facts, "tale", "bf16");
    expect_counts(&facts, 0);
    say(&said, "pearl", 1);
    count(&facts, &replica, &said);
    expect_counts(&facts, 1);
    count(&facts, &replica, &said);   /* the same counts: nothing was added */
    expect_counts(&facts, 1);
    say(&said, "pearl", 3);
    count(&facts, &replica, &said);
    expect_counts(&facts, 3);
    cr_assert(!shows(&facts, "position=\"16\""));
    facts_fini(&facts);
}

Test(facts, replicas_add_up_and_may_start_again) {
    struct replica first = {.state = REPLICA_SERVING}, second = {.state = REPLICA_SERVING};
    struct facts facts;
    struct said said;
    facts_init(&facts, "tale", "bf16");
    say(&said, "pearl", 4);
    count(&facts, &first, &said);
    say(&said, "sd", 2);
    count(&facts, &second, &said);
    expect_counts(&facts, 6);
    say(&said, "pearl", 1);   /* it began again at 0 */
    count(&facts, &first, &said);
    expect_counts(&facts, 7);
    said.stats.spec = NULL;   /* a step without the figures takes nothing back */
    count(&facts, &first, &said);
    expect_counts(&facts, 7);
    facts_fini(&facts);
}

Test(facts, gauges_show_the_policies_of_serving_replicas) {
    struct replica first = {.state = REPLICA_SERVING}, second = {.state = REPLICA_SERVING};
    struct fleet fleet = {.replicas = {&first, &second}, .n_replicas = 2};
    struct facts facts;
    struct said said;
    facts_init(&facts, "tale", "bf16");
    facts_gauges(&facts, &fleet, 0);
    cr_assert(shows(&facts, "tandem_spec_mode{mode=\"plain\"} 1\n"));
    cr_assert(shows(&facts, "tandem_spec_mode{mode=\"pearl+lp\"} 0\n"));
    cr_assert(shows(&facts, "\ntandem_spec_window 0\n"));
    say(&said, "pearl+lp", 1);
    count(&facts, &first, &said);
    count(&facts, &second, &said);
    facts_gauges(&facts, &fleet, 0);
    cr_assert(shows(&facts, "tandem_spec_mode{mode=\"plain\"} 0\n"));
    cr_assert(shows(&facts, "tandem_spec_mode{mode=\"pearl+lp\"} 1\n"));
    cr_assert(shows(&facts, "\ntandem_spec_window 4\n"));
    cr_assert(shows(&facts, "\ntandem_spec_layer_width 2\n"));
    say(&said, "plain", 1);   /* plain drafts nothing, whatever its window */
    count(&facts, &second, &said);
    first.state = REPLICA_LOST;
    facts_gauges(&facts, &fleet, 0);
    cr_assert(shows(&facts, "tandem_spec_mode{mode=\"plain\"} 1\n"));
    cr_assert(shows(&facts, "tandem_spec_mode{mode=\"pearl+lp\"} 0\n"));
    cr_assert(shows(&facts, "\ntandem_spec_window 0\n"));
    facts_fini(&facts);
}

/* The log line of ten more seconds. */
static void log_line(char *out, size_t size, struct facts *facts, const struct fleet *fleet,
                     int64_t seconds) {
    FILE *file = tmpfile();
    int stderr_fd = dup(STDERR_FILENO);
    dup2(fileno(file), STDERR_FILENO);
    facts_log(facts, fleet, 0, seconds * 1000000000);
    dup2(stderr_fd, STDERR_FILENO);
    close(stderr_fd);
    rewind(file);
    if (fgets(out, (int)size, file) == NULL) out[0] = '\0';
    fclose(file);
}

Test(facts, the_log_line_tells_mode_window_and_acceptance_while_drafting) {
    struct replica replica = {.state = REPLICA_SERVING};
    struct fleet fleet = {.replicas = {&replica}, .n_replicas = 1};
    struct facts facts;
    struct said said;
    char line[400];
    facts_init(&facts, "tale", "bf16");
    log_line(line, sizeof line, &facts, &fleet, 1);
    cr_assert_str_eq(line, "");
    metric_add(facts.generation_tokens, 1);
    log_line(line, sizeof line, &facts, &fleet, 11);
    cr_assert(strstr(line, "tokens/s") && !strstr(line, "mode"), "%s", line);
    say(&said, "sd", 1);
    said.step.n_tokens = 35;
    count(&facts, &replica, &said);
    log_line(line, sizeof line, &facts, &fleet, 21);
    cr_assert(strstr(line, ", mode sd, window 4, mean acceptance length 3.50\n"), "%s", line);
    said.spec.drafts = 20;            /* 10 rounds more, 5 tokens accepted */
    said.spec.accepted_tokens = 30;
    count(&facts, &replica, &said);
    log_line(line, sizeof line, &facts, &fleet, 31);
    cr_assert(strstr(line, "mean acceptance length 1.50\n"), "%s", line);
    metric_add(facts.generation_tokens, 1);
    log_line(line, sizeof line, &facts, &fleet, 41);
    cr_assert(strstr(line, "tokens/s") && !strstr(line, "mode"), "%s", line);
    facts_fini(&facts);
}
