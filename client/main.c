/* tandem: the command line. Finds the command; each has its file and its table of options. */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "client/generate.h"
#include "client/plan.h"
#include "client/policy.h"
#include "client/serve.h"
#include "client/status.h"
#include "client/tokenize.h"

struct command {
    const char *name, *summary;
    int (*run)(int argc, char **argv);  /* argv[0] is the command's name */
};

static const struct command commands[] = {
    {"serve", "serve a model: a coordinator and a replica of ranks on this machine", client_serve},
    {"plan", "show which ranks would do what, and how fast", client_plan},
    {"generate", "send a prompt to a server and stream the answer", client_generate},
    {"status", "show what a server is doing", client_status},
    {"policy", "show or set how a server speculates", client_policy},
    {"tokenize", "text to token ids, offline", client_tokenize},
};
#define N_COMMANDS (sizeof commands / sizeof *commands)

static void print_help(FILE *out) {
    fputs("Usage: tandem COMMAND [options]\n\n"
          "Serves large language models over gRPC: for a checkpoint, a prompt and a seed there is\n"
          "one text.\n\n"
          "Commands\n", out);
    for (size_t i = 0; i < N_COMMANDS; i++) {
        fprintf(out, "  %-10s %s\n", commands[i].name, commands[i].summary);
    }
    fputs("\n  tandem help COMMAND    its options\n"
          "  tandem --version\n\n"
          "Try:  tandem serve --model assets/models/llama-tale-target --target-ranks 2\n"
          "      tandem generate --prompt \"Once upon a time\" --max-tokens 100\n", out);
}

static const struct command *find_command(const char *name) {
    for (size_t i = 0; i < N_COMMANDS; i++) {
        if (strcmp(commands[i].name, name) == 0) return &commands[i];
    }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc < 2) {
        print_help(stderr);
        return 2;
    }
    const char *name = argv[1];
    if (strcmp(name, "--version") == 0) {
        puts("tandem " TANDEM_VERSION);
        return 0;
    }
    bool help = strcmp(name, "help") == 0;
    if (strcmp(name, "--help") == 0 || (help && argc == 2)) {
        print_help(stdout);
        return 0;
    }
    if (help) name = argv[2];
    const struct command *command = find_command(name);
    if (command == NULL) {
        fprintf(stderr, "tandem: unknown command \"%s\"; try tandem --help\n", name);
        return 2;
    }
    if (help) return command->run(2, (char *[]){argv[2], "--help", NULL});
    return command->run(argc - 1, argv + 1);
}
