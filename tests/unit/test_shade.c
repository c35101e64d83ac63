#include "client/shade.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/unit/test.h"

enum { MAX_TOKENS = 8 };

/* A chunk of up to eight tokens: text up to each token's end, and its mark. */
struct chunk {
    Tandem__V1__GenerateChunk message;
    int32_t ids[MAX_TOKENS];
    protobuf_c_boolean drafted[MAX_TOKENS];
    uint32_t ends[MAX_TOKENS];
};

/* `pieces`: one text for each token, "+" before those that were drafted; `rest` has no token. */
static struct chunk *make(struct chunk *chunk, char *text, const char *const *pieces, size_t n,
                          const char *rest) {
    tandem__v1__generate_chunk__init(&chunk->message);
    text[0] = '\0';
    for (size_t i = 0; i < n; i++) {
        chunk->drafted[i] = pieces[i][0] == '+';
        strcat(text, pieces[i] + (chunk->drafted[i] ? 1 : 0));
        chunk->ends[i] = (uint32_t)strlen(text);
    }
    strcat(text, rest);
    chunk->message.text = (ProtobufCBinaryData){strlen(text), (uint8_t *)text};
    chunk->message.n_token_ids = chunk->message.n_drafted = chunk->message.n_text_ends = n;
    chunk->message.token_ids = chunk->ids;
    chunk->message.drafted = chunk->drafted;
    chunk->message.text_ends = chunk->ends;
    return chunk;
}

/* What the terminal gets: "[" for faint on, "]" for off. */
static void expect(struct shade *shade, const struct chunk *chunk, const char *expected) {
    char *text = NULL, *at;
    size_t n;
    struct error err;
    cr_assert_eq(shade_check(&chunk->message, &err), STATUS_OK, "%s", err.text);
    FILE *out = open_memstream(&text, &n);
    shade_write(shade, out, &chunk->message);
    fclose(out);
    char seen[200] = "";
    size_t n_seen = 0;
    for (at = text; *at != '\0';) {
        bool on = strncmp(at, "\033[2m", 4) == 0, off = strncmp(at, "\033[22m", 5) == 0;
        seen[n_seen++] = on ? '[' : off ? ']' : *at;
        at += on ? 4 : off ? 5 : 1;
    }
    cr_assert_str_eq(seen, expected);
    free(text);
}

#define MAKE(rest, ...)                                                                            \
    make(&chunk, text, (const char *const[]){__VA_ARGS__},                                         \
         sizeof((const char *const[]){__VA_ARGS__}) / sizeof(char *), rest)

Test(shade, drafted_tokens_are_faint_in_runs) {
    struct shade shade = {.on = true};
    struct chunk chunk;
    char text[200];
    expect(&shade, MAKE("", "Once"), "Once");
    expect(&shade, MAKE("", "+ upon", "+ a", " time"), "[ upon a] time");
    expect(&shade, MAKE("", " there", "+ was"), " there[ was]");
    expect(&shade, MAKE("", "+ a", "."), "[ a].");
    expect(&shade, MAKE("", "+", "+", "x"), "x");
}

Test(shade, text_without_a_token_looks_like_the_last_token) {
    struct shade shade = {.on = true};
    struct chunk chunk;
    char text[200];
    expect(&shade, MAKE(" held", "a", "+b"), "a[b held]");
    make(&chunk, text, NULL, 0, " more");
    expect(&shade, &chunk, "[ more]");
    expect(&shade, MAKE("!", "c"), "c!");
    make(&chunk, text, NULL, 0, "");
    expect(&shade, &chunk, "");
}

Test(shade, off_or_unmarked_text_is_as_it_is) {
    struct shade off = {.on = false}, on = {.on = true};
    struct chunk chunk;
    char text[200];
    expect(&off, MAKE("", "a", "+b", "c"), "abc");
    MAKE("", "a", "b", "c");
    chunk.message.n_drafted = chunk.message.n_text_ends = 0;
    expect(&on, &chunk, "abc");
}

Test(shade, chunks_that_contradict_themselves_are_refused) {
    struct chunk chunk;
    struct error err;
    char text[200];
    MAKE("", "a", "+b");
    chunk.message.n_drafted = 1;
    cr_assert_eq(shade_check(&chunk.message, &err), STATUS_INTERNAL);
    MAKE("", "a", "+b");
    chunk.message.n_text_ends = 0;
    cr_assert_eq(shade_check(&chunk.message, &err), STATUS_INTERNAL);
    MAKE("", "a", "+b");
    chunk.ends[1] = 3;
    cr_assert_eq(shade_check(&chunk.message, &err), STATUS_INTERNAL);
    cr_assert(strstr(err.text, "2 bytes of text") != NULL, "%s", err.text);
    MAKE("", "a", "+b");
    chunk.ends[0] = 2;
    chunk.ends[1] = 1;
    cr_assert_eq(shade_check(&chunk.message, &err), STATUS_INTERNAL);
}
