#include "bench/device.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/cold_weights.h"
#include "bench/series.h"
#include "common/clock.h"

enum { MAX_ROWS = 512, MAX_WIDTH = 28672 };

/* Products of a layer, on one device and as the shard of one rank of eight. */
static const struct cold_shape shapes[] = {
    {"8B qkv", 6144, 4096, 1},
    {"8B o", 4096, 4096, 8},
    {"8B gate_up", 28672, 4096, 1},
    {"8B down", 4096, 14336, 8},
    {"8B head / 4", 32064, 4096, 1},
    {"70B/8 qkv", 1280, 8192, 1},
    {"70B/8 o", 8192, 1024, 1},
    {"70B/8 gate_up", 7168, 8192, 1},
    {"70B/8 down", 8192, 3584, 1},
};

struct settings {
    enum backend_isa isa;
    int device, passes;
    size_t bytes;
    const char *csv;
    bool quick;
};

struct bench {
    const struct settings *settings;
    struct backend *backend;
    float *in, *out;
    double bandwidth;
    FILE *csv;
};

static void must(enum status status, const struct error *err) {
    if (status == STATUS_OK) return;
    fprintf(stderr, "tandem-bench device: %s\n", err->text);
    exit(1);
}

static void wait_for(struct bench *b) {
    struct error err;
    must(backend_wait(b->backend, &err), &err);
}

double device_bandwidth(struct backend *backend, size_t bytes) {
    enum { ROUNDS = 5, COPIES = 4 };
    struct error err;
    double best = 0;
    char *from = backend_alloc(backend, bytes), *to = backend_alloc(backend, bytes);
    CHECK(from != NULL && to != NULL);
    for (int round = 0; round < ROUNDS; round++) {
        must(backend_wait(backend, &err), &err);
        int64_t start = clock_now_ns();
        for (int i = 0; i < COPIES; i++) backend_copy(backend, to, from, bytes);
        must(backend_wait(backend, &err), &err);
        double rate = 2.0 * COPIES * (double)bytes / ((double)(clock_now_ns() - start) / 1e9);
        if (rate > best) best = rate;
    }
    backend_free(backend, from);
    backend_free(backend, to);
    return best;
}

/* --- products: cold weights, as many copies as fill the bytes -------------------------------------------- */

static double run_products(struct bench *b, const struct cold_weights *weights, int n_rows, int n_copies) {
    wait_for(b);
    int64_t start = clock_now_ns();
    cold_weights_multiply(weights, b->out, b->in, n_rows, n_copies);
    wait_for(b);
    return (double)(clock_now_ns() - start) / 1e9;
}

static void measure_product(struct bench *b, const struct cold_shape *shape, enum dtype format) {
    struct cold_weights weights;
    struct series times[COLD_N_ROWS] = {{{0}, 0}}, prefill = {0};
    struct error err;
    must(cold_weights_make(&weights, b->backend, shape, format, b->settings->bytes, &err), &err);
    int n_copies = weights.n_copies;
    double bytes = (double)weights.bytes;
    run_products(b, &weights, 1, n_copies);
    for (int pass = 0; pass < b->settings->passes; pass++) {
        for (int i = 0; i < COLD_N_ROWS; i++) {
            series_add(&times[i], run_products(b, &weights, cold_rows[i], n_copies));
        }
        series_add(&prefill, run_products(b, &weights, MAX_ROWS, 1));
    }
    printf("  %-14s %-5s %8.1f", shape->name, dtype_name(format),
           1e6 * series_median(&times[0]) / n_copies);
    for (int i = 0; i < COLD_N_ROWS; i++) {
        printf(" %7.2f", bytes / series_median(&times[i]) / b->bandwidth);
    }
    double flops = 2.0 * shape->n * shape->k * MAX_ROWS / series_median(&prefill) / 1e12;
    printf(" %9.1f\n", flops);
    if (b->csv != NULL) {
        for (int i = 0; i < COLD_N_ROWS; i++) {
            fprintf(b->csv, "product,%s,%s,%s,%d,%.3f,%.4f\n", backend_isa_name(b->backend),
                    shape->name, dtype_name(format), cold_rows[i],
                    1e6 * series_median(&times[i]) / n_copies,
                    bytes / series_median(&times[i]) / b->bandwidth);
        }
        fprintf(b->csv, "prefill,%s,%s,%s,%d,%.3f,%.1f\n", backend_isa_name(b->backend), shape->name,
                dtype_name(format), MAX_ROWS, 1e6 * series_median(&prefill), flops);
    }
    cold_weights_free(&weights);
}

