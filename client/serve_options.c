#include "client/serve_options.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <string.h>
#include <unistd.h>

#include "common/device_name.h"

const struct options_row serve_option_rows[] = {
    {.name = "model", .type = OPTIONS_TEXT, .group = "Model", .value = "DIR",
     .help = "Hugging Face folder as downloaded: config.json, *.safetensors, tokenizer.json"},
    {.name = "target-ranks", .type = OPTIONS_COUNT, .group = "Model", .value = "T",
     .help = "ranks the model is spread over: 1, 2, 4 or 8; without it 1, or with --ranks what the "
             "planner chooses", .low = 1, .high = 8},
    {.name = "weights", .type = OPTIONS_CHOICE, .group = "Model", .choices = "bf16|int8|fp8",
     .help = "format of the weights in memory; int8 and fp8 (e4m3, on GPUs) are quantised while "
             "loading",
     .initial = "bf16"},
    {.name = "device", .type = OPTIONS_TEXT, .group = "Model", .value = "auto|cpu|cuda|cuda:K|emulated",
     .help = "what computes: auto takes CUDA devices where there are any; cuda gives each rank its own, "
             "cuda:K gives all ranks that one; emulated runs the CUDA kernels on the CPU, slowly, to "
             "try them (tandem-worker --list-devices shows what is here)", .initial = "auto"},
    {.name = "isa", .type = OPTIONS_CHOICE, .group = "Model",
     .choices = "auto|amx|avx512|avx2|portable", .help = "instruction set of the CPU's kernels",
     .initial = "auto"},
    {.name = "threads", .type = OPTIONS_COUNT, .group = "Model", .value = "N",
     .help = "compute threads of each rank", .initial = "1", .low = 1, .high = 256},
    {.name = "draft", .type = OPTIONS_TEXT, .group = "Speculation", .value = "DIR|ngram",
     .help = "draft model: a Hugging Face folder with the same tokenizer; or ngram: look-up in the "
             "text so far; without it nothing is drafted"},
    {.name = "mode", .type = OPTIONS_CHOICE, .group = "Speculation",
     .choices = "auto|plain|sd|easyspec|pearl|pearl+lp",
     .help = "how rounds run; auto measures and chooses among those that the ranks can run",
     .initial = "auto"},
    {.name = "draft-ranks", .type = OPTIONS_COUNT, .group = "Speculation", .value = "D",
     .help = "ranks the draft is spread over: 1, 2, 4 or 8; without it 1, or with --ranks what the "
             "planner chooses", .low = 0, .high = 8},
    {.name = "ranks", .type = OPTIONS_COUNT, .group = "Speculation", .value = "N",
     .help = "ranks in all: T, of which the draft takes D, or T + D, where it has its own; without "
             "it T + D for auto, pearl and pearl+lp, else T", .low = 0, .high = 16},
    {.name = "layer-width", .type = OPTIONS_COUNT, .group = "Speculation", .value = "N",
     .help = "draft layers at once in easyspec and pearl+lp: 1, 2 or 4; 0: the planner's choice",
     .initial = "0", .low = 0, .high = 4},
    {.name = "window", .type = OPTIONS_TEXT, .group = "Speculation", .value = "G|auto",
     .help = "tokens drafted for a sequence in a round, 1 to 16; auto follows what is measured",
     .initial = "auto"},
    {.name = "max-window", .type = OPTIONS_COUNT, .group = "Speculation", .value = "G",
     .help = "the largest window that a policy or a request may have", .initial = "16", .low = 1,
     .high = 16},
    {.name = "sampling-rule", .type = OPTIONS_CHOICE, .group = "Speculation",
     .choices = "coupled|rejection",
     .help = "how drafted tokens are accepted; coupled gives the texts of plain decoding",
     .initial = "coupled"},
    {.name = "trace", .type = OPTIONS_TEXT, .group = "Speculation", .value = "FILE",
     .help = "what each rank did when, for chrome://tracing or Perfetto; written at the end"},
    {.name = "memory", .type = OPTIONS_COUNT, .group = "Planning (declared of each rank)",
     .value = "BYTES", .help = "memory, e.g. 80g; without it everything is taken to fit", .low = 1,
     .high = 1125899906842624.0},
    {.name = "bandwidth", .type = OPTIONS_REAL, .group = "Planning (declared of each rank)",
     .value = "GBS", .help = "10^9 bytes a second that weights are read with", .initial = "25",
     .low = 0.001, .high = 1e6},
    {.name = "compute", .type = OPTIONS_REAL, .group = "Planning (declared of each rank)",
     .value = "GFLOPS", .help = "10^9 operations a second that products reach", .initial = "200",
     .low = 0.001, .high = 1e9},
    {.name = "collective-us", .type = OPTIONS_REAL, .group = "Planning (declared of each rank)",
     .value = "US", .help = "microseconds of an all-reduce of a few rows", .initial = "5", .low = 0,
     .high = 1e6},
    {.name = "handoff-us", .type = OPTIONS_REAL, .group = "Planning (declared of each rank)",
     .value = "US", .help = "microseconds from draft to target or back", .initial = "10", .low = 0,
     .high = 1e6},
    {.name = "layer-us", .type = OPTIONS_REAL, .group = "Planning (declared of each rank)",
     .value = "US", .help = "microseconds of a layer besides its weights", .initial = "10",
     .low = 0, .high = 1e6},
    {.name = "acceptance", .type = OPTIONS_REAL, .group = "Planning (declared of each rank)",
     .value = "A", .help = "assumed probability that a drafted token holds; without it 0.75 for a "
                           "model, 0.4 for ngram", .low = 0, .high = 1},
    {.name = "host", .type = OPTIONS_TEXT, .group = "Addresses", .value = "ADDRESS",
     .help = "where both ports listen", .initial = "127.0.0.1"},
    {.name = "port", .type = OPTIONS_COUNT, .group = "Addresses", .value = "P",
     .help = "gRPC port; 0 takes any free one", .initial = "50051", .low = 0, .high = 65535},
    {.name = "http-port", .type = OPTIONS_COUNT, .group = "Addresses", .value = "Q",
     .help = "port of /metrics, /healthz and /readyz; 0 takes any free one", .initial = "8080",
     .low = 0, .high = 65535},
    {.name = "ready-file", .type = OPTIONS_TEXT, .group = "Addresses", .value = "FILE",
     .help = "written once the model serves: JSON with grpc_port, http_port, pid"},
    {.name = "max-queue-requests", .type = OPTIONS_COUNT, .group = "Limits", .value = "N",
     .help = "requests waiting at once; more are refused", .initial = "1024", .low = 1,
     .high = 1048576},
    {.name = "max-queue-tokens", .type = OPTIONS_COUNT, .group = "Limits", .value = "N",
     .help = "prompt tokens of all waiting requests", .initial = "1m", .low = 1,
     .high = 4294967295.0},
    {.name = "max-sequences", .type = OPTIONS_COUNT, .group = "Limits", .value = "N",
     .help = "sequences running at once", .initial = "256", .low = 1, .high = 65536},
    {.name = "max-step-tokens", .type = OPTIONS_COUNT, .group = "Limits", .value = "N",
     .help = "tokens computed in one step (chunked prefill)", .initial = "512", .low = 1,
     .high = 1048576},
    {.name = "max-context", .type = OPTIONS_COUNT, .group = "Limits", .value = "N",
     .help = "tokens of prompt and answer; without it, the model's", .low = 2,
     .high = 1073741824},
    {.name = "kv-budget", .type = OPTIONS_COUNT, .group = "Limits", .value = "BYTES",
     .help = "KV memory of each rank, e.g. 2g; without it, what is free", .low = 1,
     .high = 1125899906842624.0},
    {.name = "no-prefix-cache", .type = OPTIONS_FLAG, .group = "Limits",
     .help = "do not reuse the KV blocks of equal prompt beginnings"},
    {.name = "restarts", .type = OPTIONS_COUNT, .group = "Limits", .value = "N",
     .help = "deaths of the replica in a row before giving up", .initial = "5", .low = 0,
     .high = 1000},
    {.name = "config", .type = OPTIONS_TEXT, .group = "General", .value = "FILE",
     .help = "YAML file with these options by the same names; the command line wins",
     .command_line_only = true},
    {.name = "log-level", .type = OPTIONS_CHOICE, .group = "General",
     .choices = "debug|info|warn|error", .help = "lowest level printed", .initial = "info"},
    {.name = "help", .type = OPTIONS_FLAG, .group = "General", .help = "prints this",
     .command_line_only = true},
};
const size_t n_serve_option_rows = sizeof serve_option_rows / sizeof *serve_option_rows;

