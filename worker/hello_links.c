#include "worker/hello_links.h"

#include <stdlib.h>

#include "common/log.h"
#include "worker/comm/comm_links.h"
#include "worker/comm/comm_tensors.h"

enum { LONG_BYTES = 256 * 1024, BUDGET_NS = 100 * 1000 * 1000 };

static uint32_t nanoseconds(const struct comm_link *link) {
    return link->latency_ns < UINT32_MAX ? (uint32_t)link->latency_ns : UINT32_MAX;
}

static void fill(Tandem__V1__Links *message, const struct comm_link *links, size_t n) {
    message->n_latency_ns = message->n_gigabytes_per_second = n;
    message->latency_ns = xcalloc(n, sizeof *message->latency_ns);
    message->gigabytes_per_second = xcalloc(n, sizeof *message->gigabytes_per_second);
    for (size_t i = 0; i < n; i++) {
        message->latency_ns[i] = nanoseconds(&links[i]);
        message->gigabytes_per_second[i] = (float)(links[i].bytes_per_second / 1e9);
    }
}

static void fill_host(Tandem__V1__Links *message, const struct comm_link *links, size_t n) {
    message->n_host_latency_ns = n;
    message->host_latency_ns = xcalloc(n, sizeof *message->host_latency_ns);
    for (size_t i = 0; i < n; i++) message->host_latency_ns[i] = nanoseconds(&links[i]);
}

static enum status measure_hosts(struct comm_link *links, struct comm *world, struct error *err) {
    char *buffer = xcalloc(1, LONG_BYTES);
    struct comm_links_options options = {world, world, buffer, LONG_BYTES, BUDGET_NS};
    enum status status = comm_links_measure(links, &options, err);
    free(buffer);
    return status;
}

/* With a backend that computes nothing. */
static enum status measure_devices(struct comm_link *links, struct comm *world,
                                   const struct hello_devices *devices, struct error *err) {
    enum { ROWS = 8, WIDTH = 64 };
    struct backend *backend = NULL;
    struct comm *tensors = NULL;
    char *buffer = NULL;
    enum status status;
    struct backend_options options = {devices->isa, 1, ROWS, WIDTH, devices->device};
    TRY(backend_create(&backend, &options, err));
    struct comm_tensors_options way = {"test", backend, devices->isa, devices->device,
                                       devices->shares_device, devices->one_process};
    TRY_OR_FAIL(comm_tensors_create(&tensors, world, &way, err));
    size_t bytes = (size_t)(1 + comm_size(world)) * LONG_BYTES;
    buffer = backend_alloc(backend, bytes);
    if (buffer == NULL) {
        status = error_set(err, STATUS_RESOURCE_EXHAUSTED, "no %zu bytes of device memory to test links",
                           bytes);
        goto fail;
    }
    backend_zero(backend, buffer, bytes);
    struct comm_links_options links_options = {tensors, world, buffer, LONG_BYTES, BUDGET_NS};
    status = comm_links_measure(links, &links_options, err);

fail:
    backend_free(backend, buffer);
    comm_destroy(tensors);
    backend_destroy(backend);
    return status;
}

static void tell(const struct comm_link *links, int size, const char *what) {
    struct comm_link slowest = comm_links_slowest(links, size);
    log_info("the slowest of %d links between %s: %.1f us, %.2f GB/s", size * (size - 1), what,
             (double)slowest.latency_ns / 1e3, slowest.bytes_per_second / 1e9);
}

enum status hello_links_measure(struct hello_links *out, struct comm *world,
                                const struct hello_devices *devices, struct error *err) {
    int size = comm_size(world);
    size_t n = (size_t)size * (size_t)size;
    tandem__v1__links__init(&out->message);
    if (size == 1) return STATUS_OK;
    struct comm_link *links = xcalloc(n, sizeof *links);
    bool leads = comm_rank(world) == 0;
    enum status status = measure_hosts(links, world, err);
    if (status == STATUS_OK && leads) tell(links, size, "ranks");
    if (status == STATUS_OK && leads && devices != NULL) fill_host(&out->message, links, n);
    if (status == STATUS_OK && devices != NULL) {
        status = measure_devices(links, world, devices, err);
        if (status == STATUS_OK && leads) tell(links, size, "their devices");
    }
    if (status == STATUS_OK && leads) fill(&out->message, links, n);
    free(links);
    return status;
}

void hello_links_free(struct hello_links *links) {
    free(links->message.latency_ns);
    free(links->message.gigabytes_per_second);
    free(links->message.host_latency_ns);
    *links = (struct hello_links){0};
}
