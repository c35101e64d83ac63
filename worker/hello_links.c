#include "worker/hello_links.h"

#include <stdlib.h>

#include "common/log.h"
#include "worker/comm/comm_links.h"

enum { LONG_BYTES = 256 * 1024, BUDGET_NS = 100 * 1000 * 1000 };

static void fill(Tandem__V1__Links *message, const struct comm_link *links, size_t n) {
    message->n_latency_ns = message->n_gigabytes_per_second = n;
    message->latency_ns = xcalloc(n, sizeof *message->latency_ns);
    message->gigabytes_per_second = xcalloc(n, sizeof *message->gigabytes_per_second);
    for (size_t i = 0; i < n; i++) {
        int64_t latency = links[i].latency_ns;
        message->latency_ns[i] = latency < UINT32_MAX ? (uint32_t)latency : UINT32_MAX;
        message->gigabytes_per_second[i] = (float)(links[i].bytes_per_second / 1e9);
    }
}

enum status hello_links_measure(struct hello_links *out, struct comm *world, struct error *err) {
    int size = comm_size(world);
    size_t n = (size_t)size * (size_t)size;
    tandem__v1__links__init(&out->message);
    if (size == 1) return STATUS_OK;
    struct comm_link *links = xcalloc(n, sizeof *links);
    char *buffer = xcalloc(1, LONG_BYTES);
    struct comm_links_options options = {world, world, buffer, LONG_BYTES, BUDGET_NS};
    enum status status = comm_links_measure(links, &options, err);
    if (status == STATUS_OK && comm_rank(world) == 0) {
        struct comm_link slowest = comm_links_slowest(links, size);
        log_info("the slowest of %d links: %.1f us, %.2f GB/s", size * (size - 1),
                 (double)slowest.latency_ns / 1e3, slowest.bytes_per_second / 1e9);
        fill(&out->message, links, n);
    }
    free(buffer);
    free(links);
    return status;
}

void hello_links_free(struct hello_links *links) {
    free(links->message.latency_ns);
    free(links->message.gigabytes_per_second);
    *links = (struct hello_links){0};
}
