/* tandem-bench engine: the whole engine in one process (ranks are threads), measured end to end.
 *
 * Every figure that compares is a ratio taken inside one pass: decoding, reading and verifying
 * alternate in short segments, and the median over passes is printed beside what was aimed at. */
#include "bench/engine.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/device.h"
#include "bench/machine.h"
#include "bench/series.h"
#include "common/clock.h"
#include "worker/local_group.h"
#include "worker/step_loop.h"

enum { DEVICE_COPY_BYTES = 256 << 20 };
enum { CONTEXT = 128, PREFILL = 512, STEPS_PER_SEGMENT = 8 };

struct settings {
    const char *model;
    int ranks, threads, passes;
    enum dtype weights;
    enum backend_isa isa;
    const char *csv;
};

/* --- forward passes of chosen sizes --------------------------------------------------------- */

/* Seconds of one pass of n_rows rows of one sequence at CONTEXT, with logits of `n_logits` rows. */
static double time_forward(struct local_group *group, int n_rows, int position, int n_logits) {
    int32_t tokens[PREFILL], rows[PREFILL], blocks[(CONTEXT + 2 * PREFILL) / BACKEND_KV_BLOCK];
    for (int i = 0; i < n_rows; i++) tokens[i] = 3 + (i * 7 + position) % 1000;
    for (int i = 0; i < n_logits; i++) rows[i] = n_rows - n_logits + i;
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) blocks[i] = (int32_t)i;
    struct backend_segment segment = {0, n_rows, position, blocks};
    struct transformer_batch batch = {tokens, n_rows, &segment, 1, rows, n_logits, 0, false};
    struct error err;
    float *logits;
    int64_t start = clock_now_ns();
    enum status status = engine_forward(local_group_engine(group), ENGINE_TARGET, &batch, &logits, &err);
    double seconds = (double)(clock_now_ns() - start) / 1e9;
    if (status != STATUS_OK) {
        fprintf(stderr, "tandem-bench engine: %s\n", err.text);
        exit(1);
    }
    return seconds;
}

static double time_segment(struct local_group *group, int n_rows) {
    double seconds = 0;
    for (int i = 0; i < STEPS_PER_SEGMENT; i++) {
        seconds += time_forward(group, n_rows, CONTEXT, n_rows);
    }
    return seconds / STEPS_PER_SEGMENT;
}

/* --- the step loop -------------------------------------------------------------------------- */

struct loop_times {
    double tokens_per_second;
    double overhead_us;    /* of a step, outside kernels */
    double overhead_share; /* of the step */
};

/* One request through scheduler, engine, sampling: what a step costs outside kernels. */
static struct loop_times time_step_loop(struct local_group *group, int n_tokens) {
    const struct model_config *config = local_group_config(group);
    struct step_loop_options options = {
        .engine = local_group_engine(group),
        .backend = local_group_backend(group),
        .config = config,
        .n_blocks = 128,
        .max_sequences = 16,
        .max_step_tokens = PREFILL,
        .max_context = config->max_position < 1024 ? config->max_position : 1024,
    };
    struct step_loop *loop = step_loop_create(&options);
    int32_t prompt[8] = {5, 6, 7, 8, 9, 10, 11, 12};
    struct step_request request = {
        .key = 1,
        .prompt = prompt,
        .n_prompt = 8,
        .sampling = {.temperature = 1, .top_p = 1, .repetition_penalty = 1, .seed = 1,
                     .n_logprobs = -1},
        .ignore_eos = true,
        .max_tokens = n_tokens + 1,
    };
    step_loop_submit(loop, &request);
    struct error err;
    CHECK(step_loop_step(loop, clock_now_ns(), &err) == STATUS_OK);
    struct transformer_times before = transformer_times(local_group_transformer(group));
    int64_t start = clock_now_ns();
    for (int i = 0; i < n_tokens; i++) {
        CHECK(step_loop_step(loop, clock_now_ns(), &err) == STATUS_OK);
    }
    double total_us = (double)(clock_now_ns() - start) / 1e3;
    struct transformer_times after = transformer_times(local_group_transformer(group));
    step_loop_destroy(loop);
    double kernels_us = (double)(after.kernels_ns - before.kernels_ns) / 1e3;
    return (struct loop_times){
        .tokens_per_second = n_tokens / (total_us / 1e6),
        .overhead_us = (total_us - kernels_us) / n_tokens,
        .overhead_share = (total_us - kernels_us) / total_us,
    };
}

