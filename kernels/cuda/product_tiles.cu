/* Products for many rows (prefill): the sums of product.cu, bit for bit, with operands shared by a block.
 *
 * Idea: a block has 8 warps for 16 * P * 2 outputs and 8 * T * 4 tokens of one leaf, and walks the leaf's K
 * alone. Units come by cp.async into a ring of STAGES; in fragment order they need no ldmatrix, a lane reads
 * its 16 bytes. Two accumulators keep product.cu's order: the chain of the stripe at hand, and the sum of the
 * stripes before it. Blocks of the same weights stand side by side in the grid, so that weights come from
 * memory once and for the other rows from the second-level cache.
 *
 * Bytes, of the second-level cache: n * k * 2 of weights for every 8 * T * 4 rows, n_rows * k * 2 of
 * activations for every 16 * P * 2 outputs. */
#include "kernels/cuda/product_parts.h"

enum { STAGES = 4, WARP_ROWS = 2, WARP_COLUMNS = 4 }; /* how a block's warps share outputs and tokens */

/* 16-byte pieces of a unit that a thread fetches: of 2 P panels with Q quads each, then of 4 T tiles; the
 * last may be one too many. */
template <int Q, int P, int T> struct pieces {
    enum { N = (WARP_ROWS * P * Q + WARP_COLUMNS * T + WARPS - 1) / WARPS };
};

/* Where they lie, and how far the next unit is. */
template <int PIECES> struct feed {
    const uint4 *from[PIECES];
    int step[PIECES];
};

template <int Q, int P, int T>
static __device__ __forceinline__ void aim(struct feed<pieces<Q, P, T>::N> &f, const struct product &p,
                                           int panel, int tile) {
    const int PANELS = WARP_ROWS * P, PIECES = pieces<Q, P, T>::N;
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int n_units = p.leaves.unit[p.leaves.n_leaves];
    const int n_panels = p.n_padded / PANEL, n_tiles = (p.n_rows + ROW_TILE - 1) / ROW_TILE;
    /* What lies past the end is computed as a copy of the last, and not stored. */
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int quad = warp + i * WARPS;
        if (quad < PANELS * Q) {
            int at = panel + quad / Q < n_panels ? panel + quad / Q : n_panels - 1;
            f.from[i] = (const uint4 *)p.weights + ((size_t)at * n_units * Q + quad % Q) * LANES + lane;
            f.step[i] = Q * LANES;
        } else {
            int at = tile + quad - PANELS * Q;
            if (at >= n_tiles) at = n_tiles - 1;
            f.from[i] = (const uint4 *)p.rows + (size_t)at * n_units * LANES + lane;
            f.step[i] = LANES;
        }
    }
}

template <int PIECES>
static __device__ __forceinline__ void fetch(uint4 *stage, const struct feed<PIECES> &f, int unit) {
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        cp_async16(stage + threadIdx.x + i * THREADS, f.from[i] + (size_t)unit * f.step[i]);
    }
}

template <enum product_format F, int P, int T>
static __global__ void __launch_bounds__(THREADS, 1)
    product_tile_kernel(const __grid_constant__ struct product p) {
    typedef typename accumulator<F>::type number;
    const int Q = F == PRODUCT_F8 ? 1 : 2; /* 16-byte quads of weights per panel and unit */
    const int PANELS = WARP_ROWS * P, TILES = WARP_COLUMNS * T, PIECES = pieces<Q, P, T>::N;
    CU_DYN_SMEM(uint4, ring); /* [STAGES][PIECES][THREADS]: panels' quads, then tiles */
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES, leaf = blockIdx.y;
    const int first = p.leaves.unit[leaf], last = p.leaves.unit[leaf + 1];
    const int panel = blockIdx.z * PANELS, tile = blockIdx.x * TILES;
    const int my_panel = warp / WARP_COLUMNS * P, my_tile = warp % WARP_COLUMNS * T;
    struct feed<PIECES> f;
    aim<Q, P, T>(f, p, panel, tile);
    grid_wait();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (first + s < last) fetch(ring + s * PIECES * THREADS, f, first + s);
        cp_async_commit();
    }
    number sum[P][T][4] = {};
    int unit = first, slot = 0;