/* --- attention: 32 query heads over 8 KV heads of 128 ------------------------------------------------------ */

static void measure_attention(struct bench *b, int context, int n_rows) {
    enum { HEADS = 32, KV = 8, DIM = 128, LAYERS = 16, WIDTH = (HEADS + 2 * KV) * DIM };
    int n_blocks = context / BACKEND_KV_BLOCK + 1, kv_of_head[HEADS];
    int32_t *blocks = xcalloc((size_t)n_blocks, sizeof *blocks);
    struct kv_cache *caches[LAYERS];
    struct error err;
    struct series times = {0};
    for (int i = 0; i < n_blocks; i++) blocks[i] = i;
    for (int i = 0; i < HEADS; i++) kv_of_head[i] = i / (HEADS / KV);
    for (int i = 0; i < LAYERS; i++) {
        must(backend_kv_create(&caches[i], b->backend, n_blocks, KV, DIM, &err), &err);
    }
    struct backend_segment segment = {0, n_rows, context - n_rows, blocks};
    struct backend_pass pass = {.n_rows = n_rows, .segments = &segment, .n_segments = 1};
    for (int i = 0; i <= b->settings->passes; i++) {
        backend_pass_begin(b->backend, &pass);
        wait_for(b);
        int64_t start = clock_now_ns();
        for (int layer = 0; layer < LAYERS; layer++) {
            backend_attention(b->backend, b->out, b->in, WIDTH, caches[layer], kv_of_head, HEADS, 0);
        }
        wait_for(b);
        if (i > 0) series_add(&times, (double)(clock_now_ns() - start) / LAYERS / 1e9);
    }
    double bytes = 2.0 * context * KV * DIM * 2, seconds = series_median(&times);
    printf("  %8d %5d %9.1f %9.2f\n", context, n_rows, 1e6 * seconds, bytes / seconds / b->bandwidth);
    if (b->csv != NULL) {
        fprintf(b->csv, "attention,%s,context %d,bf16,%d,%.3f,%.4f\n", backend_isa_name(b->backend),
                context, n_rows, 1e6 * seconds, bytes / seconds / b->bandwidth);
    }
    for (int i = 0; i < LAYERS; i++) backend_kv_free(caches[i]);
    free(blocks);
}

/* --- the command -------------------------------------------------------------------------------------------- */

static const char usage[] =
    "usage: tandem-bench device [options]\n"
    "\n"
    "Kernels of the CUDA backend against the bandwidth of the device's memory (a copy inside it):\n"
    "products of Llama-3.1-8B, and of 70B on eight ranks, with cold weights; attention by context.\n"
    "\n"
    "  --isa NAME       cuda or emulated                       (cuda)\n"
    "  --device K       which                                  (0)\n"
    "  --passes N       medians are over so many, 1..64        (9)\n"
    "  --megabytes N    weights of one shape in all            (2048)\n"
    "  --quick          two shapes, one context: only to see that it runs\n"
    "  --csv FILE       appends the rows\n";

