/* tandem-coordinator: options, signals. */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/log.h"
#include "coordinator/coordinator.h"

static const char help[] =
    "Usage: tandem-coordinator --model DIR [options]\n"
    "\n"
    "The control plane of a Tandem service: takes requests over gRPC, tokenizes, queues, gives them\n"
    "to replicas (tandem-worker, which dial in) and streams their text back.\n"
    "\n"
    "Model\n"
    "  --model DIR              Hugging Face folder; the workers read the same path\n"
    "  --target-ranks T         ranks the model is spread over: 1, 2, 4 or 8 (1; with --ranks the\n"
    "                           planner's)\n"
    "  --weights FORMAT         format of the weights in the workers' memory: bf16,\n"
    "                           int8, or on GPUs fp8 (bf16)\n"
    "\n"
    "Speculation\n"
    "  --draft DIR|ngram        draft model, or look-up in the text so far (none)\n"
    "  --mode MODE              auto, plain, sd, easyspec, pearl or pearl+lp (auto)\n"
    "  --draft-ranks D          ranks of the draft: 1, 2, 4 or 8 (1; with --ranks the planner's)\n"
    "  --ranks N                of a replica: T (the draft shares them) or T+D (it has its own)\n"
    "                           (T+D for auto, pearl and pearl+lp)\n"
    "  --layer-width N          draft layers at once: 1, 2 or 4; 0: the planner's (0)\n"
    "  --window G|auto          tokens drafted in a round, 1 to 16 (auto)\n"
    "  --max-window G           no policy or request asks for more (16)\n"
    "  --sampling-rule RULE     coupled or rejection (coupled)\n"
    "\n"
    "Planning (declared, of each rank)\n"
    "  --explain-plan           print the candidates and why one wins, and end\n"
    "  --memory BYTES           suffixes k, m, g (not known: everything fits)\n"
    "  --bandwidth GBS          10^9 bytes a second that weights are read with (25)\n"
    "  --compute GFLOPS         10^9 operations a second (200)\n"
    "  --collective-us US       an all-reduce of a few rows (5)\n"
    "  --handoff-us US          tokens between draft and target (10)\n"
    "  --layer-us US            fixed time of a layer (10)\n"
    "  --acceptance A           probability that a drafted token holds (0.75; look-up 0.4)\n"
    "\n"
    "Addresses\n"
    "  --host ADDRESS           for both ports (127.0.0.1)\n"
    "  --port P                 gRPC; 0: any free one (50051)\n"
    "  --http-port Q            /metrics, /healthz, /readyz; 0: any free one (8080)\n"
    "  --ports-file F           written once both ports listen: JSON with grpc_port, http_port, pid\n"
    "  --ready-file F           the same, written once a replica serves\n"
    "\n"
    "Limits\n"
    "  --max-queue-requests N   waiting at once; more get RESOURCE_EXHAUSTED (1024)\n"
    "  --max-queue-tokens N     prompt tokens of all waiting requests (1m)\n"
    "  --max-sequences N        running at once, per replica (256)\n"
    "  --max-step-tokens N      tokens computed in a step, per replica (512)\n"
    "  --max-context N          tokens of prompt and answer (the model's)\n"
    "  --kv-budget BYTES        KV memory per rank; suffixes k, m, g (what is free)\n"
    "  --no-prefix-cache        do not reuse the KV blocks of equal prompt beginnings\n"
    "\n"
    "  --log-level LEVEL        debug, info, warn, error (info)\n"
    "  --help, --version\n";

