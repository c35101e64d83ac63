/* tokenizer.json from anywhere: refused in words, or a tokenizer that encodes and decodes any text.
 * Seeds: the bundled tokenizer, cut to size by build.sh, and the small ones below. */
#include <stdlib.h>
#include <string.h>

#include "model/tokenizer.h"
#include "model/tokenizer_load.h"
#include "model/utf8.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void encode_and_decode(const struct tokenizer *tokenizer, const char *text, size_t n) {
    struct token_list list = {0};
    struct error err;
    if (tokenizer_encode(tokenizer, &list, text, n, true, &err) == STATUS_OK) {
        struct detokenizer *detokenizer = detokenizer_create(tokenizer, false);
        const char *out;
        size_t n_out;
        for (size_t i = 0; i < list.n; i++) {
            detokenizer_push(detokenizer, list.ids[i], &out, &n_out);
        }
        detokenizer_finish(detokenizer, &out, &n_out);
        detokenizer_free(detokenizer);
    }
    token_list_free(&list);
}

/* The input is a tokenizer; its own text is what it encodes, besides a few words. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    struct tokenizer *tokenizer;
    struct error err;
    if (tokenizer_parse(&tokenizer, (const char *)data, n, &err) != STATUS_OK) return 0;
    static const char words[] = "Once  upon a\ttime \xC3\xA9\xE6\xBC\xA2 123 'tis <s>";
    encode_and_decode(tokenizer, words, sizeof words - 1);
    encode_and_decode(tokenizer, (const char *)data, n < 200 ? n : 200);
    for (int32_t id = -1; id <= tokenizer_size(tokenizer); id++) {
        const char *spelling = tokenizer_token(tokenizer, id);
        if (spelling != NULL) (void)tokenizer_find(tokenizer, spelling);
    }
    (void)tokenizer_fingerprint(tokenizer);
    tokenizer_free(tokenizer);
    return 0;
}
