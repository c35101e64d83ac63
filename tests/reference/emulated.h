/* What tests tell the emulator (kernels/emulation/order.h).
 * The module is found as kernels/module.c finds it: a second dlopen gives the same one. */
#pragma once
#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/beside.h"
#include "kernels/emulation/order.h"

static inline void *emulated_symbol(const char *name) {
    char path[4200];
    if (!beside_program(path, sizeof path, "tandem-cuda-emulated.so")) abort();
    void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    void *symbol = module != NULL ? dlsym(module, name) : NULL;
    if (symbol == NULL) {
        fprintf(stderr, "%s of %s: %s\n", name, path, dlerror());
        abort();
    }
    return symbol;
}

static inline void emulated_set_order(int order, uint32_t seed) {
    void (*set)(int, uint32_t);
    *(void **)&set = emulated_symbol("emulation_set_order");
    set(order, seed);
}

static inline void emulated_set_devices(int n_devices, int mapped) {
    void (*set)(int, int);
    *(void **)&set = emulated_symbol("emulation_set_devices");
    set(n_devices, mapped);
}

static inline bool emulated_peer_enabled(int from, int to) {
    int (*enabled)(int, int);
    *(void **)&enabled = emulated_symbol("emulation_peer_enabled");
    return enabled(from, to) != 0;
}

static inline uint64_t emulated_replays(void) {
    uint64_t (*replays)(void);
    *(void **)&replays = emulated_symbol("emulation_replays");
    return replays();
}
