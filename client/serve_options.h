/* The options of a server, one table for the commands that know it: `tandem serve`, which starts one,
 * and `tandem plan`, which says what it would be. Both read the same YAML file. */
#pragma once
#include "common/options.h"

extern const struct options_row serve_option_rows[];
extern const size_t n_serve_option_rows;

/* The words of a command line for exec. */
enum { ARGUMENTS_MAX = 112, ARGUMENT_BYTES = 4352 };
struct arguments {
    char words[ARGUMENTS_MAX][ARGUMENT_BYTES];
    int n;
};

void arguments_add(struct arguments *arguments, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Replaces this process by the program words[0]; returns only where that fails, with errno. */
void arguments_exec(const struct arguments *arguments);

/* Adds what tandem-coordinator is to know of model, drafter, machine and limits: everything that is
 * given. */
void serve_options_add(struct arguments *arguments, const struct options *options);

/* INVALID_ARGUMENT: no model, or a degree that is none. */
enum status serve_options_check(const struct options *options, struct error *err);

/* The folder of this program, where its siblings are. */
enum status serve_options_folder(char *out, size_t size, struct error *err);
