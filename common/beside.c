#include "common/beside.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

bool beside_program(char *out, size_t size, const char *file) {
    static const char *const places[] = {"", "../bin/", "../lib/tandem/"};
    char program[4096];
    ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    if (n < 0) return false;
    program[n] = '\0';
    char *slash = strrchr(program, '/');
    if (slash != NULL) slash[1] = '\0';
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        int length = snprintf(out, size, "%s%s%s", program, places[i], file);
        if (length > 0 && (size_t)length < size && access(out, R_OK) == 0) return true;
    }
    return false;
}