static bool parse(struct settings *s, int argc, char **argv) {
    static const struct option options[] = {
        {"isa", required_argument, NULL, 'i'},    {"device", required_argument, NULL, 'd'},
        {"passes", required_argument, NULL, 'p'}, {"megabytes", required_argument, NULL, 'm'},
        {"csv", required_argument, NULL, 'c'},    {"quick", no_argument, NULL, 'q'},
        {NULL, 0, NULL, 0}};
    *s = (struct settings){.isa = BACKEND_CUDA, .passes = 9, .bytes = (size_t)2048 << 20};
    int isa = BACKEND_CUDA;
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (option) {
        case 'i': isa = backend_isa_parse(optarg); break;
        case 'd': s->device = atoi(optarg); break;
        case 'p': s->passes = atoi(optarg); break;
        case 'm': s->bytes = (size_t)atoi(optarg) << 20; break;
        case 'c': s->csv = optarg; break;
        case 'q': s->quick = true; break;
        default: return false;
        }
    }
    s->isa = (enum backend_isa)isa;
    return (isa == BACKEND_CUDA || isa == BACKEND_EMULATED) && s->passes >= 1 &&
           s->passes <= SERIES_MAX && s->bytes >= (size_t)1 << 20;
}

static void run(struct bench *b) {
    const struct settings *s = b->settings;
    static const enum dtype formats[] = {DTYPE_BF16, DTYPE_I8, DTYPE_F8};
    int n_shapes = s->quick ? 1 : (int)(sizeof shapes / sizeof *shapes);
    printf("%s: memory copies at %.0f GB/s, read and written; medians of %d passes\n\n",
           backend_isa_name(b->backend), b->bandwidth / 1e9, s->passes);
    printf("  %-14s %-5s %8s   fraction of that bandwidth at rows (aim 0.85)\n", "product", "",
           "us, 1");
    printf("  %-14s %-5s %8s %7d %7d %7d %7d %7d %9s\n", "", "", "row", 1, 2, 4, 8, 16, "TFLOP/s");
    for (int i = 0; i < n_shapes; i++) {
        for (int f = 0; f < (s->quick ? 1 : 3); f++) measure_product(b, &shapes[5 * s->quick + i], formats[f]);
    }
    printf("\n  %8s %5s %9s %9s\n", "context", "rows", "us", "fraction");
    for (int context = 1024; context <= (s->quick ? 1024 : 32768); context *= 2) {
        measure_attention(b, context, 1);
        if (!s->quick) measure_attention(b, context, 8);
    }
}

int bench_device(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "--help") == 0) {
        fputs(usage, stdout);
        return 0;
    }
    struct settings settings;
    if (!parse(&settings, argc, argv)) {
        fputs(usage, stderr);
        return 2;
    }
    struct backend_options options = {settings.isa, 1, MAX_ROWS, MAX_WIDTH, settings.device};
    struct bench b = {.settings = &settings};
    struct error err;
    must(backend_create(&b.backend, &options, &err), &err);
    if (settings.csv != NULL && (b.csv = fopen(settings.csv, "a")) == NULL) {
        fprintf(stderr, "tandem-bench device: --csv %s cannot be written\n", settings.csv);
        return 1;
    }
    size_t n = (size_t)MAX_ROWS * MAX_WIDTH;
    float *values = xmalloc(n * sizeof *values);
    for (size_t i = 0; i < n; i++) values[i] = (float)(i * 40503u % 1999) / 1000 - 1;
    b.in = backend_alloc(b.backend, n * sizeof *b.in);
    b.out = backend_alloc(b.backend, (size_t)MAX_ROWS * 32064 * sizeof *b.out);
    CHECK(b.in != NULL && b.out != NULL);
    backend_copy_in(b.backend, b.in, values, n * sizeof *values);
    free(values);
    b.bandwidth = device_bandwidth(b.backend, settings.quick ? (size_t)16 << 20 : (size_t)1 << 30);
    run(&b);
    if (b.csv != NULL) fclose(b.csv);
    backend_free(b.backend, b.in);
    backend_free(b.backend, b.out);
    backend_destroy(b.backend);
    return 0;
}