enum option_id {
    OPTION_MODEL = 256, OPTION_TARGET_RANKS, OPTION_WEIGHTS, OPTION_HOST, OPTION_PORT,
    OPTION_HTTP_PORT, OPTION_PORTS_FILE, OPTION_READY_FILE, OPTION_MAX_QUEUE_REQUESTS,
    OPTION_MAX_QUEUE_TOKENS, OPTION_MAX_SEQUENCES, OPTION_MAX_STEP_TOKENS, OPTION_MAX_CONTEXT,
    OPTION_KV_BUDGET, OPTION_NO_PREFIX_CACHE, OPTION_DRAFT,
    OPTION_MODE, OPTION_DRAFT_RANKS, OPTION_RANKS, OPTION_LAYER_WIDTH, OPTION_WINDOW,
    OPTION_MAX_WINDOW, OPTION_SAMPLING_RULE, OPTION_EXPLAIN_PLAN, OPTION_MEMORY, OPTION_BANDWIDTH,
    OPTION_COMPUTE, OPTION_COLLECTIVE_US, OPTION_HANDOFF_US, OPTION_LAYER_US, OPTION_ACCEPTANCE,
    OPTION_LOG_LEVEL, OPTION_HELP, OPTION_VERSION
};

static const struct option table[] = {
    {"model", required_argument, NULL, OPTION_MODEL},
    {"target-ranks", required_argument, NULL, OPTION_TARGET_RANKS},
    {"weights", required_argument, NULL, OPTION_WEIGHTS},
    {"host", required_argument, NULL, OPTION_HOST},
    {"port", required_argument, NULL, OPTION_PORT},
    {"http-port", required_argument, NULL, OPTION_HTTP_PORT},
    {"ports-file", required_argument, NULL, OPTION_PORTS_FILE},
    {"ready-file", required_argument, NULL, OPTION_READY_FILE},
    {"max-queue-requests", required_argument, NULL, OPTION_MAX_QUEUE_REQUESTS},
    {"max-queue-tokens", required_argument, NULL, OPTION_MAX_QUEUE_TOKENS},
    {"max-sequences", required_argument, NULL, OPTION_MAX_SEQUENCES},
    {"max-step-tokens", required_argument, NULL, OPTION_MAX_STEP_TOKENS},
    {"max-context", required_argument, NULL, OPTION_MAX_CONTEXT},
    {"kv-budget", required_argument, NULL, OPTION_KV_BUDGET},
    {"no-prefix-cache", no_argument, NULL, OPTION_NO_PREFIX_CACHE},
    {"draft", required_argument, NULL, OPTION_DRAFT},
    {"mode", required_argument, NULL, OPTION_MODE},
    {"draft-ranks", required_argument, NULL, OPTION_DRAFT_RANKS},
    {"ranks", required_argument, NULL, OPTION_RANKS},
    {"layer-width", required_argument, NULL, OPTION_LAYER_WIDTH},
    {"window", required_argument, NULL, OPTION_WINDOW},
    {"max-window", required_argument, NULL, OPTION_MAX_WINDOW},
    {"sampling-rule", required_argument, NULL, OPTION_SAMPLING_RULE},
    {"explain-plan", no_argument, NULL, OPTION_EXPLAIN_PLAN},
    {"memory", required_argument, NULL, OPTION_MEMORY},
    {"bandwidth", required_argument, NULL, OPTION_BANDWIDTH},
    {"compute", required_argument, NULL, OPTION_COMPUTE},
    {"collective-us", required_argument, NULL, OPTION_COLLECTIVE_US},
    {"handoff-us", required_argument, NULL, OPTION_HANDOFF_US},
    {"layer-us", required_argument, NULL, OPTION_LAYER_US},
    {"acceptance", required_argument, NULL, OPTION_ACCEPTANCE},
    {"log-level", required_argument, NULL, OPTION_LOG_LEVEL},
    {"help", no_argument, NULL, OPTION_HELP},
    {"version", no_argument, NULL, OPTION_VERSION},
    {0},
};

struct program {
    struct coordinator_options options;
    enum log_level level;
    bool explain;
};

/* Says what is wrong with an option and ends the program. */
static _Noreturn void bad_usage(const char *option, const char *value, const char *expected) {
    fprintf(stderr, "tandem-coordinator: --%s is \"%s\"; expected %s\n", option, value, expected);
    exit(2);
}

