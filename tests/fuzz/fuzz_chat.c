/* libFuzzer: any text as tokenizer_config.json. What is recognised renders chats of every order of
 * roles, or refuses them in words. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "model/chat.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void render(const struct chat *chat, const struct chat_message *messages, size_t n,
                   bool generate) {
    char *text = NULL;
    struct error err;
    enum status status = chat_render(chat, messages, n, generate, &text, &err);
    if (status == STATUS_OK) {
        CHECK(text != NULL);
        free(text);
        return;
    }
    bool refusable = chat_format(chat) <= CHAT_UNKNOWN;
    CHECK(err.text[0] != 0);
    CHECK(status == (refusable ? STATUS_FAILED_PRECONDITION : STATUS_INVALID_ARGUMENT));
}

/* One message says what the folder says: the input itself, up to its first NUL byte. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    struct chat *chat;
    struct error err;
    if (chat_parse(&chat, (const char *)data, n, &err) != STATUS_OK) {
        CHECK(err.status == STATUS_INVALID_ARGUMENT && err.text[0] != 0);
        return 0;
    }
    char *own = strndup((const char *)data, n);
    CHECK(own != NULL);
    static const char *const roles[] = {"system", "user", "assistant"};
    const char *const contents[] = {" \n", "<think>\na</think>\n\nb", own};
    for (unsigned order = 0; order < 27; order++) {
        struct chat_message messages[3] = {{roles[order % 3], contents[order % 2]},
                                           {roles[order / 3 % 3], contents[1 + order % 2]},
                                           {roles[order / 9], own}};
        for (size_t n_messages = 0; n_messages <= 3; n_messages++) {
            render(chat, messages, n_messages, order % 2 == 0);
        }
    }
    CHECK(chat_format_name(chat_format(chat)) != NULL);
    free(own);
    chat_free(chat);
    return 0;
}
