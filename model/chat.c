/* Chat formats of the known families, recognised by what their templates contain. */
#include "model/chat.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/json.h"
#include "model/utf8.h"

/* Where a Mistral template puts the system message: in front of a user message. */
enum chat_system { CHAT_SYSTEM_NONE, CHAT_SYSTEM_FIRST, CHAT_SYSTEM_LAST };

struct chat {
    enum chat_format format;
    char *bos, *eos;
    char *default_system; /* CHATML: what stands in when there is no system message; NULL: nothing */
    char *knowledge;      /* LLAMA3: lines that open the system message; NULL: none */
    bool trims;           /* contents lose the white space around them (MISTRAL: answers do) */
    bool begins_with_bos;
    bool drops_thinking;  /* CHATML: answers lose what stands before </think> ... */
    bool keeps_last_thinking; /* ... unless they follow the last question (Qwen3) */
    bool opens_thinking;  /* CHATML: the generation prompt ends with <think> */
    char *open, *close;   /* MISTRAL: around what the user says */
    enum chat_system system;  /* MISTRAL */
    bool space_before_answer, space_after_eos; /* MISTRAL */
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
    bool zephyr = has(template, "<|user|>") && has(template, "<|assistant|>") &&
                  has(template, "eos_token") && !has(template, "<|end|>"); /* that is Phi-3's */
    return zephyr ? CHAT_ZEPHYR : CHAT_UNKNOWN;
}

/* A copy without the escapes of string literals: some folders store a template's newline as itself,
 * others as backslash and n. */
