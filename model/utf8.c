#include "model/utf8.h"

/* Range of the second byte after a lead byte (Unicode 15, table 3-7); 0 length: no lead byte. */
struct lead {
    int length;
    unsigned char low, high;
};

static struct lead lead_of(unsigned char byte) {
    if (byte < 0x80) return (struct lead){1, 0, 0};
    if (byte >= 0xC2 && byte <= 0xDF) return (struct lead){2, 0x80, 0xBF};
    if (byte == 0xE0) return (struct lead){3, 0xA0, 0xBF};
    if (byte == 0xED) return (struct lead){3, 0x80, 0x9F};
    if (byte >= 0xE1 && byte <= 0xEF) return (struct lead){3, 0x80, 0xBF};
    if (byte == 0xF0) return (struct lead){4, 0x90, 0xBF};
    if (byte >= 0xF1 && byte <= 0xF3) return (struct lead){4, 0x80, 0xBF};
    if (byte == 0xF4) return (struct lead){4, 0x80, 0x8F};
    return (struct lead){0, 0, 0};
}

/* How many bytes belong together from text[0]; *wanted: how many a whole character would have. */
static int run_of(const char *text, size_t n, int *wanted) {
    const unsigned char *bytes = (const unsigned char *)text;
    struct lead lead = lead_of(bytes[0]);
    *wanted = lead.length;
    if (lead.length <= 1) return 1;
    int run = 1;
    while (run < lead.length && (size_t)run < n) {
        unsigned char low = run == 1 ? lead.low : 0x80, high = run == 1 ? lead.high : 0xBF;
        if (bytes[run] < low || bytes[run] > high) break;
        run++;
    }
    return run;
}

int utf8_length(const char *text, size_t n) {
    int wanted;
    int run = run_of(text, n, &wanted);
    if (wanted == 0) return 0;
    if (run == wanted) return run;
    return (size_t)run == n ? -1 : 0;
}

int utf8_invalid_length(const char *text, size_t n) {
    int wanted;
    return run_of(text, n, &wanted);
}

size_t utf8_check(const char *text, size_t n) {
    size_t at = 0;
    while (at < n) {
        if ((unsigned char)text[at] < 0x80) {
            at++;
            continue;
        }
        int length = utf8_length(text + at, n - at);
        if (length <= 0) return at;
        at += (size_t)length;
    }
    return n;
}
