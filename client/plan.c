#include "client/plan.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/serve_options.h"

/* Does not return where it works. */
static enum status become_coordinator(const struct options *options, struct error *err) {
    char bin[4096];
    TRY(serve_options_folder(bin, sizeof bin, err));
    struct arguments *arguments = xcalloc(1, sizeof *arguments);
    arguments_add(arguments, "%s/tandem-coordinator", bin);
    arguments_add(arguments, "--explain-plan");
    serve_options_add(arguments, options);
    fflush(NULL);
    arguments_exec(arguments);
    free(arguments);
    return error_set(err, STATUS_UNAVAILABLE, "cannot run %s/tandem-coordinator: %s", bin,
                     strerror(errno));
}

int client_plan(int argc, char **argv) {
    struct options *options;
    struct error err;
    if (options_parse(&options, serve_option_rows, n_serve_option_rows, argc, argv, &err) !=
        STATUS_OK) {
        fprintf(stderr, "tandem plan: %s; try tandem plan --help\n", err.text);
        return 2;
    }
    if (options_flag(options, "help")) {
        puts("Usage: tandem plan --model DIR [--draft DIR|ngram] [--ranks N] [options]\n"
             "       tandem plan --config FILE\n\n"
             "Prints which ranks could do what, in which mode, how fast that should be, and what\n"
             "tandem serve would choose with the same options. Starts nothing.");
        options_help(stdout, serve_option_rows, n_serve_option_rows);
        options_free(options);
        return 0;
    }
    int result = 2;
    if (serve_options_check(options, &err) == STATUS_OK) {
        become_coordinator(options, &err);
        result = 1;
    }
    fprintf(stderr, "tandem plan: %s\n", err.text);
    options_free(options);
    return result;
}