/* A whole number in [low, high], with suffix k, m or g (powers of 1024). */
static uint64_t number(const char *option, const char *text, uint64_t low, uint64_t high) {
    char *end, expected[96];
    snprintf(expected, sizeof expected, "a whole number from %" PRIu64 " to %" PRIu64, low, high);
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (end == text || strchr(text, '-') != NULL || errno != 0) bad_usage(option, text, expected);
    static const char suffixes[] = "kmg";
    const char *suffix = *end != '\0' ? strchr(suffixes, *end | 32) : NULL;
    int shift = suffix != NULL ? 10 * (int)(suffix - suffixes + 1) : 0;
    if (suffix != NULL) end++;
    if (*end != '\0' || value > high >> shift || value << shift < low) {
        bad_usage(option, text, expected);
    }
    return value << shift;
}

/* A number in [low, high]. */
static double real(const char *option, const char *text, double low, double high) {
    char *end, expected[96];
    double value = strtod(text, &end);
    snprintf(expected, sizeof expected, "a number from %g to %g", low, high);
    if (end == text || *end != '\0' || !(value >= low && value <= high)) {
        bad_usage(option, text, expected);
    }
    return value;
}

static int parse_mode(const char *option, const char *text) {
    if (strcmp(text, "auto") == 0) return -1;
    int mode = spec_mode_parse(text);
    if (mode < 0) bad_usage(option, text, "auto, plain, sd, easyspec, pearl or pearl+lp");
    return mode;
}

static uint32_t parse_width(const char *option, const char *text) {
    uint32_t width = (uint32_t)number(option, text, 0, SPEC_MAX_LAYER_WIDTH);
    if (width == 3) bad_usage(option, text, "1, 2 or 4, or 0 for the planner's choice");
    return width;
}

static bool set_planning(struct coordinator_options *options, int id, const char *name,
                         const char *value) {
    struct planner_machine *machine = &options->machine;
    switch (id) {
    case OPTION_MEMORY: machine->memory_bytes = number(name, value, 1, UINT64_C(1) << 50); break;
    case OPTION_BANDWIDTH: machine->bandwidth_gbs = real(name, value, 0.001, 1e6); break;
    case OPTION_COMPUTE: machine->compute_gflops = real(name, value, 0.001, 1e9); break;
    case OPTION_COLLECTIVE_US: machine->collective_us = real(name, value, 0, 1e6); break;
    case OPTION_HANDOFF_US: machine->handoff_us = real(name, value, 0, 1e6); break;
    case OPTION_LAYER_US: machine->layer_us = real(name, value, 0, 1e6); break;
    case OPTION_ACCEPTANCE: machine->acceptance = real(name, value, 0, 1); break;
    default: return false;
    }
    return true;
}

static bool set_speculation(struct coordinator_options *options, int id, const char *name,
                            const char *value) {
    switch (id) {
    case OPTION_DRAFT: options->draft = value; break;
    case OPTION_MODE: options->mode = parse_mode(name, value); break;
    case OPTION_TARGET_RANKS: options->target_ranks = (uint32_t)number(name, value, 1, 8); break;
    case OPTION_DRAFT_RANKS: options->draft_ranks = (uint32_t)number(name, value, 0, 8); break;
    case OPTION_RANKS:
        options->n_ranks = (uint32_t)number(name, value, 0, PLACEMENT_MAX_RANKS);
        break;
    case OPTION_LAYER_WIDTH: options->layer_width = parse_width(name, value); break;
    case OPTION_WINDOW:
        options->window = strcmp(value, "auto") == 0
                              ? 0
                              : (uint32_t)number(name, value, 1, SPEC_MAX_WINDOW);
        break;
    case OPTION_MAX_WINDOW:
        options->max_window = (uint32_t)number(name, value, 1, SPEC_MAX_WINDOW);
        break;
    case OPTION_SAMPLING_RULE:
        if (strcmp(value, "coupled") != 0 && strcmp(value, "rejection") != 0) {
            bad_usage(name, value, "coupled or rejection");
        }
        options->sampling_rule = value;
        break;
    default: return false;
    }
    return true;
}

