/* The exactness suite (speculation.md 5): its parts by name. `logit bits` is
 * tests/unit/test_logit_bits.c.
 *
 *   lossless_suite PART [--full] [--seed N] [--isa NAME]
 *   PART: lossless, law, calibration, ends, sync */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/lossless/parts.h"

static const struct part {
    const char *name;
    int (*run)(const struct part_options *options);
} parts[] = {
    {"lossless", part_lossless}, {"law", part_law}, {"calibration", part_calibration},
    {"ends", part_ends},         {"sync", part_sync},
};

int main(int argc, char **argv) {
    struct part_options options = {.seed = 1};
    for (int i = 2; i < argc; i++) {
        if (strcmp(argv[i], "--full") == 0) options.full = true;
        else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) options.seed = strtoull(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--isa") == 0 && i + 1 < argc && backend_isa_parse(argv[i + 1]) >= 0) {
            options.isa = (enum backend_isa)backend_isa_parse(argv[++i]);
        } else argc = 0;
    }
    for (size_t i = 0; argc >= 2 && i < sizeof parts / sizeof *parts; i++) {
        if (strcmp(argv[1], parts[i].name) != 0) continue;
        int failures = parts[i].run(&options);
        printf("%s: %d failures (seed %llu)\n", argv[1], failures,
               (unsigned long long)options.seed);
        return failures != 0;
    }
    fprintf(stderr, "usage: lossless_suite lossless|law|calibration|ends|sync [--full] [--seed N] [--isa NAME]\n");
    return 2;
}
