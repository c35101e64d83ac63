/* The detokenizer: increments are whole characters, and together they are what decoding all bytes
 * at once gives (by a decoder of this file's own). */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model/tokenizer.h"
#include "model/tokenizer_load.h"
#include "model/utf8.h"
#include "tests/unit/test.h"

#define BUNDLED TANDEM_SOURCE_DIR "/assets/models/llama-tale-target"

static struct tokenizer *parse(const char *json) {
    struct tokenizer *t = NULL;
    struct error err = {0};
    cr_assert(tokenizer_parse(&t, json, strlen(json), &err) == STATUS_OK, "%s", err.text);
    return t;
}

/* All increments together; each must be whole characters. */
static char *decode(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special) {
    struct detokenizer *d = detokenizer_create(t, skip_special);
    char *out = NULL;
    size_t n_out;
    FILE *file = open_memstream(&out, &n_out);
    for (size_t i = 0; i <= n; i++) {
        const char *text;
        size_t n_text;
        if (i < n) detokenizer_push(d, ids[i], &text, &n_text);
        else detokenizer_finish(d, &text, &n_text);
        cr_assert(utf8_check(text, n_text) == n_text, "increment %zu is not whole UTF-8", i);
        fwrite(text, 1, n_text, file);
    }
    fclose(file);
    detokenizer_free(d);
    return out;
}

static void check_decode(const char *json, const int32_t *ids, size_t n, bool skip_special,
                         const char *expected) {
    struct tokenizer *t = parse(json);
    char *seen = decode(t, ids, n, skip_special);
    cr_assert(strcmp(seen, expected) == 0, "\"%s\", expected \"%s\"", seen, expected);
    free(seen);
    tokenizer_free(t);
}

/* --- byte-level ------------------------------------------------------------------------------ */

/* The byte that a character of the byte-level alphabet stands for: GPT-2's table, built as its paper's
 * code describes it: printable bytes are themselves, the others follow from U+0100. */
static void build_alphabet(int byte_of[512]) {
    int next = 256;
    for (int i = 0; i < 512; i++) byte_of[i] = -1;
    for (int b = 0; b < 256; b++) {
        bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF);
        byte_of[printable ? b : next++] = b;
    }
}

/* Appends the token's bytes. */
static size_t token_bytes(char *out, const struct tokenizer *t, int32_t id, const int byte_of[512]) {
    const unsigned char *spelling = (const unsigned char *)tokenizer_token(t, id);
    size_t n = 0;
    if (tokenizer_is_special(t, id)) {
        n = strlen((const char *)spelling);
        memcpy(out, spelling, n);
        return n;
    }
    for (size_t at = 0; spelling[at] != 0;) {
        bool one = spelling[at] < 0x80;
        int c = one ? spelling[at] : (spelling[at] & 0x1F) << 6 | (spelling[at + 1] & 0x3F);
        cr_assert(c < 512 && byte_of[c] >= 0, "token %d", id);
        out[n++] = (char)byte_of[c];
        at += one ? 1 : 2;
    }
    return n;
}

/* Bytes to text, U+FFFD for every maximal subpart, by the ranges of the WHATWG decoder. */
static size_t decode_at_once(char *out, const unsigned char *bytes, size_t n) {
    size_t n_out = 0;
    for (size_t at = 0; at < n;) {
        unsigned char lead = bytes[at];
        size_t needed = lead < 0x80 ? 0 : lead >= 0xC2 && lead <= 0xDF ? 1
                      : lead >= 0xE0 && lead <= 0xEF ? 2 : lead >= 0xF0 && lead <= 0xF4 ? 3 : 9;
        size_t run = 1;
        while (needed < 9 && run <= needed && at + run < n) {
            unsigned char low = 0x80, high = 0xBF, c = bytes[at + run];
            if (run == 1 && lead == 0xE0) low = 0xA0;
            if (run == 1 && lead == 0xED) high = 0x9F;
            if (run == 1 && lead == 0xF0) low = 0x90;
            if (run == 1 && lead == 0xF4) high = 0x8F;
            if (c < low || c > high) break;
            run++;
        }
        bool whole = run == needed + 1;
        memcpy(out + n_out, whole ? (const char *)bytes + at : "\xEF\xBF\xBD", whole ? run : 3);
        n_out += whole ? run : 3;
        at += run;
    }
    return n_out;
}

enum { N_IDS = 40, MAX_BYTES = N_IDS * 64 };

Test(detokenizer, increments_add_up_to_decoding_at_once) {
    struct tokenizer *t = NULL;
    struct error err = {0};
    cr_assert(tokenizer_load(&t, BUNDLED, &err) == STATUS_OK, "%s", err.text);
    int byte_of[512];
    build_alphabet(byte_of);
    for (uint32_t round = 0; round < 2000; round++) {
        uint32_t state = round;
        int32_t ids[N_IDS];
        char bytes[MAX_BYTES], expected[3 * MAX_BYTES + 1];
        size_t n = 0;
        for (int i = 0; i < N_IDS; i++) {
            state = state * 1664525u + 1013904223u;
            /* every second round single bytes only, which seldom make characters */
            ids[i] = (int32_t)((state >> 8) % (round % 2 ? 256u : (uint32_t)tokenizer_size(t)));
            n += token_bytes(bytes + n, t, ids[i], byte_of);
        }
        expected[decode_at_once(expected, (const unsigned char *)bytes, n)] = 0;
        char *seen = decode(t, ids, N_IDS, false);
        cr_assert(strcmp(seen, expected) == 0, "seed %u: \"%s\", expected \"%s\"", round, seen, expected);
        free(seen);
    }
    tokenizer_free(t);
}