static char *unescape(const char *template) {
    char *text = xmalloc(strlen(template) + 1), *out = text;
    for (const char *in = template; *in != 0; in++) {
        bool escaped = *in == '\\' && in[1] != 0 && strchr("n'\"\\", in[1]) != NULL;
        if (escaped) in++;
        *out++ = escaped && *in == 'n' ? '\n' : *in;
    }
    *out = 0;
    return text;
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

/* The text that stands in for a missing system message: the one system turn that the template writes
 * in full, without an expression in it. */
static char *default_system(const char *template) {
    static const char start[] = "<|im_start|>system\n";
    static const char *const expressions[] = {"' ", "\" ", "'+", "\"+", "{{", "{%"};
    for (const char *at = template; (at = strstr(at, start)) != NULL; at++) {
        char *text = literal(at, start, "<|im_end|>");
        bool plain = text != NULL && *text != 0;
        for (size_t i = 0; i < sizeof expressions / sizeof *expressions && plain; i++) {
            plain = !has(text, expressions[i]);
        }
        if (plain) return text;
        free(text);
    }
    return NULL;
}

static void choose_chatml(struct chat *chat, const char *template) {
    const char *bos = strstr(template, "bos_token");
    chat->begins_with_bos = bos != NULL && bos < strstr(template, "<|im_start|>");
    chat->default_system = default_system(template);
    chat->drops_thinking = has(template, "split('</think>')");
    chat->keeps_last_thinking = has(template, "last_query_index");
    chat->opens_thinking = has(template, "<|im_start|>assistant\n<think>\n");
}

/* The whole string literal in which `part` first stands; NULL when it is in none. */
static char *literal_with(const char *template, const char *part) {
    const char *at = strstr(template, part), *begin = at;
    while (begin != NULL && begin > template && begin[-1] != '\'' && begin[-1] != '"') begin--;
    if (begin == NULL || begin == template) return NULL;
    const char *end = strchr(at, begin[-1]);
    return end ? strndup(begin, (size_t)(end - begin)) : NULL;
}

static bool is_one_of(const char *text, const char *a, const char *b, const char *c) {
    return text != NULL && (strcmp(text, a) == 0 || strcmp(text, b) == 0 || strcmp(text, c) == 0);
}

/* Mistral's formats differ in their spaces and in what becomes of a system message; one whose
 * wording is not among the known ones stays unknown: a space too many costs quality in silence. */
static void choose_mistral(struct chat *chat, const char *template) {
    chat->open = literal_with(template, "[INST]");
    chat->close = literal_with(template, "[/INST]");
    bool known = is_one_of(chat->open, "[INST] ", " [INST] ", "[INST]") &&
                 is_one_of(chat->close, " [/INST]", "[/INST]", "[/INST] ") &&
                 !has(template, "[SYSTEM_PROMPT]");
    if (has(template, "loop.last and system_message")) chat->system = CHAT_SYSTEM_LAST;
    else if (has(template, "loop.first and system_message")) chat->system = CHAT_SYSTEM_FIRST;
    else known = known && !has(template, "system_message");
    chat->space_before_answer = has(template, "' ' + message") || has(template, "\" \" + message");
    chat->space_after_eos = has(template, "eos_token + ' '") || has(template, "eos_token + \" \"");
    if (!known) chat->format = CHAT_UNKNOWN;
}

static void choose(struct chat *chat, const char *original) {
    char *template = unescape(original);
    chat->format = recognise(template);
    size_t n = strnlen(original, 60);
    n = utf8_check(original, n); /* not half a character */
    memcpy(chat->beginning, original, n);
    chat->trims = has(template, "trim");
    chat->begins_with_bos = has(template, "bos_token");
    if (chat->format == CHAT_LLAMA3) chat->knowledge = knowledge_lines(template);
    if (chat->format == CHAT_CHATML) choose_chatml(chat, template);
    if (chat->format == CHAT_MISTRAL) choose_mistral(chat, template);
    free(template);
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

/* `file`: the template of a file of its own, NULL: what the config has. */
static struct chat *create(const json_t *config, const char *file) {
    struct chat *chat = xcalloc(1, sizeof *chat);
    chat->bos = spelling(config, "bos_token");
    chat->eos = spelling(config, "eos_token");
    const char *template = file ? file : template_of(config);
    if (template != NULL) choose(chat, template);
    return chat;
}

enum status chat_load(struct chat **out, const char *dir, struct error *err) {
    json_t *config;
    TRY(read_config(&config, dir, err));
    char path[4096];
    char *file = NULL;
    size_t n;
    snprintf(path, sizeof path, "%s/chat_template.jinja", dir);
    enum status status = json_read_file(&file, &n, path, MAX_FILE_BYTES, err);
    if (status == STATUS_OK || status == STATUS_NOT_FOUND) {
        *out = create(config, status == STATUS_OK ? file : NULL);
        if (status == STATUS_OK) free(file);
        status = STATUS_OK;
    }
    json_decref(config);
    return status;
}

enum status chat_parse(struct chat **out, const char *config, size_t n_bytes, struct error *err) {
    json_t *json;
    TRY(json_parse_reals(&json, "tokenizer_config.json", config, n_bytes, err));
    *out = create(json, NULL);
    json_decref(json);
    return STATUS_OK;
}

void chat_free(struct chat *chat) {
    if (chat == NULL) return;
    free(chat->bos);
    free(chat->eos);
    free(chat->default_system);
    free(chat->knowledge);
    free(chat->open);
    free(chat->close);
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

/* A part of a text. */
struct span {
    const char *text;
    size_t n;
};

static struct span span_of(const char *text) {
    return (struct span){text, strlen(text)};
}

static void put_span(struct page *page, struct span span) {
    fwrite(span.text, 1, span.n, page->out);
}

/* What Python's str.strip takes for white space, as UTF-8. */
static const char *const blanks[] = {
    " ", "\t", "\n", "\v", "\f", "\r", "\x1C", "\x1D", "\x1E", "\x1F", "\xC2\x85", "\xC2\xA0", "\u1680",
    "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006", "\u2007", "\u2008", "\u2009",
    "\u200A", "\u2028", "\u2029", "\u202F", "\u205F", "\u3000"};

/* Bytes of the blank at the beginning (or end) of the span; 0: none there. */
static size_t blank_at(struct span span, bool end) {
    for (size_t i = 0; i < sizeof blanks / sizeof *blanks; i++) {
        size_t n = strlen(blanks[i]);
        if (n > span.n) continue;
        if (memcmp(end ? span.text + span.n - n : span.text, blanks[i], n) == 0) return n;
    }
    return 0;
}

static struct span trim_end(struct span span) {
    for (size_t n; (n = blank_at(span, true)) > 0;) span.n -= n;
    return span;
}

static struct span trim(struct span span) {
    for (size_t n; (n = blank_at(span, false)) > 0;) span = (struct span){span.text + n, span.n - n};
    return trim_end(span);
}

static void put_content(struct page *page, const struct chat *chat, const char *content) {
    put_span(page, chat->trims ? trim(span_of(content)) : span_of(content));
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

/* --- answers of models that think (Qwen3, QwQ) --- */

static struct span strip_newlines(struct span span) {
    while (span.n > 0 && *span.text == '\n') span = (struct span){span.text + 1, span.n - 1};
    while (span.n > 0 && span.text[span.n - 1] == '\n') span.n--;
    return span;
}

/* What follows the last `mark` in the span; all of it when there is none. */
static struct span after_last(struct span span, const char *mark) {
    for (const char *at; (at = memmem(span.text, span.n, mark, strlen(mark))) != NULL;) {
        const char *rest = at + strlen(mark);
        span = (struct span){rest, span.n - (size_t)(rest - span.text)};
    }
    return span;
}

static void put_answer(struct page *page, const struct chat *chat, const char *content, bool thinks,
                       bool last) {
    struct span answer = span_of(content), thought = {content, 0};
    const char *end = strstr(content, "</think>");
    if (end != NULL) {
        thought = (struct span){content, (size_t)(end - content)};
        thought = strip_newlines(after_last(thought, "<think>"));
        answer = after_last(answer, "</think>");
    }
    bool shows = thinks && (last || thought.n > 0);
    bool cuts = end != NULL || shows || !chat->keeps_last_thinking;
    while (cuts && answer.n > 0 && *answer.text == '\n') answer.text++, answer.n--;
    if (shows) {
        put(page, "<think>\n");
        put_span(page, thought);
        put(page, "\n</think>\n\n");
    }
    put_span(page, answer);
}

/* A tool's result goes as a user's message but asks nothing. */
static bool is_question(const struct chat_message *message) {
    static const char open[] = "<tool_response>", close[] = "</tool_response>";
    if (!is(message, "user")) return false;
    size_t n = strlen(message->content), n_close = strlen(close);
    bool opens = strncmp(message->content, open, strlen(open)) == 0;
    bool closes = n >= n_close && strcmp(message->content + n - n_close, close) == 0;
    return !(opens && closes);
}

/* Index of the last question; the last message when there is none. */
static size_t last_question(const struct chat_message *messages, size_t n) {
    for (size_t i = n; i > 0; i--) {
        if (is_question(&messages[i - 1])) return i - 1;
    }
    return n - 1;
}

static void render_chatml(struct page *page, const struct chat *chat,
                          const struct chat_message *messages, size_t n, bool generate) {
    size_t question = last_question(messages, n);
    if (chat->begins_with_bos) put(page, chat->bos);
    if (!is(&messages[0], "system") && chat->default_system != NULL) {
        put(page, "<|im_start|>system\n");
        put(page, chat->default_system);
        put(page, "<|im_end|>\n");
    }
    for (size_t i = 0; i < n; i++) {
        put(page, "<|im_start|>");
        put(page, messages[i].role);
        put(page, "\n");
        if (chat->drops_thinking && is(&messages[i], "assistant")) {
            bool thinks = chat->keeps_last_thinking && i > question;
            put_answer(page, chat, messages[i].content, thinks, i + 1 == n);
        } else {
            put_content(page, chat, messages[i].content);
        }
        put(page, "<|im_end|>\n");
    }
    if (generate) put(page, "<|im_start|>assistant\n");
    if (generate && chat->opens_thinking) put(page, "<think>\n");
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
    const char *system = is(&messages[0], "system") ? messages[0].content : NULL;
    size_t first = system ? 1 : 0;
    if (chat->begins_with_bos) put(page, chat->bos);
    for (size_t i = first; i < n; i++) {
        if (is(&messages[i], "assistant")) {
            if (chat->space_before_answer) put(page, " ");
            put_content(page, chat, messages[i].content);
            put(page, chat->eos);
            if (chat->space_after_eos) put(page, " ");
            continue;
        }
        put(page, chat->open);
        if (system != NULL && i == (chat->system == CHAT_SYSTEM_FIRST ? first : n - 1)) {
            put(page, system);
            put(page, "\n\n");
        }
        put(page, messages[i].content);
        put(page, chat->close);
    }
}

/* The first message is trimmed together with the system part in front of it. */
static void render_llama2(struct page *page, const struct chat *chat,
                          const struct chat_message *messages, size_t n) {
    const char *system = is(&messages[0], "system") ? messages[0].content : NULL;
    size_t first = system ? 1 : 0;
    for (size_t i = first; i < n; i++) {
        struct span content = span_of(messages[i].content);
        if (is(&messages[i], "assistant")) {
            put(page, " ");
            put_span(page, trim(content));
            put(page, " ");
            put(page, chat->eos);
            continue;
        }
        put(page, chat->bos);
        put(page, "[INST] ");
        bool joins = system != NULL && i == first;
        bool empty = trim(content).n == 0;
        if (joins) {
            put(page, "<<SYS>>\n");
            put(page, system);
            put(page, empty ? "\n<</SYS>>" : "\n<</SYS>>\n\n");
        }
        put_span(page, joins && !empty ? trim_end(content) : trim(content));
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
    if (chat->format == CHAT_MISTRAL) {
        TRY(check_turns(messages, n_messages, chat->system != CHAT_SYSTEM_NONE, err));
    }
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
