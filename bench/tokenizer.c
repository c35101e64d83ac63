/* tandem-bench tokenizer: megabytes per second of encoding and decoding a text on one core. */
#include "bench/tokenizer.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/machine.h"
#include "bench/series.h"
#include "common/clock.h"
#include "model/tokenizer.h"

enum { PASSES = 7 };

/* The whole file; the caller frees. NULL when it cannot be read. */
static char *read_text(const char *path, size_t *n) {
    FILE *file = strcmp(path, "-") == 0 ? stdin : fopen(path, "r");
    if (file == NULL) return NULL;
    size_t capacity = 1 << 20;
    char *text = xmalloc(capacity);
    *n = 0;
    for (size_t got; (got = fread(text + *n, 1, capacity - *n, file)) > 0;) {
        *n += got;
        if (*n == capacity) text = xrealloc(text, capacity *= 2);
    }
    if (file != stdin) fclose(file);
    return text;
}

static double seconds_since(int64_t start_ns) {
    return (double)(clock_now_ns() - start_ns) / 1e9;
}

static double decode(const struct tokenizer *tokenizer, const struct token_list *list) {
    struct detokenizer *detokenizer = detokenizer_create(tokenizer, false);
    const char *text;
    size_t n;
    int64_t start = clock_now_ns();
    for (size_t i = 0; i < list->n; i++) detokenizer_push(detokenizer, list->ids[i], &text, &n);
    double seconds = seconds_since(start);
    detokenizer_free(detokenizer);
    return seconds;
}

static int measure(const char *dir, const char *text, size_t n) {
    struct tokenizer *tokenizer;
    struct error err;
    int64_t start = clock_now_ns();
    if (tokenizer_load(&tokenizer, dir, &err) != STATUS_OK) {
        fprintf(stderr, "tandem-bench tokenizer: %s\n", err.text);
        return 1;
    }
    double load = seconds_since(start);
    struct series encoding = {0}, decoding = {0};
    struct token_list list = {0};
    for (int pass = 0; pass < PASSES; pass++) {
        list.n = 0;
        start = clock_now_ns();
        if (tokenizer_encode(tokenizer, &list, text, n, false, &err) != STATUS_OK) {
            fprintf(stderr, "tandem-bench tokenizer: %s\n", err.text);
            return 1;
        }
        series_add(&encoding, (double)n / seconds_since(start) / 1e6);
        series_add(&decoding, (double)n / decode(tokenizer, &list) / 1e6);
    }
    printf("%s: loaded in %.0f ms; %.1f MB are %zu tokens; encode %.1f MB/s (aimed at >= 3), decode "
           "%.1f MB/s, medians of %d\n",
           dir, load * 1e3, (double)n / 1e6, list.n, series_median(&encoding),
           series_median(&decoding), PASSES);
    token_list_free(&list);
    tokenizer_free(tokenizer);
    return 0;
}

static const char usage[] =
    "usage: tandem-bench tokenizer --input FILE DIR...\n"
    "\n"
    "Encodes and decodes a text with the tokenizers of the folders, on one core.\n"
    "\n"
    "  --input FILE     UTF-8 text; - is standard input\n";

int bench_tokenizer(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "--help") == 0) {
        fputs(usage, stdout);
        return 0;
    }
    static const struct option options[] = {{"input", required_argument, NULL, 'i'},
                                            {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    const char *input = NULL;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (option == 'i') input = optarg;
        else optind = argc;
    }
    if (input == NULL || optind >= argc) {
        fputs(usage, stderr);
        return 2;
    }
    size_t n;
    char *text = read_text(input, &n);
    if (text == NULL) {
        fprintf(stderr, "tandem-bench tokenizer: %s cannot be read\n", input);
        return 1;
    }
    machine_print();
    int code = 0;
    for (int i = optind; i < argc && code == 0; i++) code = measure(argv[i], text, n);
    free(text);
    return code;
}
