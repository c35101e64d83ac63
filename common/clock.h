/* Time. Everything that looks at a clock asks here, so that a virtual clock can stand in. */
#pragma once
#include <stdint.h>

/* Monotonic nanoseconds since an arbitrary start. */
int64_t clock_now_ns(void);

/* Wall-clock nanoseconds since 1970. */
int64_t clock_wall_ns(void);

/* Sleeps at least `ns` nanoseconds. */
void clock_sleep_ns(int64_t ns);