static void set_option(struct program *program, int id, const char *name, const char *value) {
    struct coordinator_options *options = &program->options;
    if (set_speculation(options, id, name, value) || set_planning(options, id, name, value)) return;
    switch (id) {
    case OPTION_MODEL: options->model_dir = value; break;
    case OPTION_EXPLAIN_PLAN: program->explain = true; break;
    case OPTION_WEIGHTS:
        if (dtype_of_weights(value) < 0) bad_usage(name, value, "bf16, int8 or fp8");
        options->weights = value;
        break;
    case OPTION_HOST: options->host = value; break;
    case OPTION_PORT: options->port = (int)number(name, value, 0, 65535); break;
    case OPTION_HTTP_PORT: options->http_port = (int)number(name, value, 0, 65535); break;
    case OPTION_PORTS_FILE: options->ports_file = value; break;
    case OPTION_READY_FILE: options->ready_file = value; break;
    case OPTION_MAX_QUEUE_REQUESTS:
        options->max_queue_requests = (uint32_t)number(name, value, 1, 1 << 20);
        break;
    case OPTION_MAX_QUEUE_TOKENS:
        options->max_queue_tokens = number(name, value, 1, UINT32_MAX);
        break;
    case OPTION_MAX_SEQUENCES:
        options->max_sequences = (uint32_t)number(name, value, 1, 65536);
        break;
    case OPTION_MAX_STEP_TOKENS:
        options->max_step_tokens = (uint32_t)number(name, value, 1, 1 << 20);
        break;
    case OPTION_MAX_CONTEXT:
        options->max_context = (uint32_t)number(name, value, 2, 1 << 30);
        break;
    case OPTION_KV_BUDGET:
        options->kv_budget_bytes = number(name, value, 1, UINT64_C(1) << 50);
        break;
    case OPTION_NO_PREFIX_CACHE: options->prefix_cache_off = true; break;
    case OPTION_LOG_LEVEL: {
        int parsed = log_level_parse(value);
        if (parsed < 0) bad_usage(name, value, "debug, info, warn or error");
        program->level = (enum log_level)parsed;
        break;
    }
    case OPTION_HELP: fputs(help, stdout); exit(0);
    case OPTION_VERSION: puts("tandem-coordinator " TANDEM_VERSION); exit(0);
    default: fputs("Try tandem-coordinator --help.\n", stderr); exit(2);
    }
}

static void parse(struct program *program, int argc, char **argv) {
    int id, index = 0;
    while ((id = getopt_long(argc, argv, "", table, &index)) != -1) {
        set_option(program, id, id == '?' ? "" : table[index].name, optarg);
    }
    if (optind < argc) {
        fprintf(stderr, "tandem-coordinator: unexpected argument \"%s\"; try --help\n", argv[optind]);
        exit(2);
    }
    if (program->options.model_dir == NULL) {
        fputs("tandem-coordinator: --model DIR is missing; try --help\n", stderr);
        exit(2);
    }
}

/* To standard output; what is wrong, to standard error. */
static int explain(const struct coordinator_options *options) {
    struct error err;
    if (coordinator_explain(options, stdout, &err) == STATUS_OK) return 0;
    fflush(stdout);
    fprintf(stderr, "tandem-coordinator: %s\n", err.text);
    return 1;
}

int main(int argc, char **argv) {
    struct program program = {coordinator_options_default(), LOG_INFO, false};
    const struct coordinator_options *options = &program.options;
    struct coordinator *coordinator;
    struct error err;
    parse(&program, argc, argv);
    if (program.explain) return explain(options);
    log_open("coordinator", program.level);

    /* Blocked before any thread exists, so that only sigwait below sees them. */
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    pthread_sigmask(SIG_BLOCK, &ends, NULL);
    signal(SIGPIPE, SIG_IGN);

    if (coordinator_start(&coordinator, options, &err) != STATUS_OK) {
        log_error("%s", err.text);
        return 1;
    }
    log_info("gRPC on %s:%d, HTTP on port %d; waiting for replicas of %" PRIu32 " rank%s",
             options->host, coordinator_port(coordinator), coordinator_http_port(coordinator),
             coordinator->topology.wish.n_ranks, coordinator->topology.wish.n_ranks == 1 ? "" : "s");
    int signal_number;
    while (sigwait(&ends, &signal_number) != 0) continue;
    log_info("%s: shutting down", signal_number == SIGTERM ? "SIGTERM" : "SIGINT");
    coordinator_stop(coordinator);
    return 0;
}
