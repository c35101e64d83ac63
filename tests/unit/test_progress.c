/* What is shown while weights load. */
#include <string.h>

#include "tests/unit/test.h"
#include "worker/progress.h"

Test(progress, says_how_far_and_how_fast) {
    char text[128];
    progress_text(text, sizeof text, 8000000000u, 16000000000u, 4000000000LL);
    cr_assert_str_eq(text, "[###############...............]  50 %  8.0 of 16.0 GB, 2.0 GB/s");
    progress_text(text, sizeof text, 0, 16000000000u, 0);
    cr_assert_str_eq(text, "[..............................]   0 %  0.0 of 16.0 GB, 0.0 GB/s");
    progress_text(text, sizeof text, 5, 5, 1);
    cr_assert(strncmp(text, "[##############################] 100 %", 38) == 0);
}

/* What loads at once is not worth a line: the first call starts the clock. */
Test(progress, starts_silently) {
    struct progress progress = {0, 0};
    progress_show(&progress, 1, 1);
    cr_assert(progress.start_ns != 0 && progress.shown_ns == progress.start_ns);
}
