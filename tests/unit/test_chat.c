/* Chat formats against rendered templates (../shared/data/tokenizers/chat_vectors.jsonl). */
#include "model/chat.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "model/tokenizer.h"
#include "tests/unit/test.h"

#define DATA TANDEM_SOURCE_DIR "/../shared/data/tokenizers/"
#define BUNDLED TANDEM_SOURCE_DIR "/assets/models/llama-tale-target"

enum { MAX_MESSAGES = 16 };

/* The vectors of Llama 3.1 were rendered on some day; ours has the template's own fallback date. */
static void with_fixed_date(char *out, size_t size, const char *text) {
    snprintf(out, size, "%s", text);
    char *date = strstr(out, "Today Date: ");
    if (date == NULL) return;
    date += strlen("Today Date: ");
    char *end = strstr(date, "\n");
    char rest[8192];
    snprintf(rest, sizeof rest, "%s", end);
    snprintf(date, size - (size_t)(date - out), "26 Jul 2024%s", rest);
}

static void check_vector(const json_t *vector) {
    const char *name = json_string_value(json_object_get(vector, "tokenizer"));
    char dir[512];
    snprintf(dir, sizeof dir, DATA "%s", name);
    struct chat *chat;
    struct error err = {0};
    cr_assert(chat_load(&chat, dir, &err) == STATUS_OK, "%s", err.text);
    struct chat_message messages[MAX_MESSAGES];
    size_t n, i;
    json_t *message;
    n = json_array_size(json_object_get(vector, "messages"));
    cr_assert(n <= MAX_MESSAGES);
    json_array_foreach(json_object_get(vector, "messages"), i, message) {
        messages[i].role = json_string_value(json_object_get(message, "role"));
        messages[i].content = json_string_value(json_object_get(message, "content"));
    }
    char *text;
    bool generate = json_is_true(json_object_get(vector, "add_generation_prompt"));
    cr_assert(chat_render(chat, messages, n, generate, &text, &err) == STATUS_OK, "%s: %s", name,
              err.text);
    char expected[16384];
    with_fixed_date(expected, sizeof expected,
                    json_string_value(json_object_get(vector, "text")));
    cr_assert(strcmp(text, expected) == 0, "%s:\n%s\nexpected:\n%s", name, text, expected);
    free(text);
    chat_free(chat);
}

Test(chat, vectors) {
    FILE *file = fopen(DATA "chat_vectors.jsonl", "r");
    if (file == NULL) cr_skip_test("%schat_vectors.jsonl is not there", DATA);
    char *line = NULL;
    size_t capacity = 0;
    int n = 0;
    for (; getline(&line, &capacity, file) > 0; n++) {
        json_t *vector = json_loads(line, 0, NULL);
        cr_assert(vector != NULL);
        check_vector(vector);
        json_decref(vector);
    }
    free(line);
    fclose(file);
    cr_assert(n >= 30, "only %d vectors", n);
}

/* A folder whose tokenizer_config.json is `config`. */
static struct chat *chat_of(const char *config) {
    char dir[] = "/tmp/tandem-chat-XXXXXX", path[128];
    cr_assert(mkdtemp(dir) != NULL);
    snprintf(path, sizeof path, "%s/tokenizer_config.json", dir);
    FILE *file = fopen(path, "w");
    fputs(config, file);
    fclose(file);
    struct chat *chat = NULL;
    struct error err = {0};
    cr_assert(chat_load(&chat, dir, &err) == STATUS_OK, "%s", err.text);
    unlink(path);
    rmdir(dir);
    return chat;
}

static void check_render(const char *config, const struct chat_message *messages, size_t n,
                         const char *expected) {
    struct chat *chat = chat_of(config);
    char *text;
    struct error err = {0};
    cr_assert(chat_render(chat, messages, n, true, &text, &err) == STATUS_OK, "%s", err.text);
    cr_assert(strcmp(text, expected) == 0, "%s", text);
    free(text);
    chat_free(chat);
}

static const struct chat_message talk[] = {
    {"system", "Be brief."}, {"user", " Hi "}, {"assistant", "Hello."}, {"user", "Bye"}};

