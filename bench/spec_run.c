#include "bench/spec_run.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/clock.h"
#include "model/chat.h"
#include "model/tokenizer.h"

/* --- prompts ---------------------------------------------------------------------------------- */

static enum status add_text(struct spec_prompts *prompts, const struct tokenizer *tokenizer,
                            const char *text, bool add_special, struct error *err) {
    struct token_list list = {0};
    TRY(tokenizer_encode(tokenizer, &list, text, strlen(text), add_special, err));
    int n = list.n < 512 ? (int)list.n : 512;
    struct spec_prompt *prompt = &prompts->of[prompts->n++];
    prompt->tokens = xmalloc((size_t)n * sizeof *prompt->tokens);
    memcpy(prompt->tokens, list.ids, (size_t)n * sizeof *prompt->tokens);
    prompt->n = n;
    token_list_free(&list);
    return STATUS_OK;
}

static enum status add_chat(struct spec_prompts *prompts, const struct tokenizer *tokenizer,
                            const struct chat *chat, const json_t *messages, struct error *err) {
    struct chat_message rows[16];
    size_t n = json_array_size(messages) < 16 ? json_array_size(messages) : 16;
    for (size_t i = 0; i < n; i++) {
        const json_t *row = json_array_get(messages, i);
        rows[i].role = json_string_value(json_object_get(row, "role"));
        rows[i].content = json_string_value(json_object_get(row, "content"));
    }
    char *text;
    TRY(chat_render(chat, rows, n, true, &text, err));
    enum status status = add_text(prompts, tokenizer, text, false, err);
    free(text);
    return status;
}

static bool is_of(const json_t *line, const char *domain) {
    const char *own = json_string_value(json_object_get(line, "domain"));
    return domain == NULL || (own != NULL && strcmp(own, domain) == 0);
}

static json_t *read_lines(const char *path, const char *domain, struct error *err) {
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        error_set(err, STATUS_NOT_FOUND, "--prompts %s cannot be read", path);
        return NULL;
    }
    json_t *lines = json_array(), *line;
    json_error_t problem;
    while ((line = json_loadf(file, JSON_DISABLE_EOF_CHECK, &problem)) != NULL) {
        if (is_of(line, domain)) json_array_append(lines, line);
        json_decref(line);
    }
    fclose(file);
    if (json_array_size(lines) > 0) return lines;
    error_set(err, STATUS_INVALID_ARGUMENT, "--prompts %s holds no line%s%s", path,
              domain != NULL ? " of domain " : "", domain != NULL ? domain : "");
    json_decref(lines);
    return NULL;
}

static void random_prompts(struct spec_prompts *out, int vocab, int n) {
    enum { LENGTH = 48 };
    uint32_t state = 12345;
    for (out->n = 0; out->n < n; out->n++) {
        struct spec_prompt *prompt = &out->of[out->n];
        prompt->tokens = xmalloc(LENGTH * sizeof *prompt->tokens);
        prompt->n = LENGTH;
        for (int i = 0; i < LENGTH; i++) {
            state = state * 1664525u + 1013904223u;
            prompt->tokens[i] = (int32_t)((state >> 8) % (uint32_t)(vocab - 8));
        }
    }
}

enum status spec_prompts_load(struct spec_prompts *out, const char *model_dir, const char *file,
                              const char *domain, int n, struct error *err) {
    enum status status = STATUS_OK;
    struct tokenizer *tokenizer = NULL;
    struct chat *chat = NULL;
    json_t *lines = NULL;
    *out = (struct spec_prompts){.n = 0};
    TRY_OR_FAIL(tokenizer_load(&tokenizer, model_dir, err));
    if (file == NULL) {
        random_prompts(out, tokenizer_size(tokenizer), n);
        goto fail;
    }
    TRY_OR_FAIL(chat_load(&chat, model_dir, err));
    lines = read_lines(file, domain, err);
    if (lines == NULL) status = err->status;
    size_t n_lines = json_array_size(lines);
    for (int i = 0; i < n && status == STATUS_OK; i++) {
        const json_t *line = json_array_get(lines, (size_t)i * n_lines / (size_t)n);
        const json_t *messages = json_object_get(line, "messages");
        const char *prompt = json_string_value(json_object_get(line, "prompt"));
        status = messages != NULL ? add_chat(out, tokenizer, chat, messages, err)
                                  : add_text(out, tokenizer, prompt, true, err);
    }

fail:
    json_decref(lines);
    chat_free(chat);
    tokenizer_free(tokenizer);
    return status;
}

void spec_prompts_free(struct spec_prompts *prompts) {
    for (int i = 0; i < prompts->n; i++) free(prompts->of[i].tokens);
    prompts->n = 0;
}

/* --- running ---------------------------------------------------------------------------------- */

static struct step_loop *open_loop(const struct spec_way *way) {
    const struct rank_leadership *leadership = local_group_leadership(way->group);
    const struct model_config *config = local_group_config(way->group);
    struct step_loop_options options = {
        .engine = leadership->engine,
        .backend = leadership->backend,
        .config = config,
        .n_blocks = 160,
        .max_sequences = 4,
        .max_step_tokens = 512,
        .max_context = config->max_position < 2048 ? config->max_position : 2048,
        .max_logit_rows = 72,
        .drafter = way->drafter != NULL ? way->drafter : leadership->drafter,
        .drafter_remote = way->drafter != NULL || leadership->drafter_remote,
        .handoff_ns = leadership->handoff_ns,
        .max_window = SPEC_MAX_WINDOW,
        .rule = way->rule,
        .trace = local_group_trace(way->group),
    };
    struct step_loop *loop = step_loop_create(&options);
    step_loop_set_policy(loop, &way->policy);
    return loop;
}

