/* tandem-bench kernels: one layer's product at a time, cold.
 *
 * Weights of one shape are made several times over until they exceed the last-level cache by far; a
 * pass goes through all of them. Reading the same bytes and multiplying by 1, 2, 4, 8 and 16 rows
 * alternate inside one pass, and ratios are taken there. */
#include "bench/kernels.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/cold_weights.h"
#include "bench/machine.h"
#include "bench/series.h"
#include "common/clock.h"
#include "kernels/backend.h"

enum { PREFILL = 512 };

struct settings {
    enum backend_isa isa;
    int threads, passes;
    size_t bytes;
    const char *csv;
};

/* The products of the 216 M model, and the square one that others publish. */
static const struct cold_shape shapes[] = {
    {"qkv 2048 x 1024", 2048, 1024, 1},
    {"o 1024 x 1024, 8 leaves", 1024, 1024, 8},
    {"gate_up 6144 x 1024", 6144, 1024, 1},
    {"down 1024 x 3072, 8 leaves", 1024, 3072, 8},
    {"head 32000 x 1024", 32000, 1024, 1},
    {"4096 x 4096", 4096, 4096, 1},
};

struct bench {
    const struct settings *settings;
    struct backend *backend;
    struct cold_weights weights;
    float *in, *out;
    char *buffer;
    size_t bytes; /* of the buffer: the weights' but for a piece of a page */
};

/* Seconds for n_copies at n_rows. */
static double multiply(struct bench *b, int n_rows, int n_copies) {
    int64_t start = clock_now_ns();
    cold_weights_multiply(&b->weights, b->out, b->in, n_rows, n_copies);
    return (double)(clock_now_ns() - start) / 1e9;
}

static double read_all(struct bench *b) {
    return (double)b->bytes /
           machine_read_bandwidth(b->buffer, b->bytes, b->settings->threads);
}

static FILE *csv_file;

static void measure(struct bench *b, const struct cold_shape *shape, enum dtype format) {
    struct error err;
    CHECK(cold_weights_make(&b->weights, b->backend, shape, format, b->settings->bytes, &err) == STATUS_OK);
    b->bytes = b->weights.bytes / 4096 * 4096;
    b->buffer = machine_alloc(b->bytes);
    struct series read = {0}, fraction = {0}, cost[COLD_N_ROWS] = {{{0}, 0}}, prefill = {0};
    multiply(b, 1, b->weights.n_copies);
    for (int pass = 0; pass < b->settings->passes; pass++) {
        double before = read_all(b), one = multiply(b, 1, b->weights.n_copies), after = read_all(b);
        series_add(&read, (double)b->bytes / before / 1e9);
        series_add(&fraction, (before + after) / 2 / one);
        for (int i = 1; i < COLD_N_ROWS; i++) {
            double some = multiply(b, cold_rows[i], b->weights.n_copies);
            series_add(&cost[i], some / ((one + multiply(b, 1, b->weights.n_copies)) / 2));
        }
        double flops = 2.0 * shape->n * shape->k * PREFILL;
        series_add(&prefill, flops / multiply(b, PREFILL, 1) / 1e9 / b->settings->threads);
    }
    printf("  %-28s %-5s %7.1f %9.2f %7.2f %6.2f %6.2f %6.2f %10.0f\n", shape->name,
           dtype_name(format), series_median(&read), series_median(&fraction),
           series_median(&cost[1]), series_median(&cost[2]), series_median(&cost[3]),
           series_median(&cost[4]), series_median(&prefill));
    if (csv_file != NULL) {
        fprintf(csv_file, "%s,%s,%s,%d,%g,%g,%g,%g,%g,%g,%g\n", backend_isa_name(b->backend),
                shape->name, dtype_name(format), b->settings->threads, series_median(&read),
                series_median(&fraction), series_median(&cost[1]), series_median(&cost[2]),
                series_median(&cost[3]), series_median(&cost[4]), series_median(&prefill));
    }
    machine_free(b->buffer, b->bytes);
    cold_weights_free(&b->weights);
}