/* --- the report ----------------------------------------------------------------------------- */

static FILE *csv_file;

static void row(const char *what, double value, const char *unit, const char *aim) {
    printf("  %-46s %10.3f %-9s %s\n", what, value, unit, aim);
    if (csv_file != NULL) fprintf(csv_file, "%s,%g,%s,%s\n", what, value, unit, aim);
}

/* Matrix work of one row: two operations for each weight outside the head. */
static double flops_per_row(const struct model_config *c) {
    double q = (double)c->n_heads * c->head_dim, kv = (double)c->n_kv_heads * c->head_dim;
    double layer = (double)c->hidden * (2 * q + 2 * kv) + 3.0 * c->hidden * c->intermediate;
    return 2 * layer * c->n_layers;
}

static void measure(struct local_group *group, const struct settings *settings) {
    const struct model_config *config = local_group_config(group);
    double weights = (double)transformer_memory(local_group_transformer(group)).weights_bytes;
    double all_weights = weights * settings->ranks; /* the shards are alike to a percent */
    int processors = settings->ranks * settings->threads;
    size_t bytes = (size_t)all_weights / 4096 * 4096;
    struct backend *backend = local_group_backend(group);
    bool device = backend_stream(backend) != NULL;
    char *buffer = device ? NULL : machine_alloc(bytes);

    struct series decode = {0}, fraction = {0}, bandwidth = {0}, cost8 = {0}, cost16 = {0},
                  prefill = {0}, overhead_us = {0}, overhead_share = {0}, sampled = {0};
    time_forward(group, PREFILL < config->max_position ? CONTEXT : 16, 0, 1);
    for (int pass = 0; pass < settings->passes; pass++) {
        double read_a = device ? device_bandwidth(backend, DEVICE_COPY_BYTES)
                               : machine_read_bandwidth(buffer, bytes, processors);
        double one = time_segment(group, 1);
        double read_b = device ? device_bandwidth(backend, DEVICE_COPY_BYTES)
                               : machine_read_bandwidth(buffer, bytes, processors);
        double eight = time_segment(group, 8);
        double sixteen = time_segment(group, 16);
        double one_again = time_segment(group, 1);
        double step = (one + one_again) / 2;
        double read = (read_a + read_b) / 2;
        series_add(&decode, 1 / step);
        series_add(&bandwidth, read / 1e9);
        series_add(&fraction, all_weights / one / read);
        series_add(&cost8, eight / step);
        series_add(&cost16, sixteen / step);
        double seconds = time_forward(group, PREFILL, 0, 1);
        series_add(&prefill, flops_per_row(config) * PREFILL / seconds / 1e9 / processors);
        struct loop_times loop = time_step_loop(group, 32);
        series_add(&overhead_us, loop.overhead_us);
        series_add(&overhead_share, 100 * loop.overhead_share);
        series_add(&sampled, loop.tokens_per_second);
    }
    if (!device) machine_free(buffer, bytes);

    printf("\n%s, %s weights (%.1f MB), %d rank%s x %d thread%s, %s, %d passes\n", config->name,
           dtype_name(settings->weights), all_weights / 1e6, settings->ranks,
           settings->ranks == 1 ? "" : "s", settings->threads, settings->threads == 1 ? "" : "s",
           backend_isa_name(local_group_backend(group)), settings->passes);
    printf("  %-46s %10s %-9s %s\n", "median of", "measured", "", "aimed at");
    row("forward passes of one row", series_median(&decode), "1/s", "");
    row("tokens, sampled at temperature 1", series_median(&sampled), "1/s", "");
    row(device ? "bandwidth of a copy inside the device" : "read bandwidth of a buffer of that size",
        series_median(&bandwidth), "GB/s", "");
    row("decode: weight bytes over that bandwidth", series_median(&fraction), "",
        device ? ">= 0.80" : ">= 0.88");
    row("cost of 8 rows against 1, c(8)", series_median(&cost8), "", "<= 1.05");
    row("cost of 16 rows against 1, c(16)", series_median(&cost16), "", "<= 1.15");
    row("prefill of 512 rows, per processor", series_median(&prefill), "GFLOP/s", ">= 1000 (AMX)");
    row("step outside kernels", series_median(&overhead_us), "us", "<= 60 (bundled model)");
    row("step outside kernels", series_median(&overhead_share), "%", "<= 5 (216m)");
}