/* Four tokens of one byte each are a character: text comes with the last of them. */
Test(detokenizer, a_character_waits_for_its_last_byte) {
    struct tokenizer *t = NULL;
    struct error err = {0};
    cr_assert(tokenizer_load(&t, BUNDLED, &err) == STATUS_OK, "%s", err.text);
    static const char *const spellings[] = {"\xC3\xB0", "\xC5\x81", "\xC4\xBB", "\xC4\xA4"};
    struct detokenizer *d = detokenizer_create(t, true);
    const char *text;
    size_t n;
    for (int i = 0; i < 4; i++) { /* F0 9F 99 82 in the byte-level alphabet */
        int32_t id = tokenizer_find(t, spellings[i]);
        cr_assert(id >= 0, "byte %d", i);
        detokenizer_push(d, id, &text, &n);
        cr_assert(n == (i == 3 ? 4u : 0u), "byte %d: %zu bytes of text", i, n);
    }
    cr_assert(memcmp(text, "\xF0\x9F\x99\x82", 4) == 0);
    detokenizer_push(d, tokenizer_find(t, spellings[0]), &text, &n);
    cr_assert(n == 0);
    detokenizer_finish(d, &text, &n);
    cr_assert(n == 3 && memcmp(text, "\xEF\xBF\xBD", 3) == 0, "an unfinished character");
    detokenizer_free(d);
    tokenizer_free(t);
}

/* --- byte fallback and Metaspace ------------------------------------------------------------- */

/* Llama 2's kind. */
static const char fallback_json[] =
    "{\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":{\"String\":"
    "\"\xE2\x96\x81\"},\"content\":\" \"},{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"},{\"type\":"
    "\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}]},\"added_tokens\":[{\"id\":5,\"content\":"
    "\"</s>\",\"special\":true}],\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"vocab\":{"
    "\"\xE2\x96\x81\":0,\"\xE2\x96\x81Hi\":1,\"<0xC3>\":2,\"<0xA9>\":3,\"a\xE2\x96\x81\":4},"
    "\"merges\":[]}}";

Test(detokenizer, one_space_at_the_start_is_the_tokenizers_own) {
    check_decode(fallback_json, (int32_t[]){1, 1}, 2, true, "Hi Hi");
    check_decode(fallback_json, (int32_t[]){0, 1}, 2, true, " Hi");
    check_decode(fallback_json, (int32_t[]){4, 1}, 2, true, "a  Hi");
    check_decode(fallback_json, (int32_t[]){5, 1}, 2, true, "Hi"); /* a hidden token is no text */
    check_decode(fallback_json, (int32_t[]){5, 1}, 2, false, "</s> Hi");
}

Test(detokenizer, bytes_that_are_no_character_count_one_by_one) {
    check_decode(fallback_json, (int32_t[]){1, 2, 3, 1}, 4, true, "Hi\xC3\xA9 Hi");
    check_decode(fallback_json, (int32_t[]){1, 2, 1}, 3, true, "Hi\xEF\xBF\xBD Hi");
    check_decode(fallback_json, (int32_t[]){3, 3}, 2, true, "\xEF\xBF\xBD\xEF\xBF\xBD");
    check_decode(fallback_json, (int32_t[]){2}, 1, true, "\xEF\xBF\xBD");
    /* a special token between the bytes of a character parts them only when it is shown */
    check_decode(fallback_json, (int32_t[]){2, 5, 3}, 3, true, "\xC3\xA9");
    check_decode(fallback_json, (int32_t[]){2, 5, 3}, 3, false, "\xEF\xBF\xBD</s>\xEF\xBF\xBD");
}

Test(detokenizer, metaspace_keeps_the_first_space_when_none_was_prepended) {
#define METASPACE(scheme)                                                                       \
    "{\"decoder\":{\"type\":\"Metaspace\",\"replacement\":\"\xE2\x96\x81\"," scheme "},\"model\":" \
    "{\"type\":\"BPE\",\"vocab\":{\"\xE2\x96\x81Hi\":0},\"merges\":[]}}"
    check_decode(METASPACE("\"prepend_scheme\":\"always\""), (int32_t[]){0, 0}, 2, true, "Hi Hi");
    check_decode(METASPACE("\"prepend_scheme\":\"first\""), (int32_t[]){0, 0}, 2, true, "Hi Hi");
    check_decode(METASPACE("\"prepend_scheme\":\"never\""), (int32_t[]){0, 0}, 2, true, " Hi Hi");
    check_decode(METASPACE("\"add_prefix_space\":false"), (int32_t[]){0, 0}, 2, true, " Hi Hi");
    check_decode(METASPACE("\"add_prefix_space\":true"), (int32_t[]){0, 0}, 2, true, "Hi Hi");
#undef METASPACE
}

Test(detokenizer, ids_that_do_not_exist_are_nothing) {
    check_decode(fallback_json, (int32_t[]){-1, 1, 6, INT32_MAX, INT32_MIN, 1}, 6, true, "Hi Hi");
}