Test(chat, llama2) {
    check_render("{\"bos_token\":\"<s>\",\"eos_token\":\"</s>\","
                 "\"chat_template\":\"[INST] <<SYS>> bos_token\"}",
                 talk, 4,
                 "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi [/INST] Hello. </s><s>[INST] Bye "
                 "[/INST]"); /* the system part and the message are trimmed as one text */
    check_render("{\"bos_token\":\"<s>\",\"eos_token\":\"</s>\","
                 "\"chat_template\":\"[INST] <<SYS>> bos_token\"}",
                 talk + 1, 1, "<s>[INST] Hi [/INST]");
}

Test(chat, zephyr) {
    check_render("{\"eos_token\":\"</s>\",\"chat_template\":\"<|user|> <|assistant|> eos_token\"}",
                 talk, 4,
                 "<|system|>\nBe brief.</s>\n<|user|>\n Hi </s>\n<|assistant|>\nHello.</s>\n"
                 "<|user|>\nBye</s>\n<|assistant|>\n");
}

/* Templates in short: what makes the variants of a format differ, in the places where it stands. */
#define MISTRAL(open, close, rest)                                                              \
    "{\"bos_token\":\"<s>\",\"eos_token\":\"</s>\",\"chat_template\":\"{{ bos_token }} '" open      \
    "' + message['content'] + '" close "' " rest "\"}"

Test(chat, mistral_variants_differ_in_spaces) {
    check_render(MISTRAL("[INST] ", " [/INST]", "message['content'] + eos_token + ' '"), talk + 1, 3,
                 "<s>[INST]  Hi  [/INST]Hello.</s> [INST] Bye [/INST]");
    check_render(MISTRAL("[INST] ", " [/INST]", "message['content'] + eos_token"), talk + 1, 3,
                 "<s>[INST]  Hi  [/INST]Hello.</s>[INST] Bye [/INST]");
    check_render(MISTRAL(" [INST] ", " [/INST]",
                         "loop.first and system_message is defined ' ' + message['content'] + eos_token"),
                 talk, 4,
                 "<s> [INST] Be brief.\n\n Hi  [/INST] Hello.</s> [INST] Bye [/INST]");
    check_render(MISTRAL("[INST] ", "[/INST]",
                         "loop.last and system_message is defined ' ' + message['content']|trim"),
                 talk, 4, "<s>[INST]  Hi [/INST] Hello.</s>[INST] Be brief.\n\nBye[/INST]");
    check_render(MISTRAL("[INST]", "[/INST]", "message['content'] + eos_token"), talk + 1, 1,
                 "<s>[INST] Hi [/INST]");
}

Test(chat, mistral_of_another_kind_is_unknown) {
    static const char *const configs[] = {
        MISTRAL("\\n[INST] ", " [/INST]", ""),
        MISTRAL("[INST] ", " [/INST]\\n", ""),
        MISTRAL("[INST] ", " [/INST]", "system_message somewhere else"),
        MISTRAL("[INST]", "[/INST]", "[SYSTEM_PROMPT]"),
        "{\"chat_template\":\"[INST]\"}",
    };
    for (size_t i = 0; i < sizeof configs / sizeof *configs; i++) {
        struct chat *chat = chat_of(configs[i]);
        cr_assert(chat_format(chat) == CHAT_UNKNOWN, "template %zu", i);
        chat_free(chat);
    }
}

/* A newline of the template may be stored as itself or as an escape of its string literal. */
#define CHATML_DEFAULT(newline)                                                                  \
    "{\"chat_template\":\"{{ '<|im_start|>system" newline "' }}{{ '<|im_start|>system" newline       \
    "You\\\\'re kind.<|im_end|>" newline "' }}{{ '<|im_start|>' + role }}\"}"

Test(chat, chatml_default_system_message) {
    static const char expected[] = "<|im_start|>system\nYou're kind.<|im_end|>\n<|im_start|>user\n Hi "
                                   "<|im_end|>\n<|im_start|>assistant\n";
    check_render(CHATML_DEFAULT("\\n"), talk + 1, 1, expected);
    check_render(CHATML_DEFAULT("\\\\n"), talk + 1, 1, expected);
    check_render(CHATML_DEFAULT("\\n"), talk, 2,
                 "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n"
                 "<|im_start|>assistant\n");
    check_render("{\"bos_token\":\"<s>\",\"chat_template\":\"{{ bos_token }}{{ '<|im_start|>system\\n' + "
                 "content + '<|im_end|>\\n' }}\"}",
                 talk + 1, 1, "<s><|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n");
}

