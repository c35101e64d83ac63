#include "common/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *const level_names[] = {"debug", "info", "warn", "error"};

static struct {
    char process[64];
    enum log_level lowest;
} sink = {"tandem", LOG_INFO};

void log_open(const char *process, enum log_level lowest) {
    snprintf(sink.process, sizeof sink.process, "%s", process);
    sink.lowest = lowest;
}

int log_level_parse(const char *word) {
    for (int i = 0; i < 4; i++) {
        if (strcmp(word, level_names[i]) == 0) return i;
    }
    return -1;
}

void log_write(enum log_level level, const char *format, ...) {
    if (level < sink.lowest) return;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    struct tm local;
    localtime_r(&now.tv_sec, &local);

    char line[2048];
    int n = snprintf(line, sizeof line, "%02d:%02d:%02d.%03ld %-5s %s: ", local.tm_hour,
                     local.tm_min, local.tm_sec, now.tv_nsec / 1000000, level_names[level],
                     sink.process);
    va_list args;
    va_start(args, format);
    int m = vsnprintf(line + n, sizeof line - (size_t)n - 1, format, args);
    va_end(args);
    size_t length = (size_t)n + (m > 0 ? (size_t)m : 0);
    if (length > sizeof line - 2) length = sizeof line - 2;
    line[length++] = '\n';
    ssize_t written = write(STDERR_FILENO, line, length);
    (void)written; /* nowhere left to report it */
}