static const char usage[] =
    "usage: tandem-bench kernels [options]\n"
    "\n"
    "Matrix products on weights that no cache holds, against reading as many bytes.\n"
    "\n"
    "  --isa NAME       auto, amx, avx512, avx2, portable      (auto)\n"
    "  --threads N      compute threads                        (1)\n"
    "  --passes N       medians are over so many, 1..64        (7)\n"
    "  --megabytes N    weights of one shape in all            (256)\n"
    "  --csv FILE       appends the rows\n";

static bool parse(struct settings *settings, int argc, char **argv) {
    static const struct option options[] = {
        {"isa", required_argument, NULL, 'i'},       {"threads", required_argument, NULL, 't'},
        {"passes", required_argument, NULL, 'p'},    {"csv", required_argument, NULL, 'c'},
        {"megabytes", required_argument, NULL, 'm'}, {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0}};
    *settings = (struct settings){BACKEND_AUTO, 1, 7, (size_t)256 << 20, NULL};
    int isa = 0;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (option) {
        case 'i': isa = backend_isa_parse(optarg); break;
        case 't': settings->threads = atoi(optarg); break;
        case 'p': settings->passes = atoi(optarg); break;
        case 'm': settings->bytes = (size_t)atoi(optarg) << 20; break;
        case 'c': settings->csv = optarg; break;
        default: return false;
        }
    }
    settings->isa = (enum backend_isa)isa;
    return isa >= 0 && settings->threads >= 1 && settings->passes >= 1 &&
           settings->passes <= SERIES_MAX && settings->bytes >= (size_t)1 << 20;
}

int bench_kernels(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "--help") == 0) {
        fputs(usage, stdout);
        return 0;
    }
    struct settings settings;
    if (!parse(&settings, argc, argv)) {
        fputs(usage, stderr);
        return 2;
    }
    struct backend_options options = {settings.isa, settings.threads, PREFILL, 32000, 0};
    struct bench bench = {.settings = &settings};
    struct error err;
    if (backend_create(&bench.backend, &options, &err) != STATUS_OK) {
        fprintf(stderr, "tandem-bench kernels: %s\n", err.text);
        return 1;
    }
    if (settings.csv != NULL && (csv_file = fopen(settings.csv, "a")) == NULL) {
        fprintf(stderr, "tandem-bench kernels: --csv %s cannot be written\n", settings.csv);
        return 1;
    }
    bench.in = backend_alloc(bench.backend, (size_t)PREFILL * 4096 * sizeof(float));
    bench.out = backend_alloc(bench.backend, (size_t)PREFILL * 32000 * sizeof(float));
    for (int i = 0; i < PREFILL * 4096; i++) bench.in[i] = (float)(i % 1999) / 1000 - 1;
    machine_print();
    printf("%s, %d thread%s, medians of %d passes\n\n", backend_isa_name(bench.backend),
           settings.threads, settings.threads == 1 ? "" : "s", settings.passes);
    printf("  %-28s %-5s %7s %9s %7s %6s %6s %6s %10s\n", "product", "", "read", "fraction", "c(2)",
           "c(4)", "c(8)", "c(16)", "prefill");
    printf("  %-28s %-5s %7s %9s %7s %6s %6s %6s %10s\n", "", "", "GB/s", "of it", "", "", "", "",
           "GFLOP/s/thr");
    printf("  %-28s %-5s %7s %9s %7s %6s %6s %6s %10s\n", "aimed at (AMX)", "", "", ">= 0.88", "", "",
           "<=1.05", "<=1.15", ">= 1000");
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        measure(&bench, &shapes[i], DTYPE_BF16);
        measure(&bench, &shapes[i], DTYPE_I8);
    }
    if (csv_file != NULL) fclose(csv_file);
    backend_free(bench.backend, bench.in);
    backend_free(bench.backend, bench.out);
    backend_destroy(bench.backend);
    return 0;
}
