#include "common/options.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#define HELP_COLUMN 30
#define HELP_WIDTH 80

struct value {
    char **items;
    size_t n_items;
    bool from_file;
};

struct options {
    const struct options_row *rows;
    size_t n_rows;
    struct value *values;  /* [n_rows] */
};

/* ---- values ---------------------------------------------------------------------------------- */

/* Whole text as a number with an optional suffix; false: it is none. */
static bool parse_count(uint64_t *out, const char *text) {
    if (text[0] < '0' || text[0] > '9') return false;
    char *end;
    errno = 0;
    uint64_t number = strtoull(text, &end, 10);
    if (errno != 0) return false;
    int shift = 0;
    switch (*end | 32) {
    case 'k': shift = 10; break;
    case 'm': shift = 20; break;
    case 'g': shift = 30; break;
    default: break;
    }
    if (shift > 0) end++;
    if (*end != '\0' || number > UINT64_MAX >> shift) return false;
    *out = number << shift;
    return true;
}

static bool parse_real(double *out, const char *text) {
    char *end;
    *out = strtod(text, &end);
    return end != text && *end == '\0' && isfinite(*out);
}

static bool is_choice(const char *choices, const char *text) {
    size_t length = strlen(text);
    for (const char *at = choices; at != NULL && *at != '\0';) {
        size_t n = strcspn(at, "|");
        if (n == length && memcmp(at, text, n) == 0) return true;
        at += n + (at[n] == '|');
    }
    return false;
}

static bool in_range(const struct options_row *row, double value) {
    return row->low == row->high || (value >= row->low && value <= row->high);
}

/* `where` is "--port" or "serve.yaml:3: port". */
static enum status check_value(const struct options_row *row, const char *where, const char *text,
                               struct error *err) {
    uint64_t count = 0;
    double real = 0;
    switch (row->type) {
    case OPTIONS_FLAG:
        if (is_choice("true|false", text)) return STATUS_OK;
        return error_set(err, STATUS_INVALID_ARGUMENT, "%s is \"%s\"; expected true or false",
                         where, text);
    case OPTIONS_CHOICE:
        if (is_choice(row->choices, text)) return STATUS_OK;
        return error_set(err, STATUS_INVALID_ARGUMENT, "%s is \"%s\"; expected one of %s", where,
                         text, row->choices);
    case OPTIONS_COUNT:
        if (parse_count(&count, text) && in_range(row, (double)count)) return STATUS_OK;
        break;
    case OPTIONS_REAL:
        if (parse_real(&real, text) && in_range(row, real)) return STATUS_OK;
        break;
    case OPTIONS_TEXT:
    case OPTIONS_LIST: return STATUS_OK;
    }
    const char *kind = row->type == OPTIONS_COUNT ? "a whole number" : "a number";
    if (row->low == row->high) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "%s is \"%s\"; expected %s", where, text,
                         kind);
    }
    return error_set(err, STATUS_INVALID_ARGUMENT, "%s is \"%s\"; expected %s from %.15g to %.15g",
                     where, text, kind, row->low, row->high);
}

static void value_clear(struct value *value) {
    for (size_t i = 0; i < value->n_items; i++) free(value->items[i]);
    free(value->items);
    *value = (struct value){0};
}

static void value_add(struct value *value, const char *text) {
    value->items = xrealloc(value->items, (value->n_items + 1) * sizeof *value->items);
    value->items[value->n_items++] = xstrdup(text);
}

static int find_row(const struct options_row *rows, size_t n_rows, const char *name,
                    size_t length) {
    for (size_t i = 0; i < n_rows; i++) {
        if (strlen(rows[i].name) == length && memcmp(rows[i].name, name, length) == 0) {
            return (int)i;
        }
    }
    return -1;
}

/* ---- the command line ------------------------------------------------------------------------ */

/* Reads the option at argv[*i] and moves *i past it. */
static enum status read_argument(struct options *options, int *i, int argc, char **argv,
                                 struct error *err) {
    const char *word = argv[*i];
    if (strncmp(word, "--", 2) != 0 || word[2] == '\0') {
        return error_set(err, STATUS_INVALID_ARGUMENT, "unexpected argument \"%s\"", word);
    }
    size_t length = strcspn(word + 2, "=");
    const char *text = word[2 + length] == '=' ? word + 2 + length + 1 : NULL;
    int index = find_row(options->rows, options->n_rows, word + 2, length);
    if (index < 0) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "unknown option --%.*s", (int)length,
                         word + 2);
    }
    const struct options_row *row = &options->rows[index];
    if (row->type == OPTIONS_FLAG && text == NULL) text = "true";
    if (text == NULL) {
        if (++*i >= argc) {
            return error_set(err, STATUS_INVALID_ARGUMENT, "--%s needs a value: %s", row->name,
                             row->value);
        }
        text = argv[*i];
    }
    ++*i;
    char where[80];
    snprintf(where, sizeof where, "--%s", row->name);
    struct value *value = &options->values[index];
    if (value->n_items > 0 && row->type != OPTIONS_LIST) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "%s is given twice", where);
    }
    TRY(check_value(row, where, text, err));
    value_add(value, text);
    return STATUS_OK;
}

