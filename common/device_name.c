#include "common/device_name.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

int device_name_index(const char *name) {
    if (strncmp(name, "cuda:", 5) != 0 || !isdigit((unsigned char)name[5])) return -1;
    char *end;
    long index = strtol(name + 5, &end, 10);
    return *end == '\0' && index < 1024 ? (int)index : -1;
}

enum status device_name_check(const char *name, struct error *err) {
    static const char *const words[] = {"auto", "cpu", "cuda", "emulated"};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        if (strcmp(name, words[i]) == 0) return STATUS_OK;
    }
    if (device_name_index(name) >= 0) return STATUS_OK;
    return error_set(err, STATUS_INVALID_ARGUMENT,
                     "--device is \"%s\", expected auto, cpu, cuda, cuda:K or emulated", name);
}
