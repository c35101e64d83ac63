#include "coordinator/stream.h"

#include <stdio.h>
#include <string.h>

#include "common/philox.h"
#include "tests/unit/test.h"

static struct stream_options stops(const char *first, const char *second) {
    struct stream_options options = {0};
    if (first != NULL) options.stops[options.n_stops++] = (struct stream_stop){first, strlen(first)};
    if (second != NULL) options.stops[options.n_stops++] = (struct stream_stop){second, strlen(second)};
    return options;
}

/* Pushes each piece as a token; "|" in the result marks where each push's output ends. */
static const char *run(const struct stream_options *options, const char *const *pieces, size_t n,
                       char *result) {
    struct stream *stream = stream_create(NULL, options);
    struct bytes out = {0};
    bool matched = false;
    for (size_t i = 0; i < n && !matched; i++) {
        matched = stream_push_text(stream, &out, pieces[i], strlen(pieces[i]));
        bytes_append(&out, "|", 1);
    }
    stream_end(stream, &out);
    sprintf(result, "%.*s%s", (int)out.n, out.data, matched ? "#" : "");
    bytes_free(&out);
    stream_destroy(stream);
    return result;
}

#define RUN(options, ...)                                                                          \
    run(&(options), (const char *const[]){__VA_ARGS__},                                            \
        sizeof((const char *const[]){__VA_ARGS__}) / sizeof(char *), result)

Test(stream, without_stops_text_passes_at_once) {
    char result[64];
    struct stream_options options = stops(NULL, NULL);
    cr_assert_str_eq(RUN(options, "ab", "", "c"), "ab||c|");
}

Test(stream, a_stop_string_across_tokens_is_held_back_and_cut) {
    char result[64];
    struct stream_options options = stops("END", NULL);
    cr_assert_str_eq(RUN(options, "xE", "N", "Dy"), "x|||#");
    cr_assert_str_eq(RUN(options, "xE", "N", "Ey", "z"), "x||ENEy|z|");
    cr_assert_str_eq(RUN(options, "xE", "N"), "x||EN");
    cr_assert_str_eq(RUN(options, "aENDb"), "a|#");
    cr_assert_str_eq(RUN(options, "ENEND"), "EN|#");
}

Test(stream, it_may_stay_in_the_text) {
    char result[64];
    struct stream_options options = stops("END", NULL);
    options.include_stop = true;
    cr_assert_str_eq(RUN(options, "xE", "N", "Dy"), "x||END|#");
}

Test(stream, the_match_that_ends_first_wins_and_of_those_the_longest) {
    char result[64];
    struct stream_options options = stops("abcd", "bc");
    cr_assert_str_eq(RUN(options, "xabcd"), "xa|#");
    options = stops("c", "abc");
    cr_assert_str_eq(RUN(options, "xabcd"), "x|#");
}

Test(stream, overlapping_beginnings_are_found) {
    char result[64];
    struct stream_options options = stops("aab", NULL);
    cr_assert_str_eq(RUN(options, "a", "a", "a", "b"), "||a||#");
}

Test(stream, min_tokens_lets_early_matches_pass) {
    char result[64];
    struct stream_options options = stops("END", NULL);
    options.min_tokens = 2;
    cr_assert_str_eq(RUN(options, "END", "b", "c"), "END|b|c|");
    cr_assert_str_eq(RUN(options, "a", "EN", "D"), "a|||#");
    cr_assert_str_eq(RUN(options, "END", "END", "END"), "END|END||#");
}

/* Any cutting of a text into pieces gives the same result as a search over the whole. */
Test(stream, cutting_does_not_matter) {
    for (uint32_t seed = 1; seed <= 2000; seed++) {
        char text[40], result[128] = "", expected[64], stop[4] = "";
        uint32_t bits[4], counter[4] = {seed, 0, 0, 0}, key[2] = {seed, 17};
        for (int i = 0; i < 36; i++, counter[1]++) {
            philox4x32_10(bits, counter, key);
            text[i] = "ab"[bits[0] & 1];
            if (i < 3) stop[i] = "ab"[bits[1] & 1];
        }
        text[36] = '\0';
        const char *found = strstr(text, stop);
        snprintf(expected, sizeof expected, "%.*s", found ? (int)(found - text) : 36, text);
        struct stream_options options = stops(stop, NULL);
        struct stream *stream = stream_create(NULL, &options);
        struct bytes out = {0};
        bool matched = false;
        for (size_t at = 0; at < 36 && !matched; counter[1]++) {
            philox4x32_10(bits, counter, key);
            size_t n = bits[0] % 5;
            if (n > 36 - at) n = 36 - at;
            matched = stream_push_text(stream, &out, text + at, n);
            at += n;
        }
        stream_end(stream, &out);
        snprintf(result, sizeof result, "%.*s", (int)out.n, out.n ? out.data : "");
        cr_assert_eq(matched, found != NULL, "seed %u", seed);
        cr_assert_str_eq(result, expected, "seed %u", seed);
        bytes_free(&out);
        stream_destroy(stream);
    }
}

Test(stream, counts_tokens_and_names_the_stop) {
    struct stream_options options = stops("x", "yz");
    struct stream *stream = stream_create(NULL, &options);
    struct bytes out = {0};
    cr_assert_eq(stream_stop(stream), -1);
    cr_assert_not(stream_push_text(stream, &out, "y", 1));
    stream_push_silent(stream);
    cr_assert(stream_push_text(stream, &out, "z", 1));
    cr_assert_eq(stream_stop(stream), 1);
    cr_assert_eq(stream_tokens(stream), 3);
    cr_assert_eq(out.n, 0);
    bytes_free(&out);
    stream_destroy(stream);
}

/* Tokens through the bundled tokenizer give the text back, whatever special tokens are between. */
Test(stream, decodes_tokens) {
    struct tokenizer *tokenizer;
    struct error err;
    const char *text = "Once upon a time, caf\xc3\xa9 \xf0\x9f\x98\x80 END of it.";
    cr_assert_eq(tokenizer_load(&tokenizer, TANDEM_SOURCE_DIR "/assets/models/llama-tale-target", &err),
                 STATUS_OK, "%s", err.text);
    struct token_list ids = {0};
    cr_assert_eq(tokenizer_encode(tokenizer, &ids, text, strlen(text), false, &err), STATUS_OK);
    struct stream_options options = stops(" END", NULL);
    options.skip_special = true;
    struct stream *stream = stream_create(tokenizer, &options);
    struct bytes out = {0};
    bool matched = false;
    for (size_t i = 0; i < ids.n && !matched; i++) matched = stream_push(stream, &out, ids.ids[i]);
    cr_assert(matched);
    cr_assert_eq(out.n, strlen("Once upon a time, caf\xc3\xa9 \xf0\x9f\x98\x80"));
    cr_assert_arr_eq(out.data, text, out.n);
    bytes_free(&out);
    stream_destroy(stream);
    token_list_free(&ids);
    tokenizer_free(tokenizer);
}
