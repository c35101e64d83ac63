#include "bench/spec.h"

#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/machine.h"
#include "bench/spec_run.h"
#include "common/philox.h"
#include "worker/draft/oracle_drafter.h"

enum { MAX_WAYS = 240, MAX_WINDOWS = 12, MAX_TEMPERATURES = 4 };

struct settings {
    const char *model, *draft, *prompts, *domain, *csv, *label, *trace;
    int n_prompts, n_tokens, passes;
    enum dtype weights;
    int windows[MAX_WINDOWS], n_windows;
    float temperatures[MAX_TEMPERATURES];
    int n_temperatures;
    bool ignore_eos, quick;
    double synthetic;        /* > 0: the draft computes, but proposes the truth this often */
    enum backend_isa device; /* AUTO: the CPU's ranks; else one device, plain, sd and pearl on it */
};

/* A line of the table. */
struct line {
    struct spec_way way;
    const char *what; /* "modes", "rejection", "uncalibrated", "oracle" */
    double oracle;
    struct series rate, ratio; /* tokens/s; against the best plain of the same pass */
    struct spec_result result; /* of the last pass; counts do not vary */
    bool draws_plain;          /* its text is the reference */
};

struct bench {
    const struct settings *settings;
    struct spec_prompts prompts;
    struct line lines[MAX_WAYS];
    int n_lines;
    struct local_group *plain_threads, *shared_1, *shared_2, *disjoint, *rejection, *uncalibrated;
    int32_t texts[MAX_TEMPERATURES][SPEC_MAX_PROMPTS][SPEC_MAX_TOKENS];
    int lengths[MAX_TEMPERATURES][SPEC_MAX_PROMPTS];
    uint32_t n_synthetic;
    FILE *csv;
};

/* --- groups ------------------------------------------------------------------------------------- */

/* The draft of --synthetic: the greedy text of the request, known by the seed spec_run gives it, or a
 * token that is wrong. A fresh chance at every proposal. */
static int32_t synthetic_token(void *user, uint64_t seed, int position) {
    struct bench *b = user;
    size_t i = (size_t)(seed - 1) / 7919;
    int at = position - b->prompts.of[i].n;
    if (at < 0 || at >= b->lengths[0][i]) return -1;
    uint32_t key[2] = {(uint32_t)seed, 77}, counter[4] = {b->n_synthetic++, 0, 0, 0}, words[4];
    philox4x32_10(words, counter, key);
    int32_t token = b->texts[0][i][at];
    return (double)philox_uniform(words[0]) < b->settings->synthetic ? token : token ^ 1;
}

static enum status open_group(struct bench *b, struct local_group **out, int degree, int n_threads,
                              bool shared, int draft_degree, enum sampling_rule rule,
                              bool keeps_fuzzy, struct error *err) {
    const struct settings *s = b->settings;
    struct local_group_options options = {
        .model_dir = s->model,
        .degree = degree,
        .isa = s->device,
        .n_threads = n_threads,
        .weights = s->weights,
        .n_blocks = 160,
        .max_rows = 512,
        .max_logit_rows = 72,
        .max_sequences = 4,
        .max_context = 1024,
        .pin_ranks = n_threads == 1,
        .draft_dir = s->draft,
        .shared = shared,
        .draft_degree = draft_degree,
        .max_layer_width = SPEC_MAX_LAYER_WIDTH,
        .rule = rule,
        .keeps_fuzzy = keeps_fuzzy,
        .replace = s->synthetic > 0 ? synthetic_token : NULL,
        .replace_user = b,
        .trace_file = !shared && s->trace != NULL && rule == SAMPLING_COUPLED && !keeps_fuzzy
                          ? s->trace : NULL,
    };
    return local_group_create(out, &options, err);
}

