/* Chat formats of the known families, recognised by what their templates contain. */
#include "model/chat.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/json.h"

struct chat {
    enum chat_format format;
    char *bos, *eos;
    char *default_system; /* CHATML: what stands in when there is no system message; NULL: nothing */
    char *knowledge;      /* LLAMA3: lines that open the system message; NULL: none */
    bool trims;           /* LLAMA3, ZEPHYR: contents lose the white space around them */
    bool begins_with_bos;
    char beginning[64];   /* of an unknown template, for the error */
};

static const char *const format_names[] = {"none",   "unknown", "llama2", "llama3",
                                           "chatml", "mistral", "zephyr"};

const char *chat_format_name(enum chat_format format) {
    return format_names[format];
}

enum chat_format chat_format(const struct chat *chat) {
    return chat->format;
}

static bool has(const char *template, const char *part) {
    return strstr(template, part) != NULL;
}

static enum chat_format recognise(const char *template) {
    if (has(template, "<|start_header_id|>") && has(template, "<|eot_id|>")) return CHAT_LLAMA3;
    if (has(template, "<|im_start|>") && has(template, "<|im_end|>")) return CHAT_CHATML;
    if (has(template, "[INST]")) return has(template, "<<SYS>>") ? CHAT_LLAMA2 : CHAT_MISTRAL;
    if (has(template, "<|user|>") && has(template, "<|assistant|>") && has(template, "eos_token")) {
        return CHAT_ZEPHYR;
    }
    return CHAT_UNKNOWN;
}

/* The literal between `before` and `after`, copied; NULL when there is none. */
static char *literal(const char *template, const char *before, const char *after) {
    const char *begin = strstr(template, before);
    if (begin == NULL) return NULL;
    begin += strlen(before);
    const char *end = strstr(begin, after);
    return end ? strndup(begin, (size_t)(end - begin)) : NULL;
}

/* Templates of Llama 3.1 and later open with dates. "Today" is the template's own fallback: a prompt
 * must not render to another text tomorrow. */
static char *knowledge_lines(const char *template) {
    if (!has(template, "Cutting Knowledge Date: December 2023")) return NULL;
    char *date = literal(template, "set date_string = \"", "\"");
    char *lines = NULL;
    if (asprintf(&lines, "Cutting Knowledge Date: December 2023\nToday Date: %s\n\n",
                 date ? date : "26 Jul 2024") < 0) {
        lines = NULL;
    }
    free(date);
    return lines;
}

static void choose(struct chat *chat, const char *template) {
    chat->format = recognise(template);
    snprintf(chat->beginning, sizeof chat->beginning, "%.60s", template);
    chat->trims = has(template, "trim");
    chat->begins_with_bos = has(template, "bos_token");
    if (chat->format == CHAT_LLAMA3) chat->knowledge = knowledge_lines(template);
    if (chat->format == CHAT_CHATML) {
        chat->default_system = literal(template, "'<|im_start|>system\\n", "<|im_end|>\\n' }}");
        /* The first such literal is "system\n' + messages…" in some templates: not text. */
        if (chat->default_system != NULL && strchr(chat->default_system, '\'') != NULL) {
            char *rest = strstr(template, "<|im_start|>system\\n") + 1;
            free(chat->default_system);
            chat->default_system = NULL;
            for (; (rest = strstr(rest, "'<|im_start|>system\\n")) != NULL; rest++) {
                char *found = literal(rest, "'<|im_start|>system\\n", "<|im_end|>\\n' }}");
                if (found != NULL && strchr(found, '\'') == NULL) {
                    chat->default_system = found;
                    break;
                }
                free(found);
            }
        }
    }
}

/* A special token's spelling: a string, or an object with `content`. */
static char *spelling(const json_t *config, const char *field) {
    const json_t *token = json_object_get(config, field);
    if (json_is_object(token)) token = json_object_get(token, "content");
    return xstrdup(json_is_string(token) ? json_string_value(token) : "");
}

/* chat_template: a string, or a list of {name, template} of which "default" counts. */
static const char *template_of(const json_t *config) {
    const json_t *template = json_object_get(config, "chat_template");
    if (json_is_string(template)) return json_string_value(template);
    size_t i;
    json_t *entry;
    json_array_foreach(template, i, entry) {
        const char *name = json_string_value(json_object_get(entry, "name"));
        if (name != NULL && strcmp(name, "default") == 0) {
            return json_string_value(json_object_get(entry, "template"));
        }
    }
    return NULL;
}

