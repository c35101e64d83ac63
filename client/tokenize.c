#include "client/tokenize.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/options.h"
#include "model/chat.h"
#include "model/tokenizer.h"

static const struct options_row rows[] = {
    {.name = "tokenizer", .type = OPTIONS_TEXT, .group = "Input", .value = "DIR",
     .help = "Hugging Face folder with tokenizer.json"},
    {.name = "input", .type = OPTIONS_TEXT, .group = "Input", .value = "FILE", .initial = "-",
     .help = "lines of JSON, {\"text\": ...}; - is standard input"},
    {.name = "chat", .type = OPTIONS_FLAG, .group = "Input",
     .help = "lines are {\"messages\": [...], \"add_generation_prompt\": ...} and are rendered by the "
             "model's chat format"},
    {.name = "no-special", .type = OPTIONS_FLAG, .group = "Input",
     .help = "add no BOS or EOS; special tokens spelled in the text are recognised all the same"},
    {.name = "help", .type = OPTIONS_FLAG, .group = "Help", .help = "this text",
     .command_line_only = true},
};
enum { N_ROWS = sizeof rows / sizeof *rows, MAX_MESSAGES = 4096 };

struct job {
    const struct tokenizer *tokenizer;
    const struct chat *chat; /* NULL: lines of text */
    bool add_special;
    const char *input;
    long line_i;
};

static enum status bad_line(const struct job *job, const char *expected, struct error *err) {
    return error_set(err, STATUS_INVALID_ARGUMENT, "%s, line %ld: expected %s", job->input, job->line_i,
                     expected);
}

/* Rendered chats bring their own BOS. */
static enum status render(const struct job *job, const json_t *line, char **text,
                          struct error *err) {
    static const char shape[] = "{\"messages\": [{\"role\": ..., \"content\": ...}, ...]}";
    const json_t *array = json_object_get(line, "messages");
    size_t n = json_array_size(array);
    if (!json_is_array(array) || n > MAX_MESSAGES) return bad_line(job, shape, err);
    struct chat_message *messages = xcalloc(n, sizeof *messages);
    enum status status = STATUS_OK;
    for (size_t i = 0; i < n && status == STATUS_OK; i++) {
        const json_t *message = json_array_get(array, i);
        messages[i].role = json_string_value(json_object_get(message, "role"));
        messages[i].content = json_string_value(json_object_get(message, "content"));
        if (messages[i].role == NULL || messages[i].content == NULL) {
            status = bad_line(job, shape, err);
        }
    }
    if (status == STATUS_OK) {
        bool generate = json_is_true(json_object_get(line, "add_generation_prompt"));
        status = chat_render(job->chat, messages, n, generate, text, err);
    }
    free(messages);
    return status;
}

static void print_ids(const struct token_list *list, const char *rendered) {
    json_t *ids = json_array();
    for (size_t i = 0; i < list->n; i++) json_array_append_new(ids, json_integer(list->ids[i]));
    json_t *out = json_object();
    if (rendered != NULL) json_object_set_new(out, "text", json_string(rendered));
    json_object_set_new(out, "ids", ids);
    json_dumpf(out, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(out);
}

static enum status tokenize_line(const struct job *job, const json_t *line, struct error *err) {
    char *rendered = NULL;
    const json_t *given = json_object_get(line, "text");
    const char *text = json_string_value(given);
    size_t n = json_string_length(given);
    if (job->chat != NULL) {
        TRY(render(job, line, &rendered, err));
        text = rendered;
        n = strlen(rendered);
    } else if (text == NULL) {
        return bad_line(job, "{\"text\": ...}", err);
    }
    struct token_list list = {0};
    bool add_special = job->add_special && rendered == NULL;
    enum status status = tokenizer_encode(job->tokenizer, &list, text, n, add_special, err);
    if (status == STATUS_OK) print_ids(&list, rendered);
    token_list_free(&list);
    free(rendered);
    return status;
}

static enum status tokenize_file(struct job *job, FILE *file, struct error *err) {
    char *line = NULL;
    size_t capacity = 0;
    enum status status = STATUS_OK;
    for (ssize_t n; status == STATUS_OK && (n = getline(&line, &capacity, file)) > 0;) {
        job->line_i++;
        json_error_t reason;
        json_t *json = json_loadb(line, (size_t)n, JSON_ALLOW_NUL, &reason);
        status = json != NULL ? tokenize_line(job, json, err)
                              : error_set(err, STATUS_INVALID_ARGUMENT, "%s, line %ld: %s", job->input,
                                          job->line_i, reason.text);
        json_decref(json);
    }
    free(line);
    return status;
}

static enum status run(const struct options *options, struct error *err) {
    const char *dir = options_text(options, "tokenizer");
    const char *input = options_text(options, "input");
    if (dir == NULL) {
        return error_set(err, STATUS_INVALID_ARGUMENT, "--tokenizer DIR is required");
    }
    struct tokenizer *tokenizer = NULL;
    struct chat *chat = NULL;
    FILE *file = strcmp(input, "-") == 0 ? stdin : fopen(input, "r");
    if (file == NULL) return error_set(err, STATUS_NOT_FOUND, "--input %s cannot be read", input);
    enum status status = tokenizer_load(&tokenizer, dir, err);
    if (status == STATUS_OK && options_flag(options, "chat")) status = chat_load(&chat, dir, err);
    if (status == STATUS_OK) {
        struct job job = {tokenizer, chat, !options_flag(options, "no-special"), input, 0};
        status = tokenize_file(&job, file, err);
    }
    chat_free(chat);
    tokenizer_free(tokenizer);
    if (file != stdin) fclose(file);
    return status;
}

int client_tokenize(int argc, char **argv) {
    struct options *options;
    struct error err;
    if (options_parse(&options, rows, N_ROWS, argc, argv, &err) != STATUS_OK) {
        fprintf(stderr, "tandem tokenize: %s\n", err.text);
        return 2;
    }
    enum status status = STATUS_OK;
    if (options_flag(options, "help")) {
        puts("usage: tandem tokenize --tokenizer DIR [--chat] [--no-special] [--input FILE.jsonl]\n\n"
             "Prints one line {\"ids\": [...]} for each line of the input (chats: {\"text\", \"ids\"}).\n");
        options_help(stdout, rows, N_ROWS);
    } else {
        status = run(options, &err);
    }
    options_free(options);
    if (status == STATUS_OK) return 0;
    fprintf(stderr, "tandem tokenize: %s\n", err.text);
    return 1;
}