static enum status open_groups(struct bench *b, struct error *err) {
    if (b->settings->device != BACKEND_AUTO) {
        TRY(open_group(b, &b->shared_1, 1, 1, true, 1, SAMPLING_COUPLED, false, err));
        return open_group(b, &b->disjoint, 1, 1, false, 1, SAMPLING_COUPLED, false, err);
    }
    TRY(open_group(b, &b->plain_threads, 1, 2, true, 1, SAMPLING_COUPLED, false, err));
    TRY(open_group(b, &b->shared_1, 2, 1, true, 1, SAMPLING_COUPLED, false, err));
    TRY(open_group(b, &b->shared_2, 2, 1, true, 2, SAMPLING_COUPLED, false, err));
    TRY(open_group(b, &b->disjoint, 1, 1, false, 1, SAMPLING_COUPLED, false, err));
    if (b->settings->quick) return STATUS_OK;
    TRY(open_group(b, &b->rejection, 1, 1, false, 1, SAMPLING_REJECTION, false, err));
    return open_group(b, &b->uncalibrated, 2, 1, true, 2, SAMPLING_COUPLED, true, err);
}

static void close_groups(struct bench *b) {
    struct local_group *groups[] = {b->plain_threads, b->shared_1,  b->shared_2,
                                    b->disjoint,      b->rejection, b->uncalibrated};
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) local_group_destroy(groups[i]);
}

/* --- the lines -------------------------------------------------------------------------------- */

static struct line *add(struct bench *b, const char *what, const char *label,
                        struct local_group *group, enum spec_mode mode, int window, int width,
                        int delay, float temperature) {
    CHECK(b->n_lines < MAX_WAYS);
    struct line *line = &b->lines[b->n_lines++];
    *line = (struct line){
        .what = what,
        .way = {.label = label,
                .group = group,
                .policy = {mode, window, width, delay},
                .temperature = temperature,
                .n_tokens = b->settings->n_tokens,
                .ignore_eos = b->settings->ignore_eos},
    };
    return line;
}

/* Target and draft on one device: one after the other on one rank, or as two streams. */
static void add_device_modes(struct bench *b, float temperature) {
    const struct settings *s = b->settings;
    add(b, "modes", "one rank", b->shared_1, SPEC_PLAIN, 1, 1, 0, temperature)->draws_plain = true;
    for (int i = 0; i < s->n_windows; i++) {
        int g = s->windows[i];
        add(b, "modes", "one rank", b->shared_1, SPEC_SD, g, 1, 0, temperature);
        add(b, "modes", "1+1, serial", b->disjoint, SPEC_SD, g, 1, 0, temperature);
        add(b, "modes", "1+1", b->disjoint, SPEC_PEARL, g, 1, 0, temperature);
    }
}

static void add_modes(struct bench *b, float temperature) {
    const struct settings *s = b->settings;
    add(b, "modes", "TP1, 2 threads", b->plain_threads, SPEC_PLAIN, 1, 1, 0, temperature)
        ->draws_plain = true;
    add(b, "modes", "TP2", b->shared_1, SPEC_PLAIN, 1, 1, 0, temperature);
    add(b, "modes", "1+1, draft idle", b->disjoint, SPEC_PLAIN, 1, 1, 0, temperature);
    for (int i = 0; i < s->n_windows; i++) {
        int g = s->windows[i];
        add(b, "modes", "TP1, 2 threads", b->plain_threads, SPEC_SD, g, 1, 0, temperature);
        add(b, "modes", "TP2, draft TP1", b->shared_1, SPEC_SD, g, 1, 0, temperature);
        add(b, "modes", "TP2, draft TP2", b->shared_2, SPEC_SD, g, 1, 0, temperature);
        add(b, "modes", "TP2, draft TP2", b->shared_2, SPEC_EASYSPEC, g, 2, 0, temperature);
        add(b, "modes", "TP2, draft TP2", b->shared_2, SPEC_EASYSPEC, g, 4, 0, temperature);
        add(b, "modes", "1+1, serial", b->disjoint, SPEC_SD, g, 1, 0, temperature);
        add(b, "modes", "1+1", b->disjoint, SPEC_PEARL, g, 1, 0, temperature);
        for (int delay = 1; delay <= 4 && 2 * delay < g; delay *= 2) {
            add(b, "modes", "1+1", b->disjoint, SPEC_PEARL, g, 1, delay, temperature);
        }
        add(b, "modes", "1+1", b->disjoint, SPEC_PEARL_LP, g, 2, 0, temperature);
    }
}

