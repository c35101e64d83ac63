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
    "  --target-ranks N         ranks of a replica: 1, 2, 4 or 8 (1)\n"
    "  --weights bf16|int8      format of the weights in the workers' memory (bf16)\n"
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
    OPTION_KV_BUDGET, OPTION_NO_PREFIX_CACHE, OPTION_LOG_LEVEL, OPTION_HELP, OPTION_VERSION
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
    {"log-level", required_argument, NULL, OPTION_LOG_LEVEL},
    {"help", no_argument, NULL, OPTION_HELP},
    {"version", no_argument, NULL, OPTION_VERSION},
    {0},
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

static void set_option(struct coordinator_options *options, enum log_level *level, int id,
                       const char *name, const char *value) {
    switch (id) {
    case OPTION_MODEL: options->model_dir = value; break;
    case OPTION_TARGET_RANKS: options->target_ranks = (uint32_t)number(name, value, 1, 8); break;
    case OPTION_WEIGHTS:
        if (strcmp(value, "bf16") != 0 && strcmp(value, "int8") != 0) {
            bad_usage(name, value, "bf16 or int8");
        }
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
        *level = (enum log_level)parsed;
        break;
    }
    case OPTION_HELP: fputs(help, stdout); exit(0);
    case OPTION_VERSION: puts("tandem-coordinator " TANDEM_VERSION); exit(0);
    default: fputs("Try tandem-coordinator --help.\n", stderr); exit(2);
    }
}

static void parse(struct coordinator_options *options, enum log_level *level, int argc, char **argv) {
    int id, index = 0;
    while ((id = getopt_long(argc, argv, "", table, &index)) != -1) {
        set_option(options, level, id, id == '?' ? "" : table[index].name, optarg);
    }
    if (optind < argc) {
        fprintf(stderr, "tandem-coordinator: unexpected argument \"%s\"; try --help\n", argv[optind]);
        exit(2);
    }
    if (options->model_dir == NULL) {
        fputs("tandem-coordinator: --model DIR is missing; try --help\n", stderr);
        exit(2);
    }
}

int main(int argc, char **argv) {
    struct coordinator_options options = coordinator_options_default();
    enum log_level level = LOG_INFO;
    struct coordinator *coordinator;
    struct error err;
    parse(&options, &level, argc, argv);
    log_open("coordinator", level);

    /* Blocked before any thread exists, so that only sigwait below sees them. */
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    pthread_sigmask(SIG_BLOCK, &ends, NULL);
    signal(SIGPIPE, SIG_IGN);

    if (coordinator_start(&coordinator, &options, &err) != STATUS_OK) {
        log_error("%s", err.text);
        return 1;
    }
    log_info("gRPC on %s:%d, HTTP on port %d; waiting for replicas of %" PRIu32 " rank%s",
             options.host, coordinator_port(coordinator), coordinator_http_port(coordinator),
             options.target_ranks, options.target_ranks == 1 ? "" : "s");
    int signal_number;
    while (sigwait(&ends, &signal_number) != 0) continue;
    log_info("%s: shutting down", signal_number == SIGTERM ? "SIGTERM" : "SIGINT");
    coordinator_stop(coordinator);
    return 0;
}
