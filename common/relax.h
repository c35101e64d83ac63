/* A hint to the processor that this thread only waits for another. */
#pragma once

#if defined(__x86_64__)
static inline void cpu_relax(void) {
    __builtin_ia32_pause();
}
#else
static inline void cpu_relax(void) {
}
#endif