/* EasySpec's claim: what layer parallelism costs in acceptance, with and without calibration. */
static void add_calibration(struct bench *b) {
    for (int width = 1; width <= 4; width *= 2) {
        add(b, "calibrated", "TP2, draft TP2", b->shared_2, SPEC_EASYSPEC, 8, width, 0, 0);
        add(b, "uncalibrated", "TP2, draft TP2", b->uncalibrated, SPEC_EASYSPEC, 8, width, 0, 0);
    }
}

/* Rules side by side: the same pair, window and prompts. */
static void add_rules(struct bench *b) {
    static const float temperatures[] = {0.7f, 1};
    for (int t = 0; t < 2; t++) {
        add(b, "coupled", "1+1", b->disjoint, SPEC_SD, 4, 1, 0, temperatures[t]);
        add(b, "rejection", "1+1", b->rejection, SPEC_SD, 4, 1, 0, temperatures[t])->way.rule =
            SAMPLING_REJECTION;
    }
}

static void add_oracles(struct bench *b) {
    static const double accuracies[] = {0.5, 0.7, 0.8, 0.9};
    for (int i = 0; i < 4; i++) {
        for (int g = 2; g <= 8; g *= 2) {
            add(b, "oracle", "1 rank", b->disjoint, SPEC_PEARL, g, 1, 0, 0)->oracle =
                accuracies[i];
        }
    }
}

/* --- running ---------------------------------------------------------------------------------- */

static int temperature_i(const struct bench *b, float temperature) {
    for (int i = 0; i < b->settings->n_temperatures; i++) {
        if (b->settings->temperatures[i] == temperature) return i;
    }
    return -1;
}

/* The oracle's knowledge: greedy texts, found by the seed that spec_run gives prompt i. */
struct knowledge {
    const struct bench *bench;
    int32_t texts[SPEC_MAX_PROMPTS][2 * SPEC_MAX_TOKENS];
};

static const int32_t *know(void *user, const struct draft_begin *begin, int *n) {
    struct knowledge *knowledge = user;
    const struct bench *b = knowledge->bench;
    int i = (int)((begin->sampling.seed - 1) / 7919), t = temperature_i(b, 0);
    const struct spec_prompt *prompt = &b->prompts.of[i];
    memcpy(knowledge->texts[i], prompt->tokens, (size_t)prompt->n * sizeof(int32_t));
    memcpy(knowledge->texts[i] + prompt->n, b->texts[t][i],
           (size_t)b->lengths[t][i] * sizeof(int32_t));
    *n = prompt->n + b->lengths[t][i];
    return knowledge->texts[i];
}

static enum status run_line(struct bench *b, struct line *line, bool first, struct error *err) {
    struct spec_way way = line->way;
    int t = temperature_i(b, way.temperature);
    bool compares = t >= 0 && way.rule == SAMPLING_COUPLED;
    TRY(spec_run(&line->result, &way, &b->prompts, compares ? b->texts[t] : NULL,
                 b->lengths[t < 0 ? 0 : t], first && line->draws_plain, err));
    series_add(&line->rate, line->result.tokens_per_second);
    return STATUS_OK;
}

