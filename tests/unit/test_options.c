/* common/options: command line, YAML, ranges, words of the errors. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/options.h"
#include "tests/unit/test.h"

static const struct options_row rows[] = {
    {.name = "model", .type = OPTIONS_TEXT, .group = "A", .value = "DIR", .help = "folder"},
    {.name = "port", .type = OPTIONS_COUNT, .group = "A", .value = "P", .help = "port",
     .initial = "50051", .low = 0, .high = 65535},
    {.name = "budget", .type = OPTIONS_COUNT, .group = "A", .value = "BYTES", .help = "memory"},
    {.name = "heat", .type = OPTIONS_REAL, .group = "B", .value = "X", .help = "how warm",
     .low = -2, .high = 2},
    {.name = "weights", .type = OPTIONS_CHOICE, .group = "B", .help = "format",
     .choices = "bf16|int8", .initial = "bf16"},
    {.name = "quiet", .type = OPTIONS_FLAG, .group = "B", .help = "says less"},
    {.name = "stop", .type = OPTIONS_LIST, .group = "B", .value = "S", .help = "end there"},
    {.name = "config", .type = OPTIONS_TEXT, .group = "C", .value = "FILE", .help = "YAML",
     .command_line_only = true},
};
#define N_ROWS (sizeof rows / sizeof *rows)
#define COUNT_OF(array) ((int)(sizeof(array) / sizeof *(array)))

static enum status parse(struct options **out, int argc, const char **argv, struct error *err) {
    return options_parse(out, rows, N_ROWS, argc, (char **)argv, err);
}

/* One refused command line and a part of the words. */
static void refuse(int argc, const char **argv, const char *words) {
    struct options *options;
    struct error err = {0};
    cr_assert(parse(&options, argc, argv, &err) != STATUS_OK);
    cr_assert(options == NULL);
    cr_assert(strstr(err.text, words) != NULL, "expected \"%s\" in \"%s\"", words, err.text);
}

Test(options, values_and_defaults) {
    const char *argv[] = {"p", "--model", "a b", "--budget=3k", "--heat", "-1.5", "--quiet",
                          "--stop", "x", "--stop", ""};
    struct options *options;
    struct error err;
    cr_assert(parse(&options, COUNT_OF(argv), argv, &err) == STATUS_OK, "%s", err.text);
    cr_assert(strcmp(options_text(options, "model"), "a b") == 0);
    cr_assert(options_count(options, "port") == 50051 && !options_given(options, "port"));
    cr_assert(options_count(options, "budget") == 3072 && options_given(options, "budget"));
    cr_assert(options_real(options, "heat") == -1.5);
    cr_assert(strcmp(options_text(options, "weights"), "bf16") == 0);
    cr_assert(options_flag(options, "quiet"));
    char *const *items;
    cr_assert(options_list(options, "stop", &items) == 2);
    cr_assert(strcmp(items[0], "x") == 0 && strcmp(items[1], "") == 0);
    options_free(options);
}

Test(options, refusals_name_the_option) {
    refuse(2, (const char *[]){"p", "--draft"}, "unknown option --draft");
    refuse(2, (const char *[]){"p", "stray"}, "unexpected argument \"stray\"");
    refuse(2, (const char *[]){"p", "--model"}, "--model needs a value: DIR");
    refuse(3, (const char *[]){"p", "--port", "65536"}, "from 0 to 65535");
    refuse(3, (const char *[]){"p", "--port", "-1"}, "a whole number");
    refuse(3, (const char *[]){"p", "--port", "12x"}, "--port is \"12x\"");
    refuse(3, (const char *[]){"p", "--budget", "99999999999g"}, "a whole number");
    refuse(3, (const char *[]){"p", "--heat", "nan"}, "from -2 to 2");
    refuse(3, (const char *[]){"p", "--weights", "bf"}, "bf16|int8");
    refuse(5, (const char *[]){"p", "--port", "1", "--port", "2"}, "given twice");
    refuse(3, (const char *[]){"p", "--config", "/nonexistent/x.yaml"}, "/nonexistent/x.yaml");
}

/* Parses a YAML text through a file; `port` on the command line too when not NULL. */
static enum status parse_yaml(struct options **out, const char *text, const char *port,
                              struct error *err) {
    char path[] = "/tmp/tandem_options_XXXXXX";
    int file = mkstemp(path);
    cr_assert(file >= 0 && write(file, text, strlen(text)) == (ssize_t)strlen(text));
    close(file);
    const char *argv[] = {"p", "--config", path, "--port", port};
    enum status status = parse(out, port != NULL ? 5 : 3, argv, err);
    unlink(path);
    return status;
}

static void refuse_yaml(const char *text, const char *words) {
    struct options *options;
    struct error err = {0};
    cr_assert(parse_yaml(&options, text, NULL, &err) != STATUS_OK, "accepted: %s", text);
    cr_assert(strstr(err.text, words) != NULL, "expected \"%s\" in \"%s\"", words, err.text);
}

Test(options, yaml_has_the_same_names) {
    struct options *options;
    struct error err;
    const char *text = "model: here\nport: 7\nquiet: true\nstop: [a, 'b c']\nheat: 0.5 # x\n";
    cr_assert(parse_yaml(&options, text, "9", &err) == STATUS_OK, "%s", err.text);
    cr_assert(strcmp(options_text(options, "model"), "here") == 0);
    cr_assert(options_count(options, "port") == 9);   /* the command line wins */
    cr_assert(options_flag(options, "quiet") && options_real(options, "heat") == 0.5);
    char *const *items;
    cr_assert(options_list(options, "stop", &items) == 2 && strcmp(items[1], "b c") == 0);
    options_free(options);
    cr_assert(parse_yaml(&options, "", NULL, &err) == STATUS_OK);
    options_free(options);
}

Test(options, yaml_errors_name_line_and_key) {
    refuse_yaml("model: x\ndraft: y\n", ":2: unknown option \"draft\"");
    refuse_yaml("port: 1\nmodel: x\nport: 2\n", ":3: \"port\" is given twice");
    refuse_yaml("port: 70000\n", ":1: port is \"70000\"");
    refuse_yaml("model: [a, b]\n", "expected one plain value");
    refuse_yaml("stop: [a, [b]]\n", "plain values");
    refuse_yaml("quiet: maybe\n", "true or false");
    refuse_yaml("config: other.yaml\n", "only the command line");
    refuse_yaml("- model\n", "option: value");
    refuse_yaml("model: 'x\n", "not YAML");
    refuse_yaml("? [a]\n: b\n", "option's name");
}

Test(options, help_shows_every_row) {
    char text[4096] = {0};
    FILE *out = fmemopen(text, sizeof text - 1, "w");
    options_help(out, rows, N_ROWS);
    fclose(out);
    for (size_t i = 0; i < N_ROWS; i++) {
        cr_assert(strstr(text, rows[i].name) != NULL, "%s is missing", rows[i].name);
    }
    cr_assert(strstr(text, "port; 0 to 65535 (50051)") != NULL, "%s", text);
    cr_assert(strstr(text, "bf16|int8") != NULL);
}
