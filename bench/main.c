/* tandem-bench: measures the parts of Tandem, each beside what it aims at. */
#include <stdio.h>
#include <string.h>

#include "bench/coordinator.h"
#include "bench/device.h"
#include "bench/engine.h"
#include "bench/kernels.h"
#include "bench/make_model.h"
#include "bench/spec.h"
#include "bench/tokenizer.h"

static const struct command {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
} commands[] = {
    {"kernels", bench_kernels, "matrix products against read bandwidth, by rows and instruction set"},
    {"device", bench_device, "a GPU's kernels against the bandwidth of its memory"},
    {"engine", bench_engine, "decoding, cost of rows, prefill and step overhead of a model"},
    {"coordinator", bench_coordinator, "streaming and latency of the coordinator, with a stub replica"},
    {"tokenizer", bench_tokenizer, "encoding and decoding of a text, on one core"},
    {"spec", bench_spec, "every mode of speculation side by side"},
    {"make-model", bench_make_model, "writes a random checkpoint, or a target/draft pair"},
};

static void print_help(FILE *out) {
    fputs("usage: tandem-bench COMMAND [options]\n\n", out);
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        fprintf(out, "  %-12s %s\n", commands[i].name, commands[i].help);
    }
    fputs("\ntandem-bench COMMAND --help tells the options. Medians are over several passes; ratios are\n"
          "taken inside one pass, since machines are shared.\n", out);
}

int main(int argc, char **argv) {
    if (argc < 2) {
        print_help(stderr);
        return 2;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "help") == 0) {
        print_help(stdout);
        return 0;
    }
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        if (strcmp(argv[1], commands[i].name) == 0) return commands[i].run(argc - 1, argv + 1);
    }
    fprintf(stderr, "tandem-bench: unknown command \"%s\"\n\n", argv[1]);
    print_help(stderr);
    return 2;
}