/* Rounds of an oracle vary much: the mean is over several of its seeds. */
static enum status run_oracle(struct bench *b, struct line *line, struct error *err) {
    enum { SEEDS = 6 };
    static struct knowledge knowledge;
    knowledge.bench = b;
    uint64_t tokens = 0, rounds = 0;
    for (uint64_t seed = 1; seed <= SEEDS; seed++) {
        struct spec_way way = line->way;
        struct oracle_drafter_options options = {4, local_group_config(way.group)->vocab,
                                                 line->oracle, seed, know, &knowledge};
        way.drafter = oracle_drafter_create(&options);
        int t = temperature_i(b, way.temperature);
        enum status status =
            spec_run(&line->result, &way, &b->prompts, b->texts[t], b->lengths[t], false, err);
        drafter_destroy(way.drafter);
        if (status != STATUS_OK) return status;
        tokens += line->result.tokens;
        rounds += line->result.rounds;
    }
    line->result.tokens_per_round = (double)tokens / (double)rounds;
    return STATUS_OK;
}

static enum status run_pass(struct bench *b, int pass, struct error *err) {
    for (int i = 0; i < b->n_lines; i++) {
        struct line *line = &b->lines[i];
        /* Counts do not vary: only what is timed is run again. */
        if (pass > 0 && strcmp(line->what, "modes") != 0) continue;
        enum status status =
            line->oracle > 0 ? run_oracle(b, line, err) : run_line(b, line, pass == 0, err);
        if (status != STATUS_OK) {
            return error_prefix(err, "%s, %s g=%d N=%d", line->way.label,
                                spec_mode_name(line->way.policy.mode), line->way.policy.window,
                                line->way.policy.layer_width);
        }
    }
    /* Ratios inside the pass. */
    for (int i = 0; i < b->n_lines; i++) {
        double plain = 0;
        for (int j = 0; j < b->n_lines; j++) {
            const struct line *other = &b->lines[j];
            if (other->way.policy.mode != SPEC_PLAIN ||
                other->way.temperature != b->lines[i].way.temperature) continue;
            plain = fmax(plain, other->result.tokens_per_second);
        }
        series_add(&b->lines[i].ratio, b->lines[i].result.tokens_per_second / plain);
    }
    return STATUS_OK;
}

/* --- printing --------------------------------------------------------------------------------- */

static void print_head(void) {
    printf("  %-9s %-15s %2s %2s %2s %9s %8s %7s %7s %7s %8s %7s %7s %8s\n", "mode", "ranks", "g", "N", "k",
           "tokens/s", "x plain", "accept", "length", "tok/rnd", "pass us", "t-wait", "d-wait", "ctl us");
}

static void print_line(struct line *line) {
    const struct spec_result *r = &line->result;
    const struct spec_policy *p = &line->way.policy;
    bool plain = p->mode == SPEC_PLAIN;
    printf("  %-9s %-15s %2d %2d %2d %9.1f %8.2f %7.3f %7.2f %7.2f %8.0f %6.0f%% %6.0f%% %8.1f\n",
           spec_mode_name(p->mode), line->way.label, plain ? 0 : p->window, p->layer_width, p->delay,
           series_median(&line->rate), series_median(&line->ratio), r->acceptance,
           r->acceptance_length, r->tokens_per_round, r->pass_us, 100 * r->target_wait,
           100 * r->draft_wait, r->control_us);
}

static void write_csv(struct bench *b, struct line *line) {
    const struct spec_result *r = &line->result;
    const struct spec_policy *p = &line->way.policy;
    if (b->csv == NULL) return;
    fprintf(b->csv, "\"%s\",%s,%s,\"%s\",%d,%d,%d,%g,%g,%.2f,%.4f,%.4f,%.4f,%.4f,%.4f,%.4f,%.2f",
            b->settings->label, line->what, spec_mode_name(p->mode), line->way.label, p->window,
            p->layer_width, p->delay, (double)line->way.temperature, line->oracle,
            series_median(&line->rate), series_median(&line->ratio), r->acceptance,
            r->acceptance_length, r->tokens_per_round, r->target_wait, r->draft_wait,
            r->control_us);
    for (int i = 0; i < 8; i++) {
        fprintf(b->csv, ",%.4f", r->drafts ? (double)r->per_position[i] / (double)r->drafts : 0.0);
    }
    fprintf(b->csv, "\n");
}

