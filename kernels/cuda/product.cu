/* Products with packed weights: out[rows, n] = rows W^T, for any number of rows by one kernel (for many,
 * product_tiles.cu is faster).
 *
 * Idea: weights are the 16-row operand of mma.sync, tokens the 8-wide one, so that 1 to 8 tokens cost
 * the same and weights are streamed once, 16 bytes a lane, as they lie in memory. A block has 8 warps
 * for P panels of 16 outputs and 8 * NT tokens of one leaf; each warp owns a stripe of the leaf's K, the
 * w-th eighth of its units, and keeps D units of weights in flight.
 *
 * Order of sums, the same for every n_rows, grid and tensor-parallel degree, since it follows from the
 * leaf alone: along a stripe one chain of mma; stripes 0 to 7 in order; leaves as the binary tree, by
 * the last block of a panel that arrives. int8 sums are exact.
 *
 * Bytes: n * k * (2, 1, 1) of weights, read once: blocks of the same weights for other rows stand beside each
 * other in the grid; n_rows * k * 2 of activations for every P panels, from the second-level cache. Aim: 85 % of what the memory gives for 1 to 8 rows. */
#include "kernels/cuda/product_parts.h"

/* This warp's stripe for P panels and NT tiles of tokens, into c. */
template <enum product_format F, int P, int NT, int D, class C>
static __device__ __forceinline__ void walk_stripe(C (&c)[P][NT][4], const struct product &p,
                                                   int panel, int tile, int begin, int end) {
    const int Q = F == PRODUCT_F8 ? 1 : 2; /* 16-byte quads of weights per panel and unit */
    const int lane = threadIdx.x % LANES, n_units = p.leaves.unit[p.leaves.n_leaves];
    const int n_panels = p.n_padded / PANEL, n_tiles = (p.n_rows + ROW_TILE - 1) / ROW_TILE;
    const uint4 *weights[P], *rows[NT];
    /* What lies past the end is computed as a copy of the last, and not stored. */
#pragma unroll
    for (int i = 0; i < P; i++) {
        int at = panel + i < n_panels ? panel + i : n_panels - 1;
        weights[i] = (const uint4 *)p.weights + (size_t)at * n_units * (Q * LANES) + lane;
    }
#pragma unroll
    for (int j = 0; j < NT; j++) {
        int at = tile + j < n_tiles ? tile + j : n_tiles - 1;
        rows[j] = (const uint4 *)p.rows + (size_t)at * n_units * LANES + lane;
    }
    uint4 a[D][P][Q];
#pragma unroll
    for (int d = 0; d < D; d++) {
#pragma unroll
        for (int i = 0; i < P; i++) {
#pragma unroll
            for (int q = 0; q < Q; q++) {
                a[d][i][q] = make_uint4(0, 0, 0, 0);
                if (begin + d < end) {
                    a[d][i][q] = load_streamed(weights[i] + ((size_t)(begin + d) * Q + q) * LANES);
                }
            }
        }
    }
    grid_wait(); /* weights were there before; activations are another kernel's */
    uint4 b[NT];
#pragma unroll
    for (int j = 0; j < NT; j++) {
        b[j] = begin < end ? rows[j][(size_t)begin * LANES] : make_uint4(0, 0, 0, 0);
    }
    for (int unit = begin; unit < end; unit += D) {
#pragma unroll
        for (int d = 0; d < D; d++) {
            int at = unit + d;
            if (at >= end) break;
            uint4 next[NT];
#pragma unroll
            for (int j = 0; j < NT; j++) {
                next[j] = at + 1 < end ? rows[j][(size_t)(at + 1) * LANES] : b[j];
            }
#pragma unroll
            for (int i = 0; i < P; i++) {
                uint4 now[Q];
#pragma unroll
                for (int q = 0; q < Q; q++) {
                    now[q] = a[d][i][q];
                    if (at + D < end) {
                        a[d][i][q] = load_streamed(weights[i] + ((size_t)(at + D) * Q + q) * LANES);
                    }
                }
#pragma unroll
                for (int j = 0; j < NT; j++) multiply(c[i][j], now, b[j]);
            }
#pragma unroll
            for (int j = 0; j < NT; j++) b[j] = next[j];
        }
    }
}

