/* Which instruction sets this processor has and this kernel permits. */
#include <cpuid.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels/cpu/cpu.h"

/* The kernel gives tile state only to a process that has asked (Linux, arch_prctl). */
static bool amx_permitted(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* Leaf 7 names these; the compiler's own tests also look at what the system saves (XGETBV). */
static bool has_amx_bits(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned tile = 1u << 24, bf16 = 1u << 22, int8 = 1u << 25;
    return (d & tile) && (d & bf16) && (d & int8);
}

bool cpu_isa_available(enum backend_isa isa) {
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    switch (isa) {
    case BACKEND_AUTO:
    case BACKEND_PORTABLE: return true;
    case BACKEND_AVX2: return avx2;
    case BACKEND_AVX512: return avx512;
    case BACKEND_AMX: return avx512 && has_amx_bits() && amx_permitted();
    default: return false;
    }
}

enum backend_isa backend_isa_best(void) {
    enum backend_isa isa = BACKEND_AMX;
    while (!cpu_isa_available(isa)) isa--;
    return isa;
}
