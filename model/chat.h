/* Chat formats: messages to prompt text. The format is chosen from the chat template in
 * tokenizer_config.json by recognising the known families; no template language is run. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

#include "common/error.h"

enum chat_format {
    CHAT_NONE,     /* the folder has no chat template */
    CHAT_UNKNOWN,  /* has one that is not among those below: refused with its beginning quoted */
    CHAT_LLAMA2,
    CHAT_LLAMA3,
    CHAT_CHATML,   /* Qwen2/2.5 and others */
    CHAT_MISTRAL,
    CHAT_ZEPHYR,
};

struct chat_message {
    const char *role;    /* "system", "user", "assistant" */
    const char *content; /* UTF-8 */
};

struct chat; /* immutable after loading */

/* Reads DIR/tokenizer_config.json. A missing file means CHAT_NONE. */
enum status chat_load(struct chat **out, const char *dir, struct error *err);
/* The same from the text of a tokenizer_config.json. */
enum status chat_parse(struct chat **out, const char *config, size_t n_bytes, struct error *err);
void chat_free(struct chat *chat);
enum chat_format chat_format(const struct chat *chat);
const char *chat_format_name(enum chat_format format);

/* Renders; *text is malloc'd for the caller, NUL-terminated, and already holds BOS where the
 * template has it (encode it with add_special = false). FAILED_PRECONDITION for NONE and UNKNOWN, saying
 * that raw prompts still work; INVALID_ARGUMENT for role orders that the format forbids. */
enum status chat_render(const struct chat *chat, const struct chat_message *messages,
                        size_t n_messages, bool add_generation_prompt, char **text,
                        struct error *err);
