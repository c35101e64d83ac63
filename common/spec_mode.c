#include "common/spec_mode.h"

#include <string.h>

static const char *const names[SPEC_N_MODES] = {"plain", "sd", "easyspec", "pearl", "pearl+lp"};

const char *spec_mode_name(enum spec_mode mode) {
    return names[mode];
}

int spec_mode_parse(const char *name) {
    for (int i = 0; i < SPEC_N_MODES; i++) {
        if (strcmp(name, names[i]) == 0) return i;
    }
    return -1;
}