template <enum product_format F, int P, int NT, int D>
static __global__ void __launch_bounds__(THREADS) product_kernel(struct product p) {
    typedef typename accumulator<F>::type number;
    const int OUTPUTS = P * PANEL, TOKENS = NT * ROW_TILE, STRIDE = OUTPUTS + 4;
    CU_DYN_SMEM(number, sums); /* [WARPS][TOKENS][STRIDE] */
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, leaf = blockIdx.y;
    const int first = p.leaves.unit[leaf], n_units = p.leaves.unit[leaf + 1] - first;
    const int panel = blockIdx.z * P, row0 = blockIdx.x * TOKENS;
    number c[P][NT][4] = {};
    walk_stripe<F, P, NT, D>(c, p, panel, blockIdx.x * NT, first + n_units * warp / WARPS,
                             first + n_units * (warp + 1) / WARPS);
    grid_go_on();
#pragma unroll
    for (int i = 0; i < P; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                int output = i * PANEL + lane / 4 + r / 2 * 8;
                int token = j * ROW_TILE + lane % 4 * 2 + r % 2;
                sums[(warp * TOKENS + token) * STRIDE + output] = c[i][j][r];
            }
        }
    }
    __syncthreads();
    const bool alone = p.leaves.n_leaves == 1;
    for (int i = threadIdx.x; i < OUTPUTS * TOKENS; i += THREADS) {
        int token = i / OUTPUTS, output = panel * PANEL + i % OUTPUTS, row = row0 + token;
        if (output >= p.n || row >= p.n_rows) continue;
        number sum = 0;
        for (int w = 0; w < WARPS; w++) sum += sums[(w * TOKENS + token) * STRIDE + i % OUTPUTS];
        float value = finish<F>(sum, p, leaf, output, row);
        if (alone && p.bias != NULL) value += p.bias[output];
        float *to = alone ? p.out : p.partial + (size_t)leaf * p.n_rows * p.n;
        to[(size_t)row * p.n + output] = value;
    }
    if (!alone && is_last_leaf(p, blockIdx.z * gridDim.x + blockIdx.x)) {
        finish_tree(p, panel * PANEL, OUTPUTS, row0, TOKENS);
    }
}

template <enum product_format F, int P, int NT, int D>
static void launch_tiled(struct cuda_queue queue, const struct product &p) {
    int n_groups = (p.n_padded / PANEL + P - 1) / P;
    int n_row_groups = (p.n_rows + NT * ROW_TILE - 1) / (NT * ROW_TILE);
    size_t shared = (size_t)WARPS * NT * ROW_TILE * (P * PANEL + 4) * 4;
    CU_LAUNCH_OVERLAPPED((product_kernel<F, P, NT, D>), dim3(n_row_groups, p.leaves.n_leaves, n_groups),
                         dim3(THREADS), shared, queue, p);
}

/* Tiles of 8, 16 or 32 tokens; two panels a block where there are blocks enough. Speed alone depends
 * on the choice. */
template <enum product_format F>
static void launch_format(struct cuda_queue queue, const struct product &p, int n_processors) {
    bool wide = p.n_padded / PANEL * p.leaves.n_leaves >= 4 * n_processors;
    if (p.n_rows <= 8) {
        if (wide) launch_tiled<F, 2, 1, 2>(queue, p);
        else launch_tiled<F, 1, 1, 4>(queue, p);
    } else if (p.n_rows <= 16) {
        if (wide) launch_tiled<F, 2, 2, 2>(queue, p);
        else launch_tiled<F, 1, 2, 4>(queue, p);
    } else {
        launch_tiled<F, 1, 4, 2>(queue, p);
    }
}

extern "C" void launch_product(struct cuda_queue queue, const struct product *p, int n_processors) {
    if (p->n_rows >= PRODUCT_TILED_ROWS) {
        launch_product_tiles(queue, p, n_processors);
        return;
    }
    switch (p->format) {
    case PRODUCT_BF16: launch_format<PRODUCT_BF16>(queue, *p, n_processors); break;
    case PRODUCT_I8: launch_format<PRODUCT_I8>(queue, *p, n_processors); break;
    case PRODUCT_F8: launch_format<PRODUCT_F8>(queue, *p, n_processors); break;
    }
}

