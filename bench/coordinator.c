#include "bench/coordinator.h"

#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench/stub_replica.h"
#include "common/clock.h"

#include "tandem/v1/generation.pb-c.h"

static const double AIM_TOKENS_PER_SECOND = 50000, AIM_TTFT_MS = 2;

struct bench {
    const char *model, *program;
    int n_streams, n_tokens, n_probes;
    char ports_file[64];
    pid_t pid;
    int port;
    struct rpc_channel *clients, *replica;
    struct stub_replica *stub;
    atomic_long received, chunks;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int n_closed, n_failed;
    char failure[640];
    int64_t first_chunk_ns;   /* of the stream that is probed */
};

/* ---- the process under test ------------------------------------------------------------------ */

/* On a core of its own, so that what is measured is one core's work. */
static void run_coordinator(const struct bench *bench) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(0, &one);
    sched_setaffinity(0, sizeof one, &one);
    execl(bench->program, bench->program, "--model", bench->model, "--port", "0", "--http-port", "0",
          "--ports-file", bench->ports_file, "--max-queue-requests", "65536", "--log-level", "warn",
          (char *)NULL);
    fprintf(stderr, "tandem-bench: cannot run %s: %s\n", bench->program, strerror(errno));
    _exit(127);
}

static enum status start_coordinator(struct bench *bench, struct error *err) {
    snprintf(bench->ports_file, sizeof bench->ports_file, "/tmp/tandem-bench-%d.json", (int)getpid());
    unlink(bench->ports_file);
    bench->pid = fork();
    if (bench->pid == 0) run_coordinator(bench);
    if (bench->pid < 0) {
        return error_set(err, STATUS_INTERNAL, "cannot start a process: %s", strerror(errno));
    }
    for (int i = 0; i < 3000; i++) {
        json_t *ports = json_load_file(bench->ports_file, 0, NULL);
        bench->port = (int)json_integer_value(json_object_get(ports, "grpc_port"));
        json_decref(ports);
        if (bench->port != 0) return STATUS_OK;
        int code;
        if (waitpid(bench->pid, &code, WNOHANG) != 0) {
            bench->pid = 0;
            return error_set(err, STATUS_UNAVAILABLE, "%s ended before it listened", bench->program);
        }
        clock_sleep_ns(10000000);
    }
    return error_set(err, STATUS_UNAVAILABLE, "%s did not listen within 30 s", bench->program);
}