/* Qwen3: what was thought before the last question is dropped, after it kept; QwQ: always dropped. */
Test(chat, thoughts_of_earlier_answers_are_dropped) {
    static const char qwen3[] = "{\"chat_template\":\"<|im_start|> <|im_end|> last_query_index "
                                "content.split('</think>')[-1]\"}";
    static const char qwq[] = "{\"chat_template\":\"<|im_start|> <|im_end|> content.split('</think>')[-1]"
                              " '<|im_start|>assistant\\n<think>\\n'\"}";
    static const struct chat_message thinking[] = {
        {"user", "a"}, {"assistant", "<think>\nhm\n</think>\n\nb"}, {"user", "c"},
        {"assistant", "<think>\nho\n</think>\n\nd"}, {"user", "<tool_response>e</tool_response>"}};
    check_render(qwen3, thinking, 3,
                 "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
                 "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n");
    check_render(qwen3, thinking + 2, 3,
                 "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\nho\n</think>\n\nd"
                 "<|im_end|>\n<|im_start|>user\n<tool_response>e</tool_response><|im_end|>\n"
                 "<|im_start|>assistant\n");
    check_render(qwq, thinking + 2, 2,
                 "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
                 "<|im_start|>assistant\n<think>\n");
}

/* Python's white space, not only ASCII's. */
Test(chat, trimming_knows_unicode) {
    static const struct chat_message padded = {"user", "\u3000\xC2\xA0\x1F Hi\u2003there \u2028"};
    check_render("{\"chat_template\":\"<|start_header_id|> <|eot_id|> | trim\"}", &padded, 1,
                 "<|start_header_id|>user<|end_header_id|>\n\nHi\u2003there<|eot_id|>"
                 "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

/* The quoted beginning of an unknown template ends with a whole character. */
Test(chat, quotes_whole_characters) {
    struct chat_message user = {"user", "Hi"};
    char *text, config[256];
    struct error err = {0};
    snprintf(config, sizeof config, "{\"chat_template\":\"%59s\u6F22\u5B57\"}", "x");
    struct chat *chat = chat_of(config);
    cr_assert(chat_render(chat, &user, 1, true, &text, &err) == STATUS_FAILED_PRECONDITION);
    cr_assert(strstr(err.text, "x\")") != NULL, "%s", err.text);
    chat_free(chat);
}

Test(chat, unknown_and_missing_templates_are_said) {
    struct chat_message user = {"user", "Hi"};
    char *text;
    struct error err = {0};
    struct chat *chat = chat_of("{\"chat_template\":\"{{ something_else }}\"}");
    cr_assert(chat_format(chat) == CHAT_UNKNOWN);
    cr_assert(chat_render(chat, &user, 1, true, &text, &err) == STATUS_FAILED_PRECONDITION);
    cr_assert(strstr(err.text, "{{ something_else }}") && strstr(err.text, "raw prompt"), "%s",
              err.text);
    chat_free(chat);
    chat = chat_of("{}");
    cr_assert(chat_format(chat) == CHAT_NONE);
    cr_assert(chat_render(chat, &user, 1, true, &text, &err) == STATUS_FAILED_PRECONDITION);
    chat_free(chat);
}

Test(chat, roles_that_a_format_forbids) {
    struct chat *chat = chat_of(MISTRAL("[INST] ", " [/INST]", "message['content'] + eos_token"));
    char *text;
    struct error err = {0};
    cr_assert(chat_render(chat, talk, 4, true, &text, &err) == STATUS_INVALID_ARGUMENT);
    cr_assert(strstr(err.text, "messages[0].role is \"system\"") != NULL, "%s", err.text);
    struct chat_message tool = {"tool", "x"};
    cr_assert(chat_render(chat, &tool, 1, true, &text, &err) == STATUS_INVALID_ARGUMENT);
    cr_assert(chat_render(chat, talk, 0, true, &text, &err) == STATUS_INVALID_ARGUMENT);
    chat_free(chat);
}

/* The bundled template, in full: what the demo sends. */
Test(chat, bundled) {
    struct chat *chat;
    struct error err = {0};
    cr_assert(chat_load(&chat, BUNDLED, &err) == STATUS_OK, "%s", err.text);
    struct chat_message user = {"user", "  Hello! "};
    char *text;
    cr_assert(chat_render(chat, &user, 1, true, &text, &err) == STATUS_OK);
    cr_assert_str_eq(text, "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello!"
                           "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n");
    free(text);
    chat_free(chat);
}
