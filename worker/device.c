#include "worker/device.h"

#include <stdio.h>
#include <string.h>

#include "common/device_name.h"
#include "worker/host.h"

static enum status resolve_cpu(struct device *out, enum backend_isa isa, struct error *err) {
    *out = (struct device){.isa = isa == BACKEND_AUTO ? backend_isa_best() : isa,
                           .memory_bytes = -1};
    snprintf(out->text, sizeof out->text, "cpu (%s)", backend_isa_to_name(out->isa));
    if (backend_isa_available(out->isa)) return STATUS_OK;
    return error_set(err, STATUS_FAILED_PRECONDITION,
                     "--isa %s is not available on this processor; the best here is %s",
                     backend_isa_to_name(out->isa), backend_isa_to_name(backend_isa_best()));
}

static enum status resolve_cuda(struct device *out, int index, struct error *err) {
    struct backend_device found;
    TRY(backend_device_probe(&found, BACKEND_CUDA, index, err));
    *out = (struct device){.isa = BACKEND_CUDA, .index = index, .memory_bytes = found.free_bytes};
    snprintf(out->text, sizeof out->text, "cuda:%d (%d.%d)", index, found.major, found.minor);
    return STATUS_OK;
}

static enum status resolve_emulated(struct device *out, struct error *err) {
    struct backend_device found;
    TRY(backend_device_probe(&found, BACKEND_EMULATED, 0, err));
    *out = (struct device){.isa = BACKEND_EMULATED, .text = "emulated", .memory_bytes = -1};
    return STATUS_OK;
}

enum status device_resolve(struct device *out, const char *wanted, enum backend_isa isa,
                           int local_rank, struct error *err) {
    TRY(device_name_check(wanted, err));
    bool any = strcmp(wanted, "auto") == 0 || strcmp(wanted, "cuda") == 0;
    if (strcmp(wanted, "cpu") == 0) return resolve_cpu(out, isa, err);
    if (strcmp(wanted, "emulated") == 0) return resolve_emulated(out, err);
    if (!any) return resolve_cuda(out, device_name_index(wanted), err);
    bool may_be_cpu = strcmp(wanted, "auto") == 0;
    if (may_be_cpu && isa != BACKEND_AUTO) return resolve_cpu(out, isa, err);
    struct backend_device all;
    enum status status = backend_device_probe(&all, BACKEND_CUDA, -1, err);
    if (status == STATUS_OK) status = resolve_cuda(out, local_rank % all.n_devices, err);
    return status != STATUS_OK && may_be_cpu ? resolve_cpu(out, isa, err) : status;
}

static void list_one(FILE *out, const struct device *device) {
    struct host_facts host;
    host_facts_read(&host, device->text);
    int64_t bytes = device->memory_bytes >= 0 ? device->memory_bytes : host.memory_bytes;
    fprintf(out, "%-20s %9.1f GiB free\n", device->text, (double)bytes / (1024.0 * 1024 * 1024));
}

void device_list(FILE *out) {
    struct error err;
    struct device device;
    struct backend_device all;
    int n = backend_device_probe(&all, BACKEND_CUDA, -1, &err) == STATUS_OK ? all.n_devices : 0;
    for (int i = 0; i < n; i++) {
        if (resolve_cuda(&device, i, &err) == STATUS_OK) list_one(out, &device);
        else fprintf(out, "%s\n", err.text);
    }
    if (resolve_cpu(&device, BACKEND_AUTO, &err) == STATUS_OK) list_one(out, &device);
    if (resolve_emulated(&device, &err) == STATUS_OK) list_one(out, &device);
}