#pragma unroll 1
    for (int stripe = 0; stripe < WARPS; stripe++) {
        const int end = first + (last - first) * (stripe + 1) / WARPS;
        number chain[P][T][4] = {};
#pragma unroll 1
        for (; unit < end; unit++) {
            cp_async_wait<STAGES - 2>();
            __syncthreads(); /* this unit is there for all, and all have done with the one before */
            int ahead = unit + STAGES - 1, free_slot = slot == 0 ? STAGES - 1 : slot - 1;
            if (ahead < last) fetch(ring + free_slot * PIECES * THREADS, f, ahead);
            cp_async_commit();
            const uint4 *weights = ring + slot * PIECES * THREADS + lane;
            const uint4 *rows = weights + (PANELS * Q + my_tile) * LANES;
            uint4 b[T];
#pragma unroll
            for (int j = 0; j < T; j++) b[j] = rows[j * LANES];
#pragma unroll
            for (int i = 0; i < P; i++) {
                uint4 a[Q];
#pragma unroll
                for (int q = 0; q < Q; q++) a[q] = weights[((my_panel + i) * Q + q) * LANES];
#pragma unroll
                for (int j = 0; j < T; j++) multiply(chain[i][j], a, b[j]);
            }
            slot = slot + 1 == STAGES ? 0 : slot + 1;
        }
#pragma unroll
        for (int i = 0; i < P * T * 4; i++) {
            sum[i / (T * 4)][i / 4 % T][i % 4] += chain[i / (T * 4)][i / 4 % T][i % 4];
        }
    }
    grid_go_on();
    const bool alone = p.leaves.n_leaves == 1;
    float *to = alone ? p.out : p.partial + (size_t)leaf * p.n_rows * p.n;
#pragma unroll
    for (int i = 0; i < P; i++) {
        int output0 = (panel + my_panel + i) * PANEL + lane / 4;
#pragma unroll
        for (int j = 0; j < T * 4; j++) {
            int r = j % 4, output = output0 + r / 2 * 8;
            int row = (tile + my_tile + j / 4) * ROW_TILE + lane % 4 * 2 + r % 2;
            if (output >= p.n || row >= p.n_rows) continue;
            float value = finish<F>(sum[i][j / 4][r], p, leaf, output, row);
            if (alone && p.bias != NULL) value += p.bias[output];
            to[(size_t)row * p.n + output] = value;
        }
        __syncwarp(); /* else the compiler reads all panels' scales at once, and spills */
    }
    if (!alone && is_last_leaf(p, blockIdx.z * gridDim.x + blockIdx.x)) {
        finish_tree(p, panel * PANEL, PANELS * PANEL, tile * ROW_TILE, TILES * ROW_TILE);
    }
}

template <enum product_format F, int P, int T>
static void launch_tiles(struct cuda_queue queue, const struct product &p) {
    const int OUTPUTS = WARP_ROWS * P * PANEL, ROWS = WARP_COLUMNS * T * ROW_TILE;
    const int Q = F == PRODUCT_F8 ? 1 : 2;
    dim3 grid((p.n_rows + ROWS - 1) / ROWS, p.leaves.n_leaves, (p.n_padded + OUTPUTS - 1) / OUTPUTS);
    size_t shared = (size_t)STAGES * pieces<Q, P, T>::N * THREADS * sizeof(uint4);
    CU_ALLOW_SHARED((product_tile_kernel<F, P, T>), shared);
    CU_LAUNCH_OVERLAPPED((product_tile_kernel<F, P, T>), grid, dim3(THREADS), shared, queue, p);
}

/* 128 tokens with 128 outputs, or 64 where there would be too few blocks. Speed alone depends on it. */
template <enum product_format F>
static void launch_format(struct cuda_queue queue, const struct product &p, int n_processors) {
    int n_blocks = (p.n_rows + 127) / 128 * p.leaves.n_leaves * ((p.n_padded + 127) / 128);
    if (n_blocks >= n_processors) launch_tiles<F, 4, 4>(queue, p);
    else launch_tiles<F, 2, 4>(queue, p);
}

extern "C" void launch_product_tiles(struct cuda_queue queue, const struct product *p,
                                     int n_processors) {
    switch (p->format) {
    case PRODUCT_BF16: launch_format<PRODUCT_BF16>(queue, *p, n_processors); break;
    case PRODUCT_I8: launch_format<PRODUCT_I8>(queue, *p, n_processors); break;
    case PRODUCT_F8: launch_format<PRODUCT_F8>(queue, *p, n_processors); break;
    }
}