static const char usage[] =
    "usage: tandem-bench engine --model DIR [options]\n"
    "\n"
    "Measures the engine end to end in one process: decoding against read bandwidth, the cost of\n"
    "8 and 16 rows against one, prefill, and what a step costs outside kernels.\n"
    "\n"
    "  --model DIR        a Hugging Face folder (tandem-bench make-model writes one)\n"
    "  --ranks N          tensor-parallel ranks, as threads: 1, 2, 4, 8          (1)\n"
    "  --threads N        compute threads of each rank                          (1)\n"
    "  --weights FORMAT   bf16, int8, or on GPUs fp8                            (bf16)\n"
    "  --isa NAME         auto, amx, avx512, avx2, portable, cuda, emulated     (auto)\n"
    "  --passes N         medians are over so many passes, 1..64                (9)\n"
    "  --csv FILE         appends the rows\n";

static bool parse(struct settings *settings, int argc, char **argv) {
    static const struct option options[] = {
        {"model", required_argument, NULL, 'm'},   {"ranks", required_argument, NULL, 'r'},
        {"threads", required_argument, NULL, 't'}, {"weights", required_argument, NULL, 'w'},
        {"isa", required_argument, NULL, 'i'},     {"passes", required_argument, NULL, 'p'},
        {"csv", required_argument, NULL, 'c'},     {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0}};
    *settings = (struct settings){NULL, 1, 1, 9, DTYPE_BF16, BACKEND_AUTO, NULL};
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        int isa = 0;
        switch (option) {
        case 'm': settings->model = optarg; break;
        case 'r': settings->ranks = atoi(optarg); break;
        case 't': settings->threads = atoi(optarg); break;
        case 'p': settings->passes = atoi(optarg); break;
        case 'c': settings->csv = optarg; break;
        case 'w':
            if (dtype_of_weights(optarg) < 0) return false;
            settings->weights = (enum dtype)dtype_of_weights(optarg);
            break;
        case 'i':
            isa = backend_isa_parse(optarg);
            if (isa < 0) return false;
            settings->isa = (enum backend_isa)isa;
            break;
        default: return false;
        }
    }
    return settings->model != NULL && settings->passes >= 1 && settings->passes <= SERIES_MAX &&
           settings->threads >= 1 && settings->ranks >= 1;
}

int bench_engine(int argc, char **argv) {
    if (argc == 2 && strcmp(argv[1], "--help") == 0) {
        fputs(usage, stdout);
        return 0;
    }
    struct settings settings;
    if (!parse(&settings, argc, argv)) {
        fputs(usage, stderr);
        return 2;
    }
    struct local_group_options options = {
        .model_dir = settings.model,
        .degree = settings.ranks,
        .isa = settings.isa,
        .n_threads = settings.threads,
        .weights = settings.weights,
        .n_blocks = 128,
        .max_rows = PREFILL,
        .max_logit_rows = 16,
        .max_sequences = 16,
        .max_context = 1024,
        .pin_ranks = settings.threads == 1,
    };
    struct local_group *group;
    struct error err;
    if (local_group_create(&group, &options, &err) != STATUS_OK) {
        fprintf(stderr, "tandem-bench engine: %s\n", err.text);
        return 1;
    }
    if (settings.csv != NULL && (csv_file = fopen(settings.csv, "a")) == NULL) {
        fprintf(stderr, "tandem-bench engine: --csv %s cannot be written\n", settings.csv);
        return 1;
    }
    machine_print();
    measure(group, &settings);
    if (csv_file != NULL) fclose(csv_file);
    local_group_destroy(group);
    return 0;
}