/* The fastest line of a mode; label NULL: on any ranks. */
static struct line *best(struct bench *b, float temperature, enum spec_mode mode,
                         const char *label) {
    struct line *best = NULL;
    for (int i = 0; i < b->n_lines; i++) {
        struct line *line = &b->lines[i];
        if (strcmp(line->what, "modes") != 0 || line->way.policy.mode != mode ||
            line->way.temperature != temperature) continue;
        if (label != NULL && strcmp(line->way.label, label) != 0) continue;
        if (best == NULL || series_median(&line->rate) > series_median(&best->rate)) best = line;
    }
    return best;
}

static void print_modes(struct bench *b, float temperature) {
    printf("\n%s, temperature %g: median tokens/s of %d passes, %d prompts x %d tokens at most\n",
           b->settings->label, (double)temperature, b->settings->passes, b->prompts.n,
           b->settings->n_tokens);
    print_head();
    for (int i = 0; i < b->n_lines; i++) {
        struct line *line = &b->lines[i];
        if (strcmp(line->what, "modes") != 0 || line->way.temperature != temperature) continue;
        print_line(line);
    }
    printf("  best of each mode\n");
    for (int mode = 0; mode < SPEC_N_MODES; mode++) {
        struct line *line = best(b, temperature, (enum spec_mode)mode, NULL);
        if (line != NULL) print_line(line);
    }
    struct line *pearl = best(b, temperature, SPEC_PEARL, NULL);
    struct line *sd = best(b, temperature, SPEC_SD, NULL);
    struct line *serial = best(b, temperature, SPEC_SD, "1+1, serial");
    printf("  at acceptance %.3f: pearl / best plain %.2f (aim 2), pearl / best sd %.2f (aim 1.25), "
           "pearl / sd on the same 1+1 ranks %.2f\n",
           pearl->result.acceptance, series_median(&pearl->ratio),
           series_median(&pearl->ratio) / series_median(&sd->ratio),
           series_median(&pearl->ratio) / series_median(&serial->ratio));
}

/* Tokens per round of PEARL (speculation.md 2). */
static double expected(double a, int g) {
    double ag = pow(a, g);
    return (1 - ag) / ((1 - a) * (1 + a - ag));
}

static void print_rest(struct bench *b) {
    const char *what = "";
    for (int i = 0; i < b->n_lines; i++) {
        struct line *line = &b->lines[i];
        const struct spec_result *r = &line->result;
        if (strcmp(line->what, "modes") == 0) continue;
        if (strcmp(what, line->what) != 0 && strcmp(line->what, "oracle") == 0) {
            printf("\noracle drafter in pearl: tokens per round against E(a, g)\n");
        } else if (what[0] == '\0') {
            printf("\nacceptance by calibration, width and sampling rule\n");
        }
        what = line->what;
        if (line->oracle > 0) {
            double e = expected(line->oracle, line->way.policy.window);
            printf("  a %.2f g %d: measured %.3f, E %.3f, ratio %.3f (aim 0.95..1.05)\n",
                   line->oracle, line->way.policy.window, r->tokens_per_round, e,
                   r->tokens_per_round / e);
            continue;
        }
        printf("  %-12s %-9s g %d N %d T %.1f: acceptance %.3f, tokens per round %.2f; by position",
               line->what, spec_mode_name(line->way.policy.mode), line->way.policy.window,
               line->way.policy.layer_width, (double)line->way.temperature, r->acceptance,
               r->tokens_per_round);
        for (int p = 0; p < line->way.policy.window && p < 8; p++) {
            printf(" %.2f", r->drafts ? (double)r->per_position[p] / (double)r->drafts : 0.0);
        }
        printf("\n");
    }
}