/* Handed to the coordinator as they are, when given. */
static const char *const to_coordinator[] = {
    "model", "weights", "host", "log-level", "target-ranks", "port", "http-port",
    "max-queue-requests", "max-queue-tokens", "max-sequences", "max-step-tokens", "max-context",
    "kv-budget", "draft", "mode", "draft-ranks", "ranks", "layer-width", "window", "max-window",
    "sampling-rule", "memory", "bandwidth", "compute", "collective-us", "handoff-us", "layer-us",
    "acceptance"};

/* ---- command lines --------------------------------------------------------------------------- */

void arguments_add(struct arguments *arguments, const char *format, ...) {
    CHECK(arguments->n < ARGUMENTS_MAX);
    va_list values;
    va_start(values, format);
    int n = vsnprintf(arguments->words[arguments->n++], ARGUMENT_BYTES, format, values);
    va_end(values);
    CHECK(n >= 0 && n < ARGUMENT_BYTES);
}

void arguments_exec(const struct arguments *arguments) {
    char *words[ARGUMENTS_MAX + 1];
    for (int i = 0; i < arguments->n; i++) words[i] = (char *)arguments->words[i];
    words[arguments->n] = NULL;
    execvp(words[0], words);
}

static void add_value(struct arguments *arguments, const struct options *options,
                      const struct options_row *row) {
    switch (row->type) {
    case OPTIONS_COUNT:
        arguments_add(arguments, "%" PRIu64, options_count(options, row->name));
        break;
    case OPTIONS_REAL:
        arguments_add(arguments, "%.17g", options_real(options, row->name));
        break;
    default: arguments_add(arguments, "%s", options_text(options, row->name));
    }
}

