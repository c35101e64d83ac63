#include "worker/comm/comm_device.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "worker/comm/comm_device_module.h"

enum { PATH_BYTES = 4200 };

static bool find_beside_program(char *out, const char *file) {
    static const char *const places[] = {"", "../bin/", "../lib/tandem/"};
    char program[PATH_BYTES - 100];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    if (n < 0) return false;
    program[n] = '\0';
    char *slash = strrchr(program, '/');
    if (slash != NULL) slash[1] = '\0';
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        snprintf(out, PATH_BYTES, "%s%s%s", program, places[i], file);
        if (access(out, R_OK) == 0) return true;
    }
    return false;
}

static bool is_of_this_build(const struct comm_device_module *module) {
    return module->version == COMM_DEVICE_VERSION && module->comm_bytes == sizeof(struct comm) &&
           module->ops_bytes == sizeof(struct comm_ops) &&
           module->options_bytes == sizeof(struct comm_nccl_options) &&
           module->error_bytes == sizeof(struct error);
}

enum status comm_device_open(const struct comm_device_module **out, const char *path,
                             struct error *err) {
    char found[PATH_BYTES];
    *out = NULL;
    if (path == NULL && !find_beside_program(found, "tandem-nccl.so")) {
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