/* --- packing activations --------------------------------------------------------------------- */

static __device__ __forceinline__ int leaf_of_unit(const struct leaf_units &leaves, int unit) {
    int leaf = 0;
    while (leaf + 1 < leaves.n_leaves && unit >= leaves.unit[leaf + 1]) leaf++;
    return leaf;
}

/* A thread makes one lane's 16 bytes: two B operands of one row. */
static __global__ void pack_bf16_kernel(uint4 *packed, const float *in, int in_stride, int n_rows,
                                        const __grid_constant__ struct leaf_units leaves) {
    grid_wait();
    const int n_units = leaves.unit[leaves.n_leaves];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_units * LANES) return;
    int unit = i / LANES, lane = i % LANES, row = blockIdx.y * ROW_TILE + lane / 4;
    if (row >= n_rows) return;
    int leaf = leaf_of_unit(leaves, unit);
    int column = leaves.column[leaf] + (unit - leaves.unit[leaf]) * 32 + lane % 4 * 2;
    int end = leaves.column[leaf + 1];
    const float *from = in + (size_t)row * in_stride;
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; w++) {
        int at = column + w * 8;
        words[w] = bf16_pair(at < end ? from[at] : 0, at + 1 < end ? from[at + 1] : 0);
    }
    packed[((size_t)blockIdx.y * n_units + unit) * LANES + lane] =
        make_uint4(words[0], words[1], words[2], words[3]);
}

extern "C" void launch_pack_bf16(struct cuda_queue queue, void *packed, const float *in,
                                 int in_stride, int n_rows, struct leaf_units leaves) {
    int n = leaves.unit[leaves.n_leaves] * LANES;
    if (n == 0) return;
    CU_LAUNCH_OVERLAPPED(pack_bf16_kernel, dim3((n + 127) / 128, (n_rows + ROW_TILE - 1) / ROW_TILE),
                         dim3(128), 0, queue, (uint4 *)packed, in, in_stride, n_rows, leaves);
}

/* A block quantises one row's leaf: symmetric, by its largest magnitude. */
static __global__ void pack_i8_kernel(uint32_t *packed, float *scales, const float *in,
                                      int in_stride,
                                      const __grid_constant__ struct leaf_units leaves) {
    CU_SHARED(float, largest, 4);
    grid_wait();
    const int row = blockIdx.x, leaf = blockIdx.y, n_units = leaves.unit[leaves.n_leaves];
    const int begin = leaves.column[leaf], n = leaves.column[leaf + 1] - begin;
    const float *from = in + (size_t)row * in_stride + begin;
    float most = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        float magnitude = fabsf(from[i]);
        most = magnitude > most ? magnitude : most;
    }
    most = warp_max(most);
    if (threadIdx.x % LANES == 0) largest[threadIdx.x / LANES] = most;
    __syncthreads();
    for (int w = 0; w < 4; w++) most = largest[w] > most ? largest[w] : most;
    if (threadIdx.x == 0) scales[(size_t)row * leaves.n_leaves + leaf] = most / 127.0f;
    float inverse = most > 0 ? 127.0f / most : 0;
    int n_words = (leaves.unit[leaf + 1] - leaves.unit[leaf]) * 16;
    for (int i = threadIdx.x; i < n_words; i += blockDim.x) {
        uint32_t word = 0;
        for (int byte = 0; byte < 4; byte++) {
            int at = i * 4 + byte;
            /* Adding 1.5 * 2^23 rounds to an integer, nearest even, in the low bits. */
            float shifted = add_f32(mul_f32(at < n ? from[at] : 0, inverse), 12582912.0f);
            word |= (__float_as_uint(shifted) & 0xffu) << (8 * byte);
        }
        int unit = leaves.unit[leaf] + i / 16;
        packed[packed_byte_at(row, unit, i % 16 * 4, n_units) / 4] = word;
    }
}

extern "C" void launch_pack_i8(struct cuda_queue queue, void *packed, float *scales, const float *in,
                               int in_stride, int n_rows, struct leaf_units leaves) {
    CU_LAUNCH_OVERLAPPED(pack_i8_kernel, dim3(n_rows, leaves.n_leaves), dim3(128), 0, queue,
                         (uint32_t *)packed, scales, in, in_stride, leaves);
}