static const struct options_row *find_row(const char *name) {
    for (size_t i = 0; i < n_serve_option_rows; i++) {
        if (strcmp(serve_option_rows[i].name, name) == 0) return &serve_option_rows[i];
    }
    check_failed("an option of the table", __FILE__, __LINE__);
}

void serve_options_add(struct arguments *arguments, const struct options *options) {
    for (size_t i = 0; i < sizeof to_coordinator / sizeof *to_coordinator; i++) {
        if (!options_given(options, to_coordinator[i])) continue;
        arguments_add(arguments, "--%s", to_coordinator[i]);
        add_value(arguments, options, find_row(to_coordinator[i]));
    }
    if (options_flag(options, "no-prefix-cache")) arguments_add(arguments, "--no-prefix-cache");
}

/* ---- checks ---------------------------------------------------------------------------------- */

enum status serve_options_check(const struct options *options, struct error *err) {
    if (options_text(options, "model") == NULL) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "--model DIR is missing");
    }
    static const char *const degrees[] = {"target-ranks", "draft-ranks"};
    for (int i = 0; i < 2; i++) {
        uint64_t ranks = options_count(options, degrees[i]);
        if ((ranks & (ranks - 1)) == 0) continue;
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "--%s is %" PRIu64 "; expected 1, 2, 4 or 8", degrees[i], ranks);
    }
    return device_name_check(options_text(options, "device"), err);
}

enum status serve_options_folder(char *out, size_t size, struct error *err) {
    ssize_t n = readlink("/proc/self/exe", out, size - 1);
    if (n <= 0) {
        return error_set(err, STATUS_UNAVAILABLE, "/proc/self/exe: %s", strerror(errno));
    }
    out[n] = '\0';
    *strrchr(out, '/') = '\0';
    return STATUS_OK;
}
