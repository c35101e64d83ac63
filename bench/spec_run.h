/* One way to generate a set of prompts, run in one process and measured: what the tables of spec.c
 * are made of. */
#pragma once
#include "bench/series.h"
#include "worker/local_group.h"
#include "worker/step_loop.h"

enum { SPEC_MAX_PROMPTS = 64, SPEC_MAX_TOKENS = 1024 };

/* A prompt and, once plain has run, its text per temperature. */
struct spec_prompt {
    int32_t *tokens;
    int n;
};

struct spec_prompts {
    struct spec_prompt of[SPEC_MAX_PROMPTS];
    int n;
};

/* Prompts of a JSON-lines file ("prompt" with BOS, or "messages" through the chat format), evenly
 * taken from those of the domain (NULL: all). file NULL: random tokens of the vocabulary. */
enum status spec_prompts_load(struct spec_prompts *out, const char *model_dir, const char *file,
                              const char *domain, int n, struct error *err);
void spec_prompts_free(struct spec_prompts *prompts);

/* What a run is. */
struct spec_way {
    const char *label;       /* of the topology: "1+1" */
    struct local_group *group;
    struct spec_policy policy;
    float temperature;
    int n_tokens;            /* of each prompt at most; end tokens are obeyed unless ignore_eos */
    bool ignore_eos;
    enum sampling_rule rule;
    struct drafter *drafter; /* instead of the group's where not NULL; borrowed */
    int n_ranks;
};

struct spec_result {
    double tokens_per_second, tokens_per_round, acceptance, acceptance_length;
    double target_wait, draft_wait; /* shares of the time */
    double control_us;              /* of a round: outside passes, waiting and sampling */
    double pass_us, round_us;
    uint64_t tokens, rounds, drafts, judged, accepted;
    uint64_t per_position[SPEC_MAX_WINDOW];
};

/* Runs the prompts one after the other. texts: [n][SPEC_MAX_TOKENS] and lengths[n], written where
 * `write`, else compared: FAILED_PRECONDITION says which prompt differs. NULL: neither. */
enum status spec_run(struct spec_result *out, const struct spec_way *way,
                     const struct spec_prompts *prompts, int32_t (*texts)[SPEC_MAX_TOKENS],
                     int *lengths, bool write, struct error *err);
