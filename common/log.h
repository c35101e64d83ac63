/* The log: one line per event on stderr, the only global mutable state of the house.
 *
 *   12:03:04.567 info  worker.1: loaded 28.3 MB of weights in 0.12 s
 *
 * Thread-safe: each line is one write(2). */
#pragma once

enum log_level { LOG_DEBUG, LOG_INFO, LOG_WARN, LOG_ERROR };

/* Names this process in every line ("coordinator", "worker.1") and sets the lowest level printed. */
void log_open(const char *process, enum log_level lowest);

/* "debug", "info", "warn", "error" → level; returns -1 for any other word. */
int log_level_parse(const char *word);

void log_write(enum log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define log_debug(...) log_write(LOG_DEBUG, __VA_ARGS__)
#define log_info(...) log_write(LOG_INFO, __VA_ARGS__)
#define log_warn(...) log_write(LOG_WARN, __VA_ARGS__)
#define log_error(...) log_write(LOG_ERROR, __VA_ARGS__)
