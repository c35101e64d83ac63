/* The ops of ops.h for portable. */
#include "kernels/cpu/vector.h"

VINLINE v16 dot_pairs(v16 acc, v16u pairs, uint32_t pair) {
    v16u both = pair - (v16u){0};
    acc += v16_low(pairs) * v16_low(both);
    acc += v16_high(pairs) * v16_high(both);
    return acc;
}

enum { PASS_MAX = 8 };
#include "kernels/cpu/attention_body.h"
#include "kernels/cpu/ops_body.h"

const struct cpu_ops cpu_ops_portable = {rmsnorm_row, swiglu_row, tree_sum, attention, row_max};
