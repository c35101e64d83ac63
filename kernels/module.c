/* Choosing and opening a backend: the CPU's is compiled in, a device's is a module beside the program
 * (or in ../bin, ../lib/tandem of it), opened when it is asked for. */
#include <dlfcn.h>
#include <string.h>

#include "common/beside.h"
#include "kernels/backend_ops.h"

static const char *const names[BACKEND_N_ISAS] = {"auto", "portable", "avx2",    "avx512",
                                                  "amx",  "cuda",     "emulated"};

const char *backend_isa_to_name(enum backend_isa isa) {
    return names[isa];
}

int backend_isa_parse(const char *name) {
    for (int i = 0; i < BACKEND_N_ISAS; i++) {
        if (strcmp(name, names[i]) == 0) return i;
    }
    return -1;
}

static const char *file_of(enum backend_isa isa) {
    return isa == BACKEND_CUDA ? "tandem-cuda.so" : "tandem-cuda-emulated.so";
}

static void *open_beside_program(const char *file) {
    char path[4200];
    return beside_program(path, sizeof path, file) ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
}

/* The module stays open: a device's driver does not like to be unloaded. */
static enum status open_module(const struct backend_module **out, enum backend_isa isa,
                               struct error *err) {
    const char *file = file_of(isa);
    *out = NULL;
    void *handle = open_beside_program(file);
    if (handle == NULL) {
        bool cuda = isa == BACKEND_CUDA;
        const char *why = dlerror();
        if (why == NULL) {
            why = cuda ? "is not beside the program; it is built where nvcc is found"
                       : "is not beside the program; it is built on x86-64";
        }
        return error_set(err, STATUS_UNAVAILABLE, "no %s device here: %s %s", cuda ? "CUDA" : "emulated",
                         file, why);
    }
    const struct backend_module *module = dlsym(handle, BACKEND_MODULE_SYMBOL);
    if (module == NULL || module->version != BACKEND_MODULE_VERSION ||
        module->ops_bytes != sizeof(struct backend_ops)) {
        return error_set(err, STATUS_UNAVAILABLE, "%s is of another build than this program", file);
    }
    *out = module;
    return STATUS_OK;
}

static bool is_device(enum backend_isa isa) {
    return isa == BACKEND_CUDA || isa == BACKEND_EMULATED;
}

enum status backend_device_probe(struct backend_device *out, enum backend_isa isa, int device,
                                 struct error *err) {
    const struct backend_module *module = NULL;
    CHECK(is_device(isa));
    TRY(open_module(&module, isa, err));
    return module->probe(out, device, err);
}

bool backend_isa_available(enum backend_isa isa) {
    struct error err;
    struct backend_device device;
    if (!is_device(isa)) return cpu_isa_available(isa);
    return backend_device_probe(&device, isa, 0, &err) == STATUS_OK;
}

enum status backend_create(struct backend **out, const struct backend_options *options,
                           struct error *err) {
    if (!is_device(options->isa)) return cpu_backend_create(out, options, err);
    const struct backend_module *module = NULL;
    TRY(open_module(&module, options->isa, err));
    return module->create(out, options, err);
}