enum { MAX_FILE_BYTES = 64 * 1024 * 1024 };

static enum status read_config(json_t **out, const char *dir, struct error *err) {
    char path[4096];
    char *text;
    size_t n;
    *out = NULL;
    snprintf(path, sizeof path, "%s/tokenizer_config.json", dir);
    enum status status = json_read_file(&text, &n, path, MAX_FILE_BYTES, err);
    if (status == STATUS_NOT_FOUND) return STATUS_OK;
    TRY(status);
    status = json_parse_reals(out, path, text, n, err);
    free(text);
    return status;
}

enum status chat_load(struct chat **out, const char *dir, struct error *err) {
    json_t *config;
    TRY(read_config(&config, dir, err));
    struct chat *chat = xcalloc(1, sizeof *chat);
    chat->bos = spelling(config, "bos_token");
    chat->eos = spelling(config, "eos_token");
    char path[4096];
    char *file = NULL;
    size_t n;
    struct error ignored;
    snprintf(path, sizeof path, "%s/chat_template.jinja", dir);
    if (json_read_file(&file, &n, path, MAX_FILE_BYTES, &ignored) != STATUS_OK) file = NULL;
    const char *template = file ? file : template_of(config);
    if (template != NULL) choose(chat, template);
    free(file);
    json_decref(config);
    *out = chat;
    return STATUS_OK;
}

void chat_free(struct chat *chat) {
    if (chat == NULL) return;
    free(chat->bos);
    free(chat->eos);
    free(chat->default_system);
    free(chat->knowledge);
    free(chat);
}

/* --- rendering ------------------------------------------------------------------------------- */

struct page {
    char *text;
    size_t n;
    FILE *out;
};

static void put(struct page *page, const char *text) {
    fputs(text, page->out);
}

/* Python's str.strip for ASCII white space. */
static void put_content(struct page *page, const struct chat *chat, const char *content) {
    size_t n = strlen(content);
    if (chat->trims) {
        static const char spaces[] = " \t\n\v\f\r";
        while (n > 0 && strchr(spaces, content[0]) != NULL) content++, n--;
        while (n > 0 && strchr(spaces, content[n - 1]) != NULL) n--;
    }
    fwrite(content, 1, n, page->out);
}

static bool is(const struct chat_message *message, const char *role) {
    return strcmp(message->role, role) == 0;
}

static void llama3_turn(struct page *page, const struct chat *chat, const char *role,
                        const char *content) {
    put(page, "<|start_header_id|>");
    put(page, role);
    put(page, "<|end_header_id|>\n\n");
    put_content(page, chat, content);
    put(page, "<|eot_id|>");
}

