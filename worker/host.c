#include "worker/host.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* One number out of a one-line file; -1 when there is none ("max", no such file). */
static int64_t read_number(const char *path) {
    FILE *file = fopen(path, "r");
    if (file == NULL) return -1;
    long long value = -1;
    if (fscanf(file, "%lld", &value) != 1) value = -1;
    fclose(file);
    return value;
}

static int64_t available_bytes(void) {
    FILE *file = fopen("/proc/meminfo", "r");
    if (file == NULL) return -1;
    char line[256];
    long long kib = -1;
    while (fgets(line, sizeof line, file) != NULL) {
        if (sscanf(line, "MemAvailable: %lld kB", &kib) == 1) break;
    }
    fclose(file);
    return kib < 0 ? -1 : kib * 1024;
}

/* In a container the cgroup's limit is what counts. */
static int64_t cgroup_left_bytes(void) {
    int64_t limit = read_number("/sys/fs/cgroup/memory.max");
    int64_t used = read_number("/sys/fs/cgroup/memory.current");
    if (limit < 0 || used < 0) return -1;
    return limit > used ? limit - used : 0;
}

void host_facts_read(struct host_facts *out, const char *device) {
    memset(out, 0, sizeof *out);
    if (gethostname(out->host, sizeof out->host - 1) != 0) strcpy(out->host, "unknown");
    snprintf(out->device, sizeof out->device, "%s", device);
    int64_t host = available_bytes();
    int64_t cgroup = cgroup_left_bytes();
    out->memory_bytes = cgroup >= 0 && (host < 0 || cgroup < host) ? cgroup : host;
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    out->cores = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
}