static enum status run(struct bench *b, struct error *err) {
    const struct settings *s = b->settings;
    TRY(spec_prompts_load(&b->prompts, s->model, s->prompts, s->domain, s->n_prompts, err));
    TRY(open_groups(b, err));
    bool device = s->device != BACKEND_AUTO;
    for (int t = 0; t < s->n_temperatures; t++) {
        if (device) add_device_modes(b, s->temperatures[t]);
        else add_modes(b, s->temperatures[t]);
    }
    if (!s->quick && !device) {
        add_calibration(b);
        add_rules(b);
        if (temperature_i(b, 0) >= 0) add_oracles(b);
    }
    for (int pass = 0; pass < s->passes; pass++) TRY(run_pass(b, pass, err));
    printf("hand-off between leaders, one way: %.1f us\n",
           (double)local_group_leadership(b->disjoint)->handoff_ns / 1e3);
    for (int t = 0; t < s->n_temperatures; t++) print_modes(b, s->temperatures[t]);
    print_rest(b);
    for (int i = 0; i < b->n_lines; i++) write_csv(b, &b->lines[i]);
    return STATUS_OK;
}

/* --- the command ------------------------------------------------------------------------------ */

static const char usage[] =
    "usage: tandem-bench spec --model DIR --draft DIR [options]\n"
    "\n"
    "Every mode of speculation side by side, one request at a time, ranks as threads of one process:\n"
    "plain and sd on one rank with two threads and on two ranks, easyspec on two, pearl on 1+1. Every\n"
    "text is compared with mode plain's. Then: acceptance with and without calibration, coupled against\n"
    "rejection sampling, and tokens per round of an oracle drafter against the formula.\n"
    "\n"
    "  --prompts FILE      JSON lines with \"prompt\" or \"messages\"      (random tokens)\n"
    "  --domain NAME       only lines of this domain\n"
    "  --n-prompts N       1..64                                       (8)\n"
    "  --tokens N          of each, 2..1024                            (256)\n"
    "  --temperatures A,B  at most 4                                   (0,1)\n"
    "  --windows A,B,...   at most 12                                  (2,3,4,6,8)\n"
    "  --weights FORMAT    bf16, int8, or on a GPU fp8                 (bf16)\n"
    "  --device NAME       cuda or emulated: plain, sd and pearl on that one device\n"
    "  --synthetic A       with --device and one temperature, 0: the draft computes all it would, but\n"
    "                      proposes what is right with probability A\n"
    "  --passes N          medians are over so many, 1..64             (3)\n"
    "  --ignore-eos        never stop early (for random weights)\n"
    "  --quick             the modes only\n"
    "  --label NAME        of this pair, for table and CSV             (the model's folder)\n"
    "  --trace FILE        what the ranks of 1+1 did when (chrome://tracing, Perfetto)\n"
    "  --csv FILE          appends the rows\n";

static int parse_ints(int *out, int most, const char *text, int low, int high) {
    int n = 0;
    for (const char *at = text; n < most; at++) {
        char *end;
        long value = strtol(at, &end, 10);
        if (end == at || value < low || value > high) return 0;
        out[n++] = (int)value;
        if (*end == '\0') return n;
        if (*end != ',') return 0;
        at = end;
    }
    return 0;
}

static int parse_floats(float *out, int most, const char *text) {
    int n = 0;
    for (const char *at = text; n < most; at++) {
        char *end;
        out[n++] = strtof(at, &end);
        if (end == at || out[n - 1] < 0) return 0;
        if (*end == '\0') return n;
        if (*end != ',') return 0;
        at = end;
    }
    return 0;
}

