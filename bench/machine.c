#include "bench/machine.h"

#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/error.h"

void machine_print(void) {
    char model[128] = "unknown processor", line[512];
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        if (sscanf(line, "model name : %127[^\n]", model) == 1) break;
    }
    if (file != NULL) fclose(file);
    double load = -1;
    file = fopen("/proc/loadavg", "r");
    if (file != NULL && fscanf(file, "%lf", &load) != 1) load = -1;
    if (file != NULL) fclose(file);
    printf("machine: %s, %ld processors, load %.2f\n", model, sysconf(_SC_NPROCESSORS_ONLN), load);
}

void *machine_alloc(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    madvise(memory, bytes, MADV_HUGEPAGE);
    memset(memory, 1, bytes);
    return memory;
}

void machine_free(void *memory, size_t bytes) {
    munmap(memory, bytes);
}

typedef uint64_t lanes __attribute__((vector_size(64), may_alias));

static inline __attribute__((always_inline)) void read_streams(const char *at, size_t bytes,
                                                               const size_t n_streams) {
    size_t part = bytes / n_streams / 64 * 64;
    lanes sums[4] = {{0}};
    for (size_t i = 0; i < part; i += 64) {
        for (size_t s = 0; s < n_streams; s++) {
            const char *line = at + s * part + i;
            __builtin_prefetch(line + 1024, 0, 3);
            sums[s] += *(const lanes *)line;
        }
    }
    lanes all = sums[0] + sums[1] + sums[2] + sums[3];
    __asm__ volatile("" : : "r"(&all) : "memory");
}

__attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3"))) static void
read_share(const char *at, size_t bytes, int n_streams) {
    if (n_streams == 1) read_streams(at, bytes, 1);
    else read_streams(at, bytes, 4);
}

struct share {
    pthread_t thread;
    const char *memory;
    size_t bytes;
    int n_streams, processor_i;
};

static void *share_main(void *arg) {
    const struct share *share = arg;
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(share->processor_i % (int)sysconf(_SC_NPROCESSORS_ONLN), &cpus);
    pthread_setaffinity_np(pthread_self(), sizeof cpus, &cpus);
    read_share(share->memory, share->bytes, share->n_streams);
    return NULL;
}

void machine_read(const void *memory, size_t bytes, int n_streams, int n_threads) {
    enum { MAX_THREADS = 256 };
    CHECK(n_threads >= 1 && n_threads <= MAX_THREADS);
    if (n_threads == 1) {
        read_share(memory, bytes, n_streams);
        return;
    }
    struct share shares[MAX_THREADS];
    size_t part = bytes / (size_t)n_threads / 1024 * 1024;
    for (int i = 0; i < n_threads; i++) {
        shares[i] = (struct share){0, (const char *)memory + (size_t)i * part, part, n_streams, i};
        CHECK(pthread_create(&shares[i].thread, NULL, share_main, &shares[i]) == 0);
    }
    for (int i = 0; i < n_threads; i++) pthread_join(shares[i].thread, NULL);
}

double machine_read_bandwidth(const void *memory, size_t bytes, int n_threads) {
    double best = 0;
    for (int n_streams = 1; n_streams <= 4; n_streams += 3) {
        int64_t start = clock_now_ns();
        machine_read(memory, bytes, n_streams, n_threads);
        double rate = (double)bytes / ((double)(clock_now_ns() - start) / 1e9);
        if (rate > best) best = rate;
    }
    return best;
}
