/* Options: one table per program, one row per option, read from the command line and from a YAML
 * file with the same names.
 *
 * A row says everything about its option: name, type, range, default, and the words of --help.
 * Values are checked against their row when they are read, so that getters cannot fail. Whatever is
 * unknown, doubled or out of range is an error that names where it stands. The command line wins
 * over the file named by --config. Used while starting, by one thread. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "common/error.h"

enum options_type {
    OPTIONS_FLAG,    /* --name; in YAML true or false */
    OPTIONS_TEXT,
    OPTIONS_CHOICE,  /* one of `choices` */
    OPTIONS_COUNT,   /* whole number >= 0; suffixes k, m, g multiply by powers of 1024 */
    OPTIONS_REAL,
    OPTIONS_LIST,    /* text, may be repeated; in YAML a scalar or a sequence of scalars */
};

/* Tables are constants; every pointer is borrowed for the life of the program. */
struct options_row {
    const char *name;        /* without the dashes */
    enum options_type type;
    const char *group;       /* heading in --help; rows of a group stand together */
    const char *value;       /* what --help calls the value: "DIR"; NULL for flags */
    const char *help;        /* one sentence, may be long: it is folded */
    const char *initial;     /* the default as text; NULL: none */
    double low, high;        /* COUNT, REAL: both ends included; equal: not checked */
    const char *choices;     /* CHOICE: "bf16|int8" */
    bool command_line_only;  /* not allowed in a file (--config itself, --help) */
};

struct options;

/* Reads argv[1 ..] and, when the table has a row "config" and it is given, that YAML file.
 * INVALID_ARGUMENT: unknown or doubled option, missing value, value outside its row; NOT_FOUND: no
 * such file. The caller frees `*out` with options_free; on failure it is NULL. */
enum status options_parse(struct options **out, const struct options_row *rows, size_t n_rows,
                          int argc, char **argv, struct error *err);
void options_free(struct options *options);

/* The value, or the row's default. Naming an option that has no row, or one of another type, is a
 * CHECK. Text is borrowed from the options; NULL: no value and no default. */
bool options_flag(const struct options *options, const char *name);
const char *options_text(const struct options *options, const char *name);  /* TEXT and CHOICE */
uint64_t options_count(const struct options *options, const char *name);    /* 0: no value */
double options_real(const struct options *options, const char *name);       /* 0: no value */

/* The values of a LIST, in the order given. */
size_t options_list(const struct options *options, const char *name, char *const **items);

/* Whether a value was given (a default does not count). */
bool options_given(const struct options *options, const char *name);

/* Prints the rows by group, folded to 80 columns, with ranges and defaults. */
void options_help(FILE *out, const struct options_row *rows, size_t n_rows);
