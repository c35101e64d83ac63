/* The ops of ops.h for AVX-512 (and beside AMX products): bf16 pairs by vdpbf16ps. */
#include <immintrin.h>

#include "kernels/cpu/vector.h"

VINLINE v16 dot_pairs(v16 acc, v16u pairs, uint32_t pair) {
    return (v16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)pairs,
                                 (__m512bh)_mm512_set1_epi32((int)pair));
}

enum { PASS_MAX = 8 };
#include "kernels/cpu/attention_body.h"
#include "kernels/cpu/ops_body.h"

const struct cpu_ops cpu_ops_avx512 = {rmsnorm_row, swiglu_row, tree_sum, attention, row_max};