/* ---- the YAML file --------------------------------------------------------------------------- */

static enum status read_items(struct options *options, int index, yaml_document_t *document,
                              const yaml_node_t *node, const char *where, struct error *err) {
    const struct options_row *row = &options->rows[index];
    struct value read = {.from_file = true};
    enum status status = STATUS_OK;
    if (node->type == YAML_SCALAR_NODE) {
        const char *text = (const char *)node->data.scalar.value;
        if (strlen(text) != node->data.scalar.length) {
            return error_set(err, STATUS_INVALID_ARGUMENT, "%s holds a NUL character", where);
        }
        TRY(check_value(row, where, text, err));
        value_add(&read, text);
    } else if (node->type == YAML_SEQUENCE_NODE && row->type == OPTIONS_LIST) {
        for (yaml_node_item_t *item = node->data.sequence.items.start;
             item < node->data.sequence.items.top && status == STATUS_OK; item++) {
            const yaml_node_t *entry = yaml_document_get_node(document, *item);
            if (entry->type != YAML_SCALAR_NODE) {
                status = error_set(err, STATUS_INVALID_ARGUMENT, "%s: expected plain values in "
                                   "the list", where);
            } else {
                value_add(&read, (const char *)entry->data.scalar.value);
            }
        }
    } else {
        status = error_set(err, STATUS_INVALID_ARGUMENT, "%s: expected %s", where,
                           row->type == OPTIONS_LIST ? "a value or a list" : "one plain value");
    }
    /* The command line wins. */
    if (status == STATUS_OK && options->values[index].n_items == 0) {
        options->values[index] = read;
    } else {
        value_clear(&read);
    }
    return status;
}

static enum status read_pair(struct options *options, bool *seen, yaml_document_t *document,
                             const yaml_node_pair_t *pair, const char *path, struct error *err) {
    const yaml_node_t *key = yaml_document_get_node(document, pair->key);
    size_t line = key->start_mark.line + 1;
    if (key->type != YAML_SCALAR_NODE) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "%s:%zu: expected an option's name", path,
                         line);
    }
    const char *name = (const char *)key->data.scalar.value;
    int index = find_row(options->rows, options->n_rows, name, strlen(name));
    if (index < 0 || options->rows[index].command_line_only) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "%s:%zu: %s \"%s\"", path, line,
                         index < 0 ? "unknown option" : "only the command line may have", name);
    }
    if (seen[index]) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "%s:%zu: \"%s\" is given twice", path, line,
                         name);
    }
    seen[index] = true;
    char where[400];
    snprintf(where, sizeof where, "%s:%zu: %s", path, line, name);
    return read_items(options, index, document, yaml_document_get_node(document, pair->value),
                      where, err);
}

static enum status read_document(struct options *options, yaml_document_t *document,
                                 const char *path, struct error *err) {
    const yaml_node_t *root = yaml_document_get_root_node(document);
    if (root == NULL) return STATUS_OK;   /* an empty file says nothing */
    if (root->type != YAML_MAPPING_NODE) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "%s: expected lines \"option: value\"",
                         path);
    }
    bool *seen = xcalloc(options->n_rows, sizeof *seen);
    enum status status = STATUS_OK;
    for (yaml_node_pair_t *pair = root->data.mapping.pairs.start;
         pair < root->data.mapping.pairs.top && status == STATUS_OK; pair++) {
        status = read_pair(options, seen, document, pair, path, err);
    }
    free(seen);
    return status;
}

static enum status read_file(struct options *options, const char *path, struct error *err) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        return error_set(err, STATUS_NOT_FOUND, "--config %s: %s", path, strerror(errno));
    }
    yaml_parser_t parser;
    yaml_document_t document;
    CHECK(yaml_parser_initialize(&parser));
    yaml_parser_set_input_file(&parser, file);
    enum status status;
    if (yaml_parser_load(&parser, &document)) {
        status = read_document(options, &document, path, err);
        yaml_document_delete(&document);
    } else {
        status = error_set(err, STATUS_INVALID_ARGUMENT, "%s:%zu: not YAML: %s", path,
                           parser.problem_mark.line + 1,
                           parser.problem != NULL ? parser.problem : "unreadable");
    }
    yaml_parser_delete(&parser);
    fclose(file);
    return status;
}

/* ---- the whole ------------------------------------------------------------------------------- */

