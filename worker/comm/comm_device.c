#include "worker/comm/comm_device.h"

#include <dlfcn.h>

#include "common/beside.h"
#include "worker/comm/comm_device_module.h"

static bool is_of_this_build(const struct comm_device_module *module) {
    return module->version == COMM_DEVICE_VERSION && module->comm_bytes == sizeof(struct comm) &&
           module->ops_bytes == sizeof(struct comm_ops) &&
           module->options_bytes == sizeof(struct comm_nccl_options) &&
           module->error_bytes == sizeof(struct error);
}

enum status comm_device_open(const struct comm_device_module **out, const char *path,
                             struct error *err) {
    char found[4200];
    *out = NULL;
    if (path == NULL && !beside_program(found, sizeof found, "tandem-nccl.so")) {
        return error_set(err, STATUS_UNAVAILABLE,
                         "tandem-nccl.so is not beside this program: build Tandem where CUDA and "
                         "NCCL are installed, or copy the module next to the binary");
    }
    if (path == NULL) path = found;
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL) {
        return error_set(err, STATUS_UNAVAILABLE,
                         "the module for ranks on devices cannot be loaded, install what it misses: %s",
                         dlerror());
    }
    const struct comm_device_module *module = dlsym(handle, COMM_DEVICE_SYMBOL);
    if (module == NULL || !is_of_this_build(module)) {
        dlclose(handle);
        return error_set(err, STATUS_UNAVAILABLE,
                         "%s is of another build than this program: install both from one build",
                         path);
    }
    *out = module;
    return STATUS_OK;
}

enum status comm_device_create(struct comm **out, const struct comm_device_module *module,
                               struct comm *bootstrap, void *stream,
                               const struct comm_nccl_options *options, struct error *err) {
    return module->create(out, bootstrap, stream, options, err);
}
