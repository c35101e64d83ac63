/* UTF-8 against the WHATWG decoder, a second definition of the same: its state machine is written
 * out here and says which bytes are characters and where one U+FFFD stands. */
#include "model/utf8.h"

#include <stdbool.h>
#include <string.h>

#include "tests/unit/test.h"

/* Length of the next unit of text[0..n); *valid: a character, otherwise bytes that one U+FFFD
 * replaces; *cut: more bytes could still complete it. */
static int whatwg_next(const unsigned char *text, int n, bool *valid, bool *cut) {
    unsigned char lower = 0x80, upper = 0xBF, lead = text[0];
    int needed = 0;
    *valid = *cut = false;
    if (lead < 0x80) {
        *valid = true;
        return 1;
    }
    if (lead >= 0xC2 && lead <= 0xDF) needed = 1;
    else if (lead >= 0xE0 && lead <= 0xEF) needed = 2;
    else if (lead >= 0xF0 && lead <= 0xF4) needed = 3;
    else return 1;
    if (lead == 0xE0) lower = 0xA0;
    if (lead == 0xED) upper = 0x9F;
    if (lead == 0xF0) lower = 0x90;
    if (lead == 0xF4) upper = 0x8F;
    for (int i = 1; i <= needed; i++) {
        if (i == n) {
            *cut = true;
            return i;
        }
        if (text[i] < lower || text[i] > upper) return i;
        lower = 0x80;
        upper = 0xBF;
    }
    *valid = true;
    return needed + 1;
}

static void check(const unsigned char *bytes, int n) {
    const char *text = (const char *)bytes;
    bool valid, cut;
    int run = whatwg_next(bytes, n, &valid, &cut);
    int expected = valid ? run : cut ? -1 : 0;
    int seen = utf8_length(text, (size_t)n);
    cr_assert(seen == expected, "%02x %02x %02x %02x of %d: %d, expected %d", bytes[0], bytes[1],
              bytes[2], bytes[3], n, seen, expected);
    cr_assert(utf8_invalid_length(text, (size_t)n) == (valid && run > 1 ? run : valid ? 1 : run),
              "%02x %02x %02x %02x of %d", bytes[0], bytes[1], bytes[2], bytes[3], n);
}

/* Every lead byte with second to fourth bytes on both sides of every border. */
Test(utf8, every_border) {
    static const unsigned char borders[] = {0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0,
                                            0xBF, 0xC0, 0xC2, 0xE0, 0xED, 0xF4, 0xFF};
    enum { N = sizeof borders };
    for (int lead = 0; lead < 256; lead++) {
        for (int i = 0; i < N * N * N; i++) {
            unsigned char bytes[4] = {(unsigned char)lead, borders[i % N], borders[i / N % N],
                                      borders[i / N / N]};
            for (int n = 1; n <= 4; n++) check(bytes, n);
        }
    }
}

Test(utf8, every_character_is_valid) {
    for (unsigned c = 0; c <= 0x10FFFF; c++) {
        if (c >= 0xD800 && c <= 0xDFFF) continue;
        char text[4];
        int n = 0;
        if (c < 0x80) {
            text[n++] = (char)c;
        } else if (c < 0x800) {
            text[n++] = (char)(0xC0 | c >> 6);
        } else if (c < 0x10000) {
            text[n++] = (char)(0xE0 | c >> 12);
        } else {
            text[n++] = (char)(0xF0 | c >> 18);
            text[n++] = (char)(0x80 | (c >> 12 & 0x3F));
        }
        if (c >= 0x800) text[n++] = (char)(0x80 | (c >> 6 & 0x3F));
        if (c >= 0x80) text[n++] = (char)(0x80 | (c & 0x3F));
        cr_assert(utf8_length(text, (size_t)n) == n, "U+%04X", c);
        cr_assert(utf8_check(text, (size_t)n) == (size_t)n, "U+%04X", c);
    }
}

Test(utf8, check_finds_the_first_bad_byte) {
    static const struct {
        const char *text;
        size_t n, first_bad;
    } cases[] = {
        {"", 0, 0},
        {"abc", 3, 3},
        {"a\xC3\xA9z", 4, 4},
        {"ab\xC3", 3, 2},              /* cut off */
        {"\xC0\x80", 2, 0},            /* overlong NUL */
        {"x\xED\xA0\x80", 4, 1},       /* surrogate */
        {"\xF4\x90\x80\x80", 4, 0},    /* past U+10FFFF */
        {"\xE2\x96\x81\x80", 4, 3},    /* a stray continuation */
        {"\0\xC3\xA9\0", 4, 4},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t seen = utf8_check(cases[i].text, cases[i].n);
        cr_assert(seen == cases[i].first_bad, "case %zu: %zu", i, seen);
    }
}