static bool parse(struct settings *s, int argc, char **argv) {
    static const struct option options[] = {
        {"model", required_argument, NULL, 'm'},     {"draft", required_argument, NULL, 'd'},
        {"prompts", required_argument, NULL, 'p'},   {"domain", required_argument, NULL, 'o'},
        {"n-prompts", required_argument, NULL, 'n'}, {"tokens", required_argument, NULL, 't'},
        {"temperatures", required_argument, NULL, 'T'}, {"windows", required_argument, NULL, 'g'},
        {"weights", required_argument, NULL, 'w'},   {"passes", required_argument, NULL, 'P'},
        {"ignore-eos", no_argument, NULL, 'e'},      {"quick", no_argument, NULL, 'q'},
        {"label", required_argument, NULL, 'l'},     {"trace", required_argument, NULL, 'r'},
        {"csv", required_argument, NULL, 'c'},       {"device", required_argument, NULL, 'D'},
        {"synthetic", required_argument, NULL, 'S'}, {NULL, 0, NULL, 0}};
    *s = (struct settings){.n_prompts = 8, .n_tokens = 256, .passes = 3, .weights = DTYPE_BF16,
                           .windows = {2, 3, 4, 6, 8}, .n_windows = 5, .temperatures = {0, 1},
                           .n_temperatures = 2};
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (option) {
        case 'm': s->model = optarg; break;
        case 'd': s->draft = optarg; break;
        case 'p': s->prompts = optarg; break;
        case 'o': s->domain = optarg; break;
        case 'n': s->n_prompts = atoi(optarg); break;
        case 't': s->n_tokens = atoi(optarg); break;
        case 'T': s->n_temperatures = parse_floats(s->temperatures, MAX_TEMPERATURES, optarg); break;
        case 'g': s->n_windows = parse_ints(s->windows, MAX_WINDOWS, optarg, 1, 16); break;
        case 'w':
            if (dtype_of_weights(optarg) < 0) return false;
            s->weights = (enum dtype)dtype_of_weights(optarg);
            break;
        case 'S': s->synthetic = atof(optarg); break;
        case 'D':
            if (strcmp(optarg, "cuda") != 0 && strcmp(optarg, "emulated") != 0) return false;
            s->device = (enum backend_isa)backend_isa_parse(optarg);
            break;
        case 'P': s->passes = atoi(optarg); break;
        case 'e': s->ignore_eos = true; break;
        case 'q': s->quick = true; break;
        case 'l': s->label = optarg; break;
        case 'r': s->trace = optarg; break;
        case 'c': s->csv = optarg; break;
        default: return false;
        }
    }
    if (s->label == NULL && s->model != NULL) s->label = s->model;
    bool greedy = s->n_temperatures == 1 && s->temperatures[0] == 0;
    if (s->synthetic != 0 && !(s->synthetic > 0 && s->synthetic < 1 && greedy)) return false;
    return s->model != NULL && s->draft != NULL && s->n_windows > 0 && s->n_temperatures > 0 &&
           s->n_prompts >= 1 && s->n_prompts <= SPEC_MAX_PROMPTS && s->n_tokens >= 2 &&
           s->n_tokens <= SPEC_MAX_TOKENS && s->passes >= 1 && s->passes <= SERIES_MAX;
}

int bench_spec(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "--help") == 0) {
        fputs(usage, stdout);
        return 0;
    }
    struct settings settings;
    if (!parse(&settings, argc, argv)) {
        fputs(usage, stderr);
        return 2;
    }
    static struct bench bench;
    struct error err;
    bench.settings = &settings;
    if (settings.csv != NULL && (bench.csv = fopen(settings.csv, "a")) == NULL) {
        fprintf(stderr, "tandem-bench spec: --csv %s cannot be written\n", settings.csv);
        return 1;
    }
    machine_print();
    enum status status = run(&bench, &err);
    if (status != STATUS_OK) fprintf(stderr, "tandem-bench spec: %s\n", err.text);
    close_groups(&bench);
    spec_prompts_free(&bench.prompts);
    if (bench.csv != NULL) fclose(bench.csv);
    return status != STATUS_OK;
}
