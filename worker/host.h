/* What a rank finds under itself before it has a role: host, device, memory, cores. */
#pragma once
#include <stdint.h>

struct host_facts {
    char host[128];
    char device[64];       /* "cpu (avx512)" */
    int64_t memory_bytes;  /* the host's available memory, also when a cgroup limits it */
    int32_t cores;         /* this rank may run on */
};

void host_facts_read(struct host_facts *out, const char *device);