/* CPU seconds the coordinator has used. */
static double cpu_seconds(pid_t pid) {
    char path[64], text[1024];
    unsigned long user = 0, system = 0;
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *file = fopen(path, "r");
    if (file == NULL) return 0;
    size_t n = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[n] = '\0';
    const char *after_name = strrchr(text, ')');
    if (after_name == NULL) return 0;
    sscanf(after_name + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system);
    return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

/* ---- clients --------------------------------------------------------------------------------- */

static void on_chunk(struct rpc_stream *stream, const ProtobufCMessage *message, void *user) {
    (void)stream;
    struct bench *bench = user;
    const Tandem__V1__GenerateChunk *chunk = (const Tandem__V1__GenerateChunk *)message;
    if (chunk->n_token_ids == 0) return;
    if (bench->first_chunk_ns == 0) bench->first_chunk_ns = clock_now_ns();
    atomic_fetch_add(&bench->received, (long)chunk->n_token_ids);
    atomic_fetch_add(&bench->chunks, 1);
}

static void on_closed(struct rpc_stream *stream, const struct error *end, void *user) {
    (void)stream;
    struct bench *bench = user;
    pthread_mutex_lock(&bench->lock);
    bench->n_closed++;
    if (end->status != STATUS_OK) {
        bench->n_failed++;
        snprintf(bench->failure, sizeof bench->failure, "%s", end->text);
    }
    pthread_cond_signal(&bench->changed);
    pthread_mutex_unlock(&bench->lock);
}

static enum status open_stream(struct bench *bench, struct rpc_stream **stream, const char *prompt,
                               uint32_t max_tokens, struct error *err) {
    struct rpc_stream_callbacks callbacks = {
        .on_message = on_chunk, .on_closed = on_closed, .user = bench};
    Tandem__V1__SamplingParams sampling = TANDEM__V1__SAMPLING_PARAMS__INIT;
    Tandem__V1__GenerateRequest request = TANDEM__V1__GENERATE_REQUEST__INIT;
    sampling.max_tokens__case = TANDEM__V1__SAMPLING_PARAMS__MAX_TOKENS__MAX_TOKENS;
    sampling.max_tokens = max_tokens;
    request.input_case = TANDEM__V1__GENERATE_REQUEST__INPUT_TEXT;
    request.text = (ProtobufCBinaryData){strlen(prompt), (uint8_t *)prompt};
    request.sampling = &sampling;
    TRY(rpc_stream_open(stream, bench->clients, "/tandem.v1.Generation/Generate",
                        &tandem__v1__generate_chunk__descriptor, 0, &callbacks, err));
    rpc_stream_send(*stream, &request.base);
    rpc_stream_half_close(*stream);
    return STATUS_OK;
}

/* Waits until n streams have ended. */
static enum status await_closed(struct bench *bench, int n, struct error *err) {
    pthread_mutex_lock(&bench->lock);
    while (bench->n_closed < n) pthread_cond_wait(&bench->changed, &bench->lock);
    bench->n_closed = 0;
    enum status status = STATUS_OK;
    if (bench->n_failed > 0) {
        status = error_set(err, STATUS_INTERNAL, "%d of %d streams failed: %s", bench->n_failed, n,
                           bench->failure);
    }
    pthread_mutex_unlock(&bench->lock);
    return status;
}

/* ---- measurements ---------------------------------------------------------------------------- */

static void report(const char *what, double measured, double aim, bool more_is_better,
                   const char *unit) {
    bool met = more_is_better ? measured >= aim : measured <= aim;
    printf("%-46s %10.2f %-9s aim %s %g: %s\n", what, measured, unit, more_is_better ? ">=" : "<=",
           aim, met ? "met" : "missed");
}

static enum status measure_throughput(struct bench *bench, struct error *err) {
    enum status status = STATUS_OK;
    struct rpc_stream **streams = xcalloc((size_t)bench->n_streams, sizeof *streams);
    long tokens_before = atomic_load(&bench->received), chunks_before = atomic_load(&bench->chunks);
    double cpu_before = cpu_seconds(bench->pid);
    int64_t begin_ns = clock_now_ns();
    int n_open = 0;
    while (n_open < bench->n_streams && status == STATUS_OK) {
        status = open_stream(bench, &streams[n_open], "Once upon a time", (uint32_t)bench->n_tokens,
                             err);
        n_open += status == STATUS_OK;
    }
    enum status ended = await_closed(bench, n_open, err);
    if (status == STATUS_OK) status = ended;
    double seconds = (double)(clock_now_ns() - begin_ns) / 1e9;
    double cpu = cpu_seconds(bench->pid) - cpu_before;
    double tokens = (double)(atomic_load(&bench->received) - tokens_before);
    double chunks = (double)(atomic_load(&bench->chunks) - chunks_before);
    for (int i = 0; i < n_open; i++) rpc_stream_destroy(streams[i]);
    free(streams);
    if (status != STATUS_OK) return status;
    printf("%d streams of %d tokens: %.2f s, %.2f tokens per chunk, coordinator %.2f CPU s\n",
           bench->n_streams, bench->n_tokens, seconds, tokens / chunks, cpu);
    report("streamed tokens per second", tokens / seconds, AIM_TOKENS_PER_SECOND, true, "tokens/s");
    return STATUS_OK;
}

static int compare_times(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static enum status measure_ttft(struct bench *bench, struct error *err) {
    enum status status = STATUS_OK;
    char prompt[513];
    for (int i = 0; i < 512; i++) prompt[i] = "the little boat "[i % 16];
    prompt[512] = '\0';
    int64_t *times = xcalloc((size_t)bench->n_probes, sizeof *times);
    for (int i = 0; i < bench->n_probes && status == STATUS_OK; i++) {
        struct rpc_stream *stream;
        bench->first_chunk_ns = 0;
        int64_t begin_ns = clock_now_ns();
        status = open_stream(bench, &stream, prompt, 1, err);
        if (status != STATUS_OK) break;
        status = await_closed(bench, 1, err);
        times[i] = bench->first_chunk_ns - begin_ns;
        rpc_stream_destroy(stream);
    }
    if (status == STATUS_OK) {
        qsort(times, (size_t)bench->n_probes, sizeof *times, compare_times);
        double median = (double)times[bench->n_probes / 2] / 1e6;
        printf("%d requests of 512 bytes, one at a time: p99 %.2f ms\n", bench->n_probes,
               (double)times[bench->n_probes * 99 / 100] / 1e6);
        report("time to first token, median, no compute", median, AIM_TTFT_MS, false, "ms");
    }
    free(times);
    return status;
}

/* ---- the subcommand -------------------------------------------------------------------------- */

static enum status connect_all(struct bench *bench, struct error *err) {
    char target[32];
    struct rpc_channel_options options = rpc_channel_options_default();
    options.wait_for_ready = true;
    snprintf(target, sizeof target, "127.0.0.1:%d", bench->port);
    TRY(rpc_channel_create(&bench->clients, target, &options, err));
    /* Another option value, so that gRPC does not share one connection between the two. */
    options.reconnect_backoff_max_ms++;
    TRY(rpc_channel_create(&bench->replica, target, &options, err));
    struct stub_options stub = {.max_sequences = 4096, .token = 5, .received = &bench->received,
                                .ahead = 4};
    TRY(stub_start(&bench->stub, bench->replica, &stub, err));
    /* Ready has been sent; it is served once a first request gets through. */
    clock_sleep_ns(200000000);
    return STATUS_OK;
}

static enum status run(struct bench *bench, struct error *err) {
    TRY(start_coordinator(bench, err));
    TRY(connect_all(bench, err));
    TRY(measure_ttft(bench, err));
    return measure_throughput(bench, err);
}

static void stop(struct bench *bench) {
    stub_stop(bench->stub);
    rpc_channel_destroy(bench->clients);
    rpc_channel_destroy(bench->replica);
    if (bench->pid > 0) {
        kill(bench->pid, SIGTERM);
        waitpid(bench->pid, NULL, 0);
    }
    unlink(bench->ports_file);
}

static int usage(FILE *out, int code) {
    fputs("Usage: tandem-bench coordinator --model DIR [--streams N] [--tokens N] [--probes N]\n"
          "                                [--coordinator PROGRAM]\n"
          "\n"
          "Streams tokens from a stand-in replica through tandem-coordinator to N clients (128) of\n"
          "N tokens each (1000), and measures the time to first token of N requests (500).\n",
          out);
    return code;
}

static bool parse_count(const char *text, int *out) {
    char *end;
    long value = strtol(text, &end, 10);
    *out = (int)value;
    return *text != '\0' && *end == '\0' && value > 0 && value <= 1000000;
}

int bench_coordinator(int argc, char **argv) {
    static const struct option options[] = {
        {"model", required_argument, NULL, 'm'},   {"streams", required_argument, NULL, 's'},
        {"tokens", required_argument, NULL, 't'},  {"probes", required_argument, NULL, 'p'},
        {"coordinator", required_argument, NULL, 'c'}, {"help", no_argument, NULL, 'h'}, {0}};
    char beside[4096] = "";
    struct bench bench = {.n_streams = 128, .n_tokens = 1000, .n_probes = 500};
    ssize_t n = readlink("/proc/self/exe", beside, sizeof beside - 32);
    char *slash = n > 0 ? strrchr(beside, '/') : NULL;
    strcpy(slash != NULL ? slash + 1 : beside, "tandem-coordinator");
    bench.program = beside;
    bool fine = true;
    for (int id; (id = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (id == 'h') return usage(stdout, 0);
        else if (id == 'm') bench.model = optarg;
        else if (id == 'c') bench.program = optarg;
        else if (id == 's') fine &= parse_count(optarg, &bench.n_streams);
        else if (id == 't') fine &= parse_count(optarg, &bench.n_tokens);
        else if (id == 'p') fine &= parse_count(optarg, &bench.n_probes);
        else fine = false;
    }
    if (!fine || bench.model == NULL || optind < argc) return usage(stderr, 2);
    struct utsname machine;
    struct error err;
    uname(&machine);
    printf("coordinator, on %s (%s)\n", machine.nodename, machine.machine);
    pthread_mutex_init(&bench.lock, NULL);
    pthread_cond_init(&bench.changed, NULL);
    enum status status = run(&bench, &err);
    stop(&bench);
    if (status == STATUS_OK) return 0;
    fprintf(stderr, "tandem-bench coordinator: %s\n", err.text);
    return 1;
}