enum status options_parse(struct options **out, const struct options_row *rows, size_t n_rows,
                          int argc, char **argv, struct error *err) {
    struct options *options = xcalloc(1, sizeof *options);
    options->rows = rows;
    options->n_rows = n_rows;
    options->values = xcalloc(n_rows, sizeof *options->values);
    *out = NULL;
    enum status status = STATUS_OK;
    for (int i = 1; i < argc && status == STATUS_OK;) {
        status = read_argument(options, &i, argc, argv, err);
    }
    int config = find_row(rows, n_rows, "config", strlen("config"));
    if (status == STATUS_OK && config >= 0 && options->values[config].n_items > 0) {
        status = read_file(options, options->values[config].items[0], err);
    }
    if (status != STATUS_OK) {
        options_free(options);
        return status;
    }
    *out = options;
    return STATUS_OK;
}

void options_free(struct options *options) {
    if (options == NULL) return;
    for (size_t i = 0; i < options->n_rows; i++) value_clear(&options->values[i]);
    free(options->values);
    free(options);
}

static size_t row_of(const struct options *options, const char *name) {
    int index = find_row(options->rows, options->n_rows, name, strlen(name));
    CHECK(index >= 0);
    return (size_t)index;
}

static const char *text_of(const struct options *options, size_t index) {
    const struct value *value = &options->values[index];
    return value->n_items > 0 ? value->items[0] : options->rows[index].initial;
}

bool options_flag(const struct options *options, const char *name) {
    size_t index = row_of(options, name);
    CHECK(options->rows[index].type == OPTIONS_FLAG);
    const char *text = text_of(options, index);
    return text != NULL && strcmp(text, "true") == 0;
}

const char *options_text(const struct options *options, const char *name) {
    size_t index = row_of(options, name);
    CHECK(options->rows[index].type == OPTIONS_TEXT || options->rows[index].type == OPTIONS_CHOICE);
    return text_of(options, index);
}

uint64_t options_count(const struct options *options, const char *name) {
    size_t index = row_of(options, name);
    CHECK(options->rows[index].type == OPTIONS_COUNT);
    const char *text = text_of(options, index);
    uint64_t count = 0;
    if (text != NULL) CHECK(parse_count(&count, text));
    return count;
}

double options_real(const struct options *options, const char *name) {
    size_t index = row_of(options, name);
    CHECK(options->rows[index].type == OPTIONS_REAL);
    const char *text = text_of(options, index);
    double real = 0;
    if (text != NULL) CHECK(parse_real(&real, text));
    return real;
}

size_t options_list(const struct options *options, const char *name, char *const **items) {
    size_t index = row_of(options, name);
    CHECK(options->rows[index].type == OPTIONS_LIST);
    *items = options->values[index].items;
    return options->values[index].n_items;
}

bool options_given(const struct options *options, const char *name) {
    return options->values[row_of(options, name)].n_items > 0;
}

/* ---- help ------------------------------------------------------------------------------------ */

/* Prints words from column HELP_COLUMN on, folded. */
static void print_folded(FILE *out, const char *text) {
    int column = HELP_COLUMN;
    while (*text != '\0') {
        int n = (int)strcspn(text, " ");
        if (column + n > HELP_WIDTH && column > HELP_COLUMN) {
            fprintf(out, "\n%*s", HELP_COLUMN, "");
            column = HELP_COLUMN;
        }
        fprintf(out, "%.*s", n, text);
        column += n;
        text += n;
        if (*text == ' ') {
            text++;
            if (column < HELP_WIDTH) fputc(' ', out);
            column++;
        }
    }
    fputc('\n', out);
}

static void print_row(FILE *out, const struct options_row *row) {
    char left[160], right[1024];
    const char *value = row->type == OPTIONS_CHOICE ? row->choices : row->value;
    int n = snprintf(left, sizeof left, "  --%s%s%s", row->name, value != NULL ? " " : "",
                     value != NULL ? value : "");
    fputs(left, out);
    if (n + 2 > HELP_COLUMN) fprintf(out, "\n%*s", HELP_COLUMN, "");
    else fprintf(out, "%*s", HELP_COLUMN - n, "");
    n = snprintf(right, sizeof right, "%s", row->help);
    if (row->low != row->high) {
        n += snprintf(right + n, sizeof right - (size_t)n, "; %.15g to %.15g", row->low, row->high);
    }
    if (row->type == OPTIONS_LIST) {
        n += snprintf(right + n, sizeof right - (size_t)n, "; may be repeated");
    }
    if (row->initial != NULL && row->type != OPTIONS_FLAG) {
        snprintf(right + n, sizeof right - (size_t)n, " (%s)", row->initial);
    }
    print_folded(out, right);
}

void options_help(FILE *out, const struct options_row *rows, size_t n_rows) {
    for (size_t i = 0; i < n_rows; i++) {
        if (i == 0 || strcmp(rows[i].group, rows[i - 1].group) != 0) {
            fprintf(out, "\n%s\n", rows[i].group);
        }
        print_row(out, &rows[i]);
    }
}
