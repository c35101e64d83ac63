#include "worker/progress.h"

#include <stdbool.h>
#include <stdio.h>
#include <unistd.h>

#include "common/clock.h"
#include "common/log.h"

enum { WIDTH = 30 };

#define BAR_NS 200000000LL
#define LINE_NS 5000000000LL

void progress_text(char *out, size_t size, size_t bytes_done, size_t bytes_total, int64_t took_ns) {
    char bar[WIDTH + 1];
    double share = bytes_total > 0 ? (double)bytes_done / (double)bytes_total : 1;
    for (int i = 0; i < WIDTH; i++) bar[i] = i < (int)(share * WIDTH) ? '#' : '.';
    bar[WIDTH] = '\0';
    double rate = took_ns > 0 ? (double)bytes_done / (double)took_ns : 0; /* bytes/ns: GB/s */
    snprintf(out, size, "[%s] %3.0f %%  %.1f of %.1f GB, %.1f GB/s", bar, 100 * share,
             (double)bytes_done / 1e9, (double)bytes_total / 1e9, rate);
}

void progress_show(struct progress *progress, size_t bytes_done, size_t bytes_total) {
    int64_t now = clock_now_ns();
    bool terminal = isatty(STDERR_FILENO) != 0, ends = bytes_done >= bytes_total;
    if (progress->start_ns == 0) progress->start_ns = progress->shown_ns = now;
    bool begun = progress->shown_ns != progress->start_ns;
    if (now - progress->shown_ns < (terminal ? BAR_NS : LINE_NS) && !(ends && begun)) return;
    char text[128];
    progress->shown_ns = now;
    progress_text(text, sizeof text, bytes_done, bytes_total, now - progress->start_ns);
    if (!terminal) log_info("loading %s", text);
    else fprintf(stderr, "\r%s%s", text, ends ? "\n" : "");
}
