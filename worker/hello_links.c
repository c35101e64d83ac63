#include "worker/hello_links.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/log.h"
#include "worker/comm/comm_links.h"
#include "worker/comm/comm_tensors.h"

/* The emulated device moves bytes one by one, and there is nothing to learn of it. */
enum { LONG_BYTES = 256 * 1024, EMULATED_LONG_BYTES = 16 * 1024, BUDGET_NS = 100 * 1000 * 1000 };

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
static enum status measure_devices(struct comm_link *links, const struct hello_devices *devices,
                                   struct error *err) {
    enum { ROWS = 8, WIDTH = 64 };
    size_t long_bytes = devices->isa == BACKEND_EMULATED ? EMULATED_LONG_BYTES : LONG_BYTES;
    struct backend *backend = NULL;
    struct comm *tensors = NULL;
    char *buffer = NULL;
    enum status status;
    struct backend_options options = {devices->isa, 1, ROWS, WIDTH, devices->device};
    TRY(backend_create(&backend, &options, err));
    struct comm_tensors_options way = {"test", backend, devices->isa, devices->device,
                                       devices->shares_device, devices->one_process};
    TRY_OR_FAIL(comm_tensors_create(&tensors, devices->group, &way, err));
    size_t bytes = (size_t)(1 + comm_size(devices->group)) * long_bytes;
    buffer = backend_alloc(backend, bytes);
    if (buffer == NULL) {
        status = error_set(err, STATUS_RESOURCE_EXHAUSTED, "no %zu bytes of device memory to test links",
                           bytes);
        goto fail;
    }
    backend_zero(backend, buffer, bytes);
    struct comm_links_options links_options = {tensors, devices->group, buffer, long_bytes, BUDGET_NS};
    status = comm_links_measure(links, &links_options, err);

fail:
    backend_free(backend, buffer);
    comm_destroy(tensors);
    backend_destroy(backend);
    return status;
}

struct outcome {
    enum status status;
    char text[600];
};

/* The same on all ranks, which end the test together. *measured: on all; else rank 0 says why not. */
static enum status try_devices(bool *measured, struct comm_link *links, struct comm *world,
                               const struct hello_devices *devices, struct error *err) {
    struct error why;
    struct outcome mine = {measure_devices(links, devices, &why), ""};
    if (mine.status != STATUS_OK) {
        snprintf(mine.text, sizeof mine.text, "%s", why.text);
        comm_abort(devices->group, why.text);
    }
    int size = comm_size(world), culprit = -1;
    struct outcome *all = xcalloc((size_t)size, sizeof *all);
    enum status status = comm_all_gather(world, all, &mine, sizeof mine, err);
    for (int i = 0; i < size && status == STATUS_OK; i++) {
        if (all[i].status == STATUS_OK) continue;
        /* Those that only heard of it stand behind the one that knows. */
        if (culprit < 0 || all[culprit].status == STATUS_ABORTED) culprit = i;
    }
    *measured = status == STATUS_OK && culprit < 0;
    if (culprit >= 0 && comm_rank(world) == 0) {
        log_warn("the links between devices were not measured: rank %d: %s", culprit, all[culprit].text);
    }
    free(all);
    return status;
}

static void tell(const struct comm_link *links, int size, const char *what) {
    struct comm_link slowest = comm_links_slowest(links, size);
    log_info("the slowest of %d links between %s: %.1f us, %.2f GB/s", size * (size - 1), what,
             (double)slowest.latency_ns / 1e3, slowest.bytes_per_second / 1e9);
}

static enum status measure(struct hello_links *out, struct comm_link *links, struct comm *world,
                           const struct hello_devices *devices, struct error *err) {
    int size = comm_size(world);
    size_t n = (size_t)size * (size_t)size;
    bool leads = comm_rank(world) == 0, measured = true;
    TRY(measure_hosts(links, world, err));
    if (leads) tell(links, size, "ranks");
    if (devices != NULL) {
        struct comm_link *between = xcalloc(n, sizeof *between);
        enum status status = try_devices(&measured, between, world, devices, err);
        if (leads && measured) {
            tell(between, size, "their devices");
            fill_host(&out->message, links, n);
            memcpy(links, between, n * sizeof *links);
        }
        free(between);
        TRY(status);
    }
    if (leads && measured) fill(&out->message, links, n);
    return STATUS_OK;
}

enum status hello_links_measure(struct hello_links *out, struct comm *world,
                                const struct hello_devices *devices, struct error *err) {
    size_t size = (size_t)comm_size(world);
    tandem__v1__links__init(&out->message);
    if (size == 1) return STATUS_OK;
    struct comm_link *links = xcalloc(size * size, sizeof *links);
    enum status status = measure(out, links, world, devices, err);
    free(links);
    return status;
}

void hello_links_free(struct hello_links *links) {
    free(links->message.latency_ns);
    free(links->message.gigabytes_per_second);
    free(links->message.host_latency_ns);
    *links = (struct hello_links){0};
}