/* What one request came to, and how long its rounds took behind the first token. */
struct text {
    int32_t tokens[SPEC_MAX_TOKENS];
    int n;
    int n_rounds, n_first; /* rounds behind the first token; tokens of the first */
    int64_t first_ns, last_ns;
};

static enum status generate(struct text *out, struct step_loop *loop, const struct spec_way *way,
                            const struct spec_prompt *prompt, uint64_t seed, struct error *err) {
    struct step_request request = {
        .key = seed + 1,
        .prompt = prompt->tokens,
        .n_prompt = prompt->n,
        .sampling = {.temperature = way->temperature, .top_p = 1, .repetition_penalty = 1,
                     .seed = seed * 7919 + 1, .n_logprobs = -1},
        .ignore_eos = way->ignore_eos,
        .max_tokens = way->n_tokens,
        .wish = {-1, 0},
    };
    *out = (struct text){.n = 0};
    step_loop_submit(loop, &request);
    while (!step_loop_idle(loop)) {
        TRY(step_loop_step(loop, clock_now_ns(), err));
        Tandem__V1__Step step;
        Tandem__V1__StepStats stats;
        step_loop_describe(loop, &step, &stats);
        int64_t now = clock_now_ns();
        if (step.n_tokens == 0) continue;
        memcpy(out->tokens + out->n, step.tokens, step.n_tokens * sizeof *out->tokens);
        out->n += (int)step.n_tokens;
        out->last_ns = now;
        if (out->first_ns != 0) {
            out->n_rounds++;
            continue;
        }
        out->first_ns = now;
        out->n_first = (int)step.n_tokens;
    }
    return STATUS_OK;
}

static enum status check_text(const struct text *text, int prompt_i, int32_t *known, int *n_known,
                              bool write, struct error *err) {
    size_t bytes = (size_t)text->n * sizeof *text->tokens;
    if (write) {
        memcpy(known, text->tokens, bytes);
        *n_known = text->n;
        return STATUS_OK;
    }
    if (*n_known == text->n && memcmp(known, text->tokens, bytes) == 0) return STATUS_OK;
    return error_set(err, STATUS_FAILED_PRECONDITION,
                     "prompt %d: another text than mode plain's", prompt_i);
}

struct totals {
    int64_t wall_ns;
    uint64_t tokens, rounds;
};

static void describe(struct spec_result *out, struct step_loop *loop, const struct totals *totals) {
    Tandem__V1__Step step;
    Tandem__V1__StepStats stats;
    step_loop_describe(loop, &step, &stats);
    struct step_loop_times times = step_loop_times(loop);
    double steps = (double)times.steps, total_us = (double)times.total_ns / 1e3;
    *out = (struct spec_result){
        .tokens_per_second = (double)totals->tokens * 1e9 / (double)totals->wall_ns,
        .tokens_per_round = (double)totals->tokens / (double)totals->rounds,
        .control_us = (double)(times.total_ns - times.pass_ns - times.draft_ns -
                               times.sample_ns) / 1e3 / steps,
        .pass_us = (double)times.pass_ns / 1e3 / steps,
        .round_us = total_us / steps,
        .acceptance_length = 1,
        .tokens = totals->tokens,
        .rounds = totals->rounds,
    };
    if (stats.spec == NULL || stats.spec->drafts == 0) return;
    const Tandem__V1__SpecStats *spec = stats.spec;
    out->drafts = spec->drafts;
    out->judged = spec->draft_tokens;
    out->accepted = spec->accepted_tokens;
    out->acceptance_length = 1 + (double)spec->accepted_tokens / (double)spec->drafts;
    /* Of tokens that were really looked at: those behind a fallen one were not. */
    out->acceptance = (double)spec->accepted_tokens /
                      (double)(spec->accepted_tokens + spec->rollbacks);
    out->target_wait = (double)spec->target_wait_us / total_us;
    out->draft_wait = (double)spec->draft_wait_us / total_us;
    for (int i = 0; i < SPEC_MAX_WINDOW; i++) {
        out->per_position[i] = spec->accepted_per_position[i];
    }
}

enum status spec_run(struct spec_result *out, const struct spec_way *way,
                     const struct spec_prompts *prompts, int32_t (*texts)[SPEC_MAX_TOKENS],
                     int *lengths, bool write, struct error *err) {
    struct step_loop *loop = open_loop(way);
    struct totals totals = {0};
    enum status status = STATUS_OK;
    static struct text text;
    for (int i = 0; i < prompts->n && status == STATUS_OK; i++) {
        status = generate(&text, loop, way, &prompts->of[i], (uint64_t)i, err);
        totals.wall_ns += text.last_ns - text.first_ns;
        totals.tokens += (uint64_t)(text.n - text.n_first);
        totals.rounds += (uint64_t)text.n_rounds;
        if (status == STATUS_OK && texts != NULL) {
            status = check_text(&text, i, texts[i], &lengths[i], write, err);
        }
    }
    if (status == STATUS_OK) describe(out, loop, &totals);
    step_loop_destroy(loop);
    return status;
}
