/* The modes of speculation by name (speculation.md 4), as coordinator and workers both see them.
 *
 * A mode is two choices: whether draft and target compute at the same time (overlapped), and whether
 * the draft's layers run several at once (layer-parallel, EasySpec). Pure. */
#pragma once
#include <stdbool.h>

enum spec_mode {
    SPEC_PLAIN,    /* the target alone */
    SPEC_SD,       /* draft, then verify */
    SPEC_EASYSPEC, /* draft layer-parallel, then verify */
    SPEC_PEARL,    /* draft while verifying */
    SPEC_PEARL_LP, /* draft layer-parallel while verifying */
    SPEC_N_MODES
};

enum { SPEC_MAX_WINDOW = 16 }; /* tokens that one round may draft for a sequence */
enum { SPEC_MAX_LAYER_WIDTH = 4 };

const char *spec_mode_name(enum spec_mode mode);
/* "plain", "sd", "easyspec", "pearl", "pearl+lp" → mode, or -1. */
int spec_mode_parse(const char *name);

static inline bool spec_mode_overlapped(enum spec_mode mode) {
    return mode == SPEC_PEARL || mode == SPEC_PEARL_LP;
}

static inline bool spec_mode_layer_parallel(enum spec_mode mode) {
    return mode == SPEC_EASYSPEC || mode == SPEC_PEARL_LP;
}