static void render_llama3(struct page *page, const struct chat *chat,
                          const struct chat_message *messages, size_t n, bool generate) {
    size_t first = 0;
    if (chat->begins_with_bos) put(page, chat->bos);
    if (chat->knowledge != NULL) {
        put(page, "<|start_header_id|>system<|end_header_id|>\n\n");
        put(page, chat->knowledge);
        if (n > 0 && is(&messages[0], "system")) put_content(page, chat, messages[first++].content);
        put(page, "<|eot_id|>");
    }
    for (size_t i = first; i < n; i++) {
        llama3_turn(page, chat, messages[i].role, messages[i].content);
    }
    if (generate) put(page, "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

static void render_chatml(struct page *page, const struct chat *chat,
                          const struct chat_message *messages, size_t n, bool generate) {
    bool has_system = n > 0 && is(&messages[0], "system");
    if (!has_system && chat->default_system != NULL) {
        put(page, "<|im_start|>system\n");
        put(page, chat->default_system);
        put(page, "<|im_end|>\n");
    }
    for (size_t i = 0; i < n; i++) {
        put(page, "<|im_start|>");
        put(page, messages[i].role);
        put(page, "\n");
        put_content(page, chat, messages[i].content);
        put(page, "<|im_end|>\n");
    }
    if (generate) put(page, "<|im_start|>assistant\n");
}

static void render_zephyr(struct page *page, const struct chat *chat,
                          const struct chat_message *messages, size_t n, bool generate) {
    for (size_t i = 0; i < n; i++) {
        put(page, "<|");
        put(page, messages[i].role);
        put(page, "|>\n");
        put_content(page, chat, messages[i].content);
        put(page, chat->eos);
        put(page, "\n");
    }
    if (generate) put(page, "<|assistant|>\n");
}

/* User and assistant in turn, user first; after an optional system message where `system`. */
static enum status check_turns(const struct chat_message *messages, size_t n, bool system,
                               struct error *err) {
    size_t first = system && n > 0 && is(&messages[0], "system") ? 1 : 0;
    for (size_t i = first; i < n; i++) {
        const char *expected = (i - first) % 2 == 0 ? "user" : "assistant";
        if (is(&messages[i], expected)) continue;
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "messages[%zu].role is \"%.20s\", expected \"%s\": this model's chat format "
                         "wants user and assistant in turn%s", i, messages[i].role, expected,
                         system ? ", after an optional system message" : " and no system message");
    }
    return STATUS_OK;
}

static void render_mistral(struct page *page, const struct chat *chat,
                           const struct chat_message *messages, size_t n) {
    put(page, chat->bos);
    for (size_t i = 0; i < n; i++) {
        bool user = is(&messages[i], "user");
        if (user) put(page, "[INST] ");
        put_content(page, chat, messages[i].content);
        put(page, user ? " [/INST]" : chat->eos);
    }
}

static void render_llama2(struct page *page, const struct chat *chat,
                          const struct chat_message *messages, size_t n) {
    struct chat trimming = *chat;
    trimming.trims = true;
    const char *system = n > 0 && is(&messages[0], "system") ? messages[0].content : NULL;
    for (size_t i = system ? 1 : 0, turn = 0; i < n; i++, turn++) {
        if (is(&messages[i], "assistant")) {
            put(page, " ");
            put_content(page, &trimming, messages[i].content);
            put(page, " ");
            put(page, chat->eos);
            continue;
        }
        put(page, chat->bos);
        put(page, "[INST] ");
        if (turn == 0 && system != NULL) {
            put(page, "<<SYS>>\n");
            put(page, system);
            put(page, "\n<</SYS>>\n\n");
        }
        put_content(page, &trimming, messages[i].content);
        put(page, " [/INST]");
    }
}

static enum status check_roles(const struct chat_message *messages, size_t n, struct error *err) {
    for (size_t i = 0; i < n; i++) {
        const struct chat_message *m = &messages[i];
        if (is(m, "system") || is(m, "user") || is(m, "assistant")) continue;
        return error_set(err, STATUS_INVALID_ARGUMENT,
                         "messages[%zu].role is \"%.20s\", expected system, user or assistant", i,
                         m->role);
    }
    if (n > 0) return STATUS_OK;
    return error_set(err, STATUS_INVALID_ARGUMENT, "messages is empty, expected at least one");
}

static enum status check_format(const struct chat *chat, struct error *err) {
    if (chat->format == CHAT_NONE) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "this model has no chat template; send a raw prompt (text or tokens)");
    }
    if (chat->format == CHAT_UNKNOWN) {
        return error_set(err, STATUS_FAILED_PRECONDITION,
                         "this model's chat template is none of llama2, llama3, chatml, mistral, zephyr "
                         "(it begins \"%s\"); send a raw prompt (text or tokens)", chat->beginning);
    }
    return STATUS_OK;
}

enum status chat_render(const struct chat *chat, const struct chat_message *messages,
                        size_t n_messages, bool add_generation_prompt, char **text,
                        struct error *err) {
    TRY(check_format(chat, err));
    TRY(check_roles(messages, n_messages, err));
    if (chat->format == CHAT_MISTRAL) TRY(check_turns(messages, n_messages, false, err));
    if (chat->format == CHAT_LLAMA2) TRY(check_turns(messages, n_messages, true, err));
    struct page page = {0};
    page.out = open_memstream(&page.text, &page.n);
    CHECK(page.out != NULL);
    switch (chat->format) {
    case CHAT_LLAMA3:
        render_llama3(&page, chat, messages, n_messages, add_generation_prompt);
        break;
    case CHAT_CHATML:
        render_chatml(&page, chat, messages, n_messages, add_generation_prompt);
        break;
    case CHAT_ZEPHYR:
        render_zephyr(&page, chat, messages, n_messages, add_generation_prompt);
        break;
    case CHAT_MISTRAL: render_mistral(&page, chat, messages, n_messages); break;
    default: render_llama2(&page, chat, messages, n_messages); break;
    }
    fclose(page.out);
    *text = page.text;
    return STATUS_OK;
}
